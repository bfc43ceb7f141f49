"""The tool service: acts on the world, once. It keeps nothing; the journal is the session service's."""
