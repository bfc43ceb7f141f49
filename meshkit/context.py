"""What one RPC carries along inside a process: its request id, its run, its client and its deadline."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from meshkit.ids import uuid7

REQUEST_ID_KEY = "x-request-id"
TRACEPARENT_KEY = "traceparent"
FORWARDED_KEY = "x-forwarded-for"

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

request_id_var: ContextVar[str] = ContextVar("hermesh_request_id", default="")
# The run that the work at hand belongs to; empty where there is none, or are many.
run_id_var: ContextVar[str] = ContextVar("hermesh_run_id", default="")
# Of whoever sent the request, without a port (see `meshkit.proxies`); empty outside of one.
client_var: ContextVar[str] = ContextVar("hermesh_client", default="")
# Of whoever is connected and sent it: an Envoy, or what stands in its place; empty for the mesh's own calls.
peer_var: ContextVar[str] = ContextVar("hermesh_peer", default="")
# Absolute, on the monotonic clock.
deadline_var: ContextVar[float | None] = ContextVar("hermesh_deadline", default=None)


def current_request_id() -> str:
    """Returns the id of the request being served, or an empty string outside of one."""
    return request_id_var.get()


@contextmanager
def use_run(run_id: str) -> Iterator[None]:
    """Works on a run inside of the block, and in the tasks that begin there: their log lines have its id."""
    token = run_id_var.set(run_id)
    try:
        yield
    finally:
        run_id_var.reset(token)


def accept_request_id(offered: str | None) -> str:
    """Returns a caller's request id if it is harmless in a log line, else a new one."""
    if offered and _REQUEST_ID.fullmatch(offered):
        return offered
    return str(uuid7())


def remaining() -> float | None:
    """Returns the seconds left of the RPC being served, or None if it has no deadline.

    Never negative. Tasks that outlive the RPC (`TaskOwner.start`) do not inherit it.
    """
    deadline = deadline_var.get()
    if deadline is None:
        return None
    return max(0.0, deadline - time.monotonic())
