"""The memory service: what is remembered beyond one conversation, found again by its meaning."""
