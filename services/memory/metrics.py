"""Figures of the memory service."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)

EMBED_SECONDS = Histogram("hermesh_memory_embed_seconds", "Time to embed one text.", buckets=_BUCKETS)
RECALL_SECONDS = Histogram("hermesh_memory_recall_seconds", "Time of one search.", buckets=_BUCKETS)
RECALLED = Histogram(
    "hermesh_memory_recalled", "Memories found by one search.", buckets=(0, 1, 2, 5, 10, 50, 100)
)
REMEMBERED = Counter("hermesh_memory_remembered", "Memories stored.")
EXPIRED = Counter("hermesh_memory_expired", "Memories removed because their time had come.")
