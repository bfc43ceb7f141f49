"""The SQL of the store: named, described blocks."""
