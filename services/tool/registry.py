"""Tools and their registry: what a tool declares, and how a call reaches it.

A tool is an async function with a declaration:

    from services.tool.registry import ToolContext, tool

    @tool(
        "lookup_order",
        description="Looks up an order by its number.",
        input_schema={"type": "object", "properties": {"number": {"type": "string"}}, "required": ["number"]},
        effect=Effect.PURE,
        timeout=5.0,
    )
    async def lookup_order(arguments: Mapping[str, Any], context: ToolContext) -> str:
        ...

The decorator only attaches the declaration; `tools_in(module)` finds it. There is no global list.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from types import ModuleType
from typing import Any
from uuid import UUID

from meshkit.errors import StartupError
from services.tool.schemas import ArgumentSchema, SchemaError

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_PROBLEM = 200
_MARK = "__hermesh_tool__"


class Effect(IntEnum):
    """What may be done again after a crash; the numbers are the wire's (`session.v1.EffectClass`)."""

    PURE = 1
    IDEMPOTENT = 2
    NON_IDEMPOTENT = 3


class ToolError(Exception):
    """The tool failed and says so: nothing happened that a repetition would double.

    Attributes:
        message: For the model; no secret and no stack trace.
        reason: An `ErrorReason` without its prefix.
    """

    def __init__(self, message: str, *, reason: str = "TOOL_FAILED") -> None:
        """Makes an error for the model to read."""
        super().__init__(message)
        self.message = message
        self.reason = reason


class OutcomeUnknownError(Exception):
    """The tool may have acted and cannot tell: the call must not be repeated by itself.

    Raise it, for example, when a request was sent and its answer never came.
    """


class Reconciled(Enum):
    """What a tool's `reconcile` may answer in place of a result."""

    NOT_DONE = "not done"
    CANNOT_TELL = "cannot tell"


def ignore(_text: str) -> None:
    """Takes progress that nobody watches."""


@dataclass(frozen=True, slots=True)
class ToolContext:
    """What a call may know beside its arguments.

    Attributes:
        call_id: `<run_id>:<step>:<index>`.
        idempotency_key: The same for every try of this call; hand it to the outside if that takes keys.
        tenant_id: On whose behalf.
        session_id: The session.
        run_id: The run.
        user: The session's user; empty if it has none.
        progress: Sends a line of text to the people who watch.
    """

    call_id: str
    idempotency_key: str
    tenant_id: UUID
    session_id: UUID
    run_id: UUID
    user: str = ""
    progress: Callable[[str], None] = ignore


