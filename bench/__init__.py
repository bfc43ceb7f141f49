"""Benches and the doubles they need; nothing here is part of a running mesh."""
