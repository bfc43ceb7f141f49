"""Backups of a mesh: its database and its large tool results, taken at one point in time, and put back."""