ToolFunction = Callable[[Mapping[str, Any], ToolContext], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool's declaration.

    Attributes:
        name: Letters, digits, `_` and `-`, at most 64.
        description: What it does, for the model.
        input_schema: JSON Schema of the arguments, which are always an object.
        effect: What may be done again after a crash. The default is the careful one.
        timeout: Seconds one call may take.
        requires_approval: Whether a person has to approve each call.
        function: Gets the arguments and the context; returns text, or what JSON can hold.
        reconcile: Looks up in the outside what became of a call whose outcome is unknown. Gets what the
            function got and returns the result, or a `Reconciled`; it never acts.
        reconcile_timeout: Seconds one look may take.
        settle_seconds: For how long after its end what the tool has sent may still take effect outside.
    """

    name: str
    description: str
    input_schema: Mapping[str, Any]
    function: ToolFunction
    effect: Effect = Effect.NON_IDEMPOTENT
    timeout: float = 30.0
    requires_approval: bool = False
    reconcile: ToolFunction | None = None
    reconcile_timeout: float = 10.0
    settle_seconds: float = 5.0
    schema_text: str = field(init=False)
    _schema: ArgumentSchema = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Checks the declaration, so that a wrong one stops the start and not the first call.

        Raises:
            StartupError: The name, the timeout or the schema is not valid.
        """
        if not _NAME.fullmatch(self.name):
            raise StartupError(f"tool name {self.name!r} must be 1 to 64 letters, digits, '_' or '-'")
        if not 0 < self.timeout <= 3600:
            raise StartupError(f"tool {self.name}: the timeout must be above 0 and at most 3600 seconds")
        if not (0 < self.reconcile_timeout <= 60 and 0 <= self.settle_seconds <= 86_400):
            raise StartupError(
                f"tool {self.name}: reconcile_timeout must be above 0 and at most 60 seconds, "
                "settle_seconds at most 86400"
            )
        if self.reconcile is not None and self.effect is not Effect.NON_IDEMPOTENT:
            raise StartupError(
                f"tool {self.name}: what may simply run again has nothing to reconcile; leave reconcile out"
            )
        try:
            schema = ArgumentSchema(self.input_schema)
        except SchemaError as error:
            raise StartupError(f"tool {self.name}: {error}") from error
        object.__setattr__(self, "schema_text", schema.text)
        object.__setattr__(self, "_schema", schema)

    def parse(self, text: str) -> dict[str, Any]:
        """Reads and validates the arguments of a call.

        Args:
            text: A JSON object; empty means no arguments.

        Raises:
            ArgumentsError: The text is not a JSON object, or does not fit the schema.
        """
        return self._schema.parse(text)


def tool(
    name: str,
    *,
    description: str,
    input_schema: Mapping[str, Any],
    effect: Effect = Effect.NON_IDEMPOTENT,
    timeout: float = 30.0,
    requires_approval: bool = False,
    reconcile: ToolFunction | None = None,
    reconcile_timeout: float = 10.0,
    settle_seconds: float = 5.0,
) -> Callable[[ToolFunction], ToolFunction]:
    """Declares an async function as a tool; see `Tool` for the parameters."""

    def declare(function: ToolFunction) -> ToolFunction:
        declaration = Tool(
            name=name,
            description=description,
            input_schema=input_schema,
            function=function,
            effect=effect,
            timeout=timeout,
            requires_approval=requires_approval,
            reconcile=reconcile,
            reconcile_timeout=reconcile_timeout,
            settle_seconds=settle_seconds,
        )
        setattr(function, _MARK, declaration)
        return function

    return declare


def tools_in(module: ModuleType) -> list[Tool]:
    """Returns the tools that a module declares or imports, in the order of their definition."""
    found = (getattr(value, _MARK, None) for value in vars(module).values())
    return [declaration for declaration in found if isinstance(declaration, Tool)]


def load_modules(names: Iterable[str]) -> list[Tool]:
    """Imports modules and returns their tools.

    Raises:
        StartupError: A module cannot be imported, or declares no tool.
    """
    tools: list[Tool] = []
    for name in names:
        try:
            module = importlib.import_module(name)
        except StartupError:
            raise
        except Exception as error:
            raise StartupError(
                f"the tool module {name} cannot be imported ({type(error).__name__}: {_one_line(error)}); "
                "check HERMESH_TOOL_MODULES and PYTHONPATH"
            ) from error
        declared = tools_in(module)
        if not declared:
            raise StartupError(f"the tool module {name} declares no tool; use the decorator @tool")
        tools.extend(declared)
    return tools


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:_MAX_PROBLEM]


class Registry:
    """The tools of one service, by name. It does not change after the start."""

    def __init__(self, tools: Iterable[Tool] = ()) -> None:
        """Takes the tools.

        Raises:
            StartupError: Two have the same name.
        """
        self._tools: dict[str, Tool] = {}
        for declaration in tools:
            known = self._tools.get(declaration.name)
            if known is not None and known is not declaration:
                raise StartupError(f"two tools are named {declaration.name}; rename one")
            self._tools[declaration.name] = declaration

    def __len__(self) -> int:
        return len(self._tools)

    def find(self, name: str) -> Tool | None:
        """Returns a tool, or None."""
        return self._tools.get(name)

    def page(self, after: str, size: int) -> list[Tool]:
        """Returns up to `size` tools whose names follow `after`, by name."""
        names = sorted(name for name in self._tools if name > after)
        return [self._tools[name] for name in names[:size]]
