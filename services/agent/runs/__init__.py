"""Running runs: the writer and its append stream, leases, the runner, and the supervisor that owns them."""
