"""The command `hermesh` and the embedded stack; it starts services as processes and imports none."""
