"""Reads what a process of the mesh exports, as Prometheus does."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families


async def exported(client: httpx.AsyncClient, address: str, name: str) -> float:
    """Returns a metric of one process, all its labels added up.

    Args:
        client: Who asks.
        address: host:port of the process's metrics.
        name: The metric's.

    Raises:
        httpx.HTTPError: It cannot be read.
        LookupError: The process has no such metric.
    """
    answer = (await client.get(f"http://{address}/metrics")).raise_for_status()
    for family in text_string_to_metric_families(answer.text):
        if family.name == name:
            return sum(sample.value for sample in family.samples)
    raise LookupError(f"{address} exports no {name}")
