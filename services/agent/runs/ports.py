"""What a runner needs of the world, as small protocols: the adapters are in `clients` and `model`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hermesh.session.v1.resources_pb2 import ContextPosition, RunContext
from services.agent.clients.memory import Known
from services.agent.clients.tools import CallPlace, ToolInfo
from services.agent.domain.loop import Call, Limits
from services.agent.domain.prompt import RunSpec, ToolMode
from services.agent.model.port import Model


class ToolPort(Protocol):
    """See `ToolClient`."""

    async def tools(self) -> Mapping[str, ToolInfo]:
        """Return the tools by name."""
        ...

    async def execute(
        self,
        spec: RunSpec,
        call: Call,
        info: ToolInfo,
        fence: Callable[[], int],
        on_progress: Callable[[str], None],
        seconds_left: Callable[[], float],
        place: CallPlace,
    ) -> Call:
        """Run one call and return it with its outcome."""
        ...

    async def reconcile(self, spec: RunSpec, call: Call, known_since: float) -> Call:
        """Have a call's tool look up what became of it."""
        ...

    async def cancel(self, call_id: str, tenant_id: str, place: CallPlace) -> None:
        """Ask a running call to stop."""
        ...


class MemoryPort(Protocol):
    """See `MemoryClient`."""

    async def known(self, spec: RunSpec, query: str, timeout: float) -> Known:
        """Return memories and preferences."""
        ...

    async def remember(self, spec: RunSpec, text: str, timeout: float) -> None:
        """Keep a text."""
        ...


class ReasonPort(Protocol):
    """See `SessionClient`."""

    async def cancel_reason(self, run_id: str, tenant_id: str) -> str:
        """Return why somebody asked to cancel a run."""
        ...


class ContextPort(Protocol):
    """See `SessionClient`."""

    async def rest(
        self, run_id: str, fence: Callable[[], int], position: ContextPosition
    ) -> Sequence[RunContext]:
        """Return what a claim's answer had no room for."""
        ...


class CatalogPort(Protocol):
    """See `ModelCatalog`."""

    async def resolve(self, name: str) -> str:
        """Return the backend's name of a model."""
        ...


@dataclass(frozen=True, slots=True)
class World:
    """Everything a runner uses.

    Attributes:
        tool_mode: how the backend calls tools.
        can_prefill: whether it continues a last message of role assistant.
        context_tokens: its window, 0 = unknown.
        memory_timeout: seconds to wait for memories.
        limits: makes a run's bounds out of what was asked.
        now_ms: the clock of events.
        monotonic: the clock of limits and leases.
        draining: whether to stop at the next step boundary.
    """

    replica: str
    model: Model
    catalog: CatalogPort
    tools: ToolPort
    memory: MemoryPort
    reasons: ReasonPort
    contexts: ContextPort
    tool_mode: ToolMode
    can_prefill: bool
    context_tokens: int
    memory_timeout: float
    limits: Callable[[RunSpec], Limits]
    now_ms: Callable[[], int]
    monotonic: Callable[[], float]
    draining: Callable[[], bool]
