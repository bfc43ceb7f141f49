"""Where sessions are kept: PostgreSQL is the truth, Redis a decorator."""
