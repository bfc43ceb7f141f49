"""What the loop asks of a language model, whoever serves it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Role = Literal["system", "user", "assistant", "tool"]

# The most tokens that are counted, of a turn and of a run: the wire and the database hold an int32.
MAX_COUNT = 2**31 - 1


def _nothing() -> None:
    """Watch nothing."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """One tool call inside an assistant message.

    Attributes:
        call_id: Hermesh's id of the call (`run:step:index`); it is also sent to the backend.
        name: the tool.
        arguments: a JSON object as text.
        provider: what its backend may want to have back with it, as JSON text: `{"id", "fields"}`; "" for
            nothing.
    """

    call_id: str
    name: str
    arguments: str
    provider: str = ""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation, in the shape that every chat model knows.

    Attributes:
        provider: fields that its backend may want to have back with it, as a JSON object's text; "" for none.
    """

    role: str
    content: str
    tool_calls: tuple[ToolUse, ...] = ()
    tool_call_id: str = ""
    provider: str = ""


@dataclass(frozen=True, slots=True)
class ToolOffer:
    """A tool as it is offered to the model; `schema` is the JSON Schema of its arguments."""

    name: str
    description: str
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """One model turn.

    Attributes:
        model: the backend's name of the model.
        messages: the conversation; a last message of role assistant is to be continued.
        tools: what may be called; empty means nothing.
        tool_choice: "auto", "none", "required" or a tool's name.
        max_tokens: the most tokens to write, 0 = the backend's default.
        response_schema: when set, the reply's text must be JSON of this schema (grammar-constrained).
        cache_key: a stable key of the conversation; backends and balancers use it for prefix caches.
        asking: called by an adapter right before each request that it sends, a second try too. It may
            raise a `ModelError`: then nothing more is to be sent.
    """

    model: str
    messages: Sequence[ChatMessage]
    tools: Sequence[ToolOffer] = ()
    tool_choice: str = "auto"
    max_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    response_schema: Mapping[str, Any] | None = None
    cache_key: str = ""
    asking: Callable[[], None] = _nothing


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that was just written; often many tokens."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Reasoning that was just written and is not part of the reply."""

    text: str


@dataclass(frozen=True, slots=True)
class RefusalDelta:
    """Text in which the model says that it refuses."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call; the pieces of one `index` add up, the last `name` that is not empty counts.

    Attributes:
        index: the call's place in the order in which calls begin, from 0.
        id: the model's own id of the call, "" while there is none.
        fields: what the backend may want to have back with the call.
    """

    index: int
    name: str
    arguments: str
    id: str = ""
    fields: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """Fields of the reply that the backend may want to have back with it; at most once, at the end."""

    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the backend counted them, each from 0 to `MAX_COUNT`; a sum stays there, too."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            min(MAX_COUNT, self.input_tokens + other.input_tokens),
            min(MAX_COUNT, self.output_tokens + other.output_tokens),
            min(MAX_COUNT, self.cached_tokens + other.cached_tokens),
        )


@dataclass(frozen=True, slots=True)
class Finished:
    """The reply is whole. `reason` is "stop", "length", "tool_calls", "content_filter" or "refusal"."""

    reason: str


ModelEvent = TextDelta | ReasoningDelta | RefusalDelta | ToolCallDelta | Usage | Kept | Finished


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that a backend serves."""

    name: str
    owned_by: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


class Model(Protocol):
    """A language model backend."""

    def stream(self, request: ModelRequest) -> AsyncGenerator[Sequence[ModelEvent], None]:
        """Stream one reply as batches: each holds all that had arrived when it was asked for.

        The last batch ends with `Finished`. Closing the iterator (or cancelling the task that reads
        it) closes the backend's connection at once, so that the backend stops working on it.

        Raises:
            ModelError: one of its subclasses; after the first batch nothing is sent again.
        """
        ...

    async def list_models(self) -> Sequence[ModelInfo]:
        """List the models that the backend serves.

        Raises:
            ModelError: the backend cannot be asked.
        """
        ...
