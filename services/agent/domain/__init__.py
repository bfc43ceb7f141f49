"""The agent's loop as pure steps: no I/O, no clock, no gRPC."""
