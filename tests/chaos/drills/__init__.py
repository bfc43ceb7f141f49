"""Drills: one thing is broken on purpose while many clients stream, and what they saw is held to a bound.

python -m tests.chaos.drills NAME [--streams 50]
"""
