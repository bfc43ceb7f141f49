"""Real servers out of wheels, for where no URL names another: PostgreSQL, Valkey, Envoy, a language model."""
