"""The session service: sessions, messages, runs, the event log, leases and the tool journal."""
