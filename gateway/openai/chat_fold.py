"""Chat Completions as a fold of the event log: pure, so that folding again gives the same bytes. Version 1.

Ids come from the run, times from the log, nothing from a clock or a random source. Feeding the same events
in other batches, or again from the start after a broken stream, gives the same chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

VERSION = 1
DONE = b"data: [DONE]\n\n"

_FINISH = {"stop": "stop", "length": "length", "content_filter": "content_filter"}
_BETWEEN_STEPS = "\n\n"


class LoggedEvent(Protocol):
    """An event as it is stored."""

    @property
    def run_id(self) -> str:
        """The run."""
        ...

    @property
    def seq(self) -> int:
        """The position in the log."""
        ...

    @property
    def type(self) -> str:
        """What happened."""
        ...

    @property
    def time_ms(self) -> int:
        """When, Unix milliseconds."""
        ...

    @property
    def data(self) -> str:
        """The body as JSON text."""
        ...


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that gave no reply, or cannot give the rest of it.

    Attributes:
        code: Canonical code.
        reason: For programs.
        message: For a person.
        retryable: Whether asking again may help.
        retry_after_ms: How long to wait before that, where it is known.
    """

    code: str
    reason: str
    message: str
    retryable: bool
    retry_after_ms: int | None = None


@dataclass(slots=True)
class Reply:
    """The state of the fold: what the reply is so far.

    Attributes:
        run_id: The run.
        created: The run's creation, Unix seconds.
        model: The model's name.
        text: The reply's text.
        reasoning: What the model said to itself, as far as it shows that.
        finish_reason: Set at the end of a good reply.
        refused: At the end: whether the text is the model's word that it refuses.
        usage: The tokens, once known.
        failure: Set when there is no good end.
        ended: Whether nothing more comes.
    """

    run_id: str = ""
    created: int = 0
    model: str = ""
    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    refused: bool = False
    usage: dict[str, int] = field(default_factory=dict)
    failure: Failure | None = None
    ended: bool = False
    # Where each piece of text begins, to take it back: (seq, the text's length, the step's start, whether it
    # is the first of its step).
    _marks: list[tuple[int, int, int, bool]] = field(default_factory=list)
    _reasoning_marks: list[tuple[int, int]] = field(default_factory=list)
    _step_start: int = 0
    _new_step: bool = False

    def feed(self, event: LoggedEvent) -> tuple[str, str, bool]:
        """Takes the next event.

        Returns:
            The text and the reasoning that it adds, and whether it took back text that was added before.
        """
        if self.ended:
            return "", "", False
        handler = _HANDLERS.get(event.type)
        if handler is None:
            return "", "", False
        data = orjson.loads(event.data or "{}")
        result = handler(self, event, data if isinstance(data, dict) else {})
        return result if result is not None else ("", "", False)

    def _created(self, event: LoggedEvent, data: dict[str, Any]) -> None:
        self.run_id = event.run_id
        self.created = event.time_ms // 1000
        self.model = _text(data, "model") or self.model

    def _step(self, event: LoggedEvent, data: dict[str, Any]) -> None:
        self._new_step = True

    def _delta(self, event: LoggedEvent, data: dict[str, Any]) -> tuple[str, str, bool]:
        return self._add(event.seq, _text(data, "text")), "", False

    def _add(self, seq: int, text: str) -> str:
        if not text:
            return ""
        self._marks.append((seq, len(self.text), self._step_start, self._new_step))
        if self._new_step:
            self._new_step = False
            if self.text and not self.text.endswith("\n"):
                text = _BETWEEN_STEPS + text
                self._step_start = len(self.text) + len(_BETWEEN_STEPS)
            else:
                self._step_start = len(self.text)
        self.text += text
        return text

    def _reason(self, event: LoggedEvent, data: dict[str, Any]) -> tuple[str, str, bool]:
        text = _text(data, "text")
        self._reasoning_marks.append((event.seq, len(self.reasoning)))
        self.reasoning += text
        return "", text, False

    def _message(self, event: LoggedEvent, data: dict[str, Any]) -> tuple[str, str, bool]:
        # The whole message; adds only what no delta brought.
        content = _text(data, "content")
        so_far = "" if self._new_step else self.text[self._step_start :]
        rest = content[len(so_far) :] if content.startswith(so_far) else ""
        return self._add(event.seq, rest), "", False

    def _reset(self, event: LoggedEvent, data: dict[str, Any]) -> tuple[str, str, bool]:
        from_seq = data.get("from_seq")
        first = from_seq if isinstance(from_seq, int) else 0
        thoughts = [length for seq, length in self._reasoning_marks if seq >= first]
        if thoughts:
            self.reasoning = self.reasoning[: thoughts[0]]
            del self._reasoning_marks[-len(thoughts) :]
        taken = [mark for mark in self._marks if mark[0] >= first]
        if not taken:
            return "", "", False
        del self._marks[-len(taken) :]
        _, length, self._step_start, self._new_step = taken[0]
        self.text = self.text[:length]
        return "", "", True

    def _usage(self, event: LoggedEvent, data: dict[str, Any]) -> None:
        # The run's total; a later one replaces it.
        for name in ("input_tokens", "output_tokens", "cached_tokens"):
            count = data.get(name)
            if isinstance(count, int):
                self.usage[name] = count

    def _completed(self, event: LoggedEvent, data: dict[str, Any]) -> None:
        reason = _text(data, "finish_reason")
        self.finish_reason = _FINISH.get(reason, "stop")
        self.refused = reason == "refusal"
        self.ended = True

    def _failed(self, event: LoggedEvent, data: dict[str, Any]) -> None:
        wait = data.get("retry_after_ms")
        self.failure = Failure(
            _text(data, "code") or "INTERNAL",
            _text(data, "reason") or "INTERNAL",
            _text(data, "message") or "the run failed",
            data.get("retryable") is True,
            wait if isinstance(wait, int) else None,
        )
        self.ended = True

    def _cancelled(self, event: LoggedEvent, data: dict[str, Any]) -> None:
        self.failure = Failure("CANCELLED", "CANCELLED", "the run was cancelled", False)
        self.ended = True

    def _action(self, event: LoggedEvent, data: dict[str, Any]) -> None:
        name = _text(data, "name") or "a tool"
        self.failure = Failure(
            "FAILED_PRECONDITION",
            "TOOL_CALL_UNKNOWN",
            f"the run waits for a person's decision about {name}; settle it with the native API",
            False,
        )
        self.ended = True


_HANDLERS = {
    "run.created": Reply._created,
    "step.started": Reply._step,
    "text.delta": Reply._delta,
    "reasoning.delta": Reply._reason,
    "message.completed": Reply._message,
    "attempt.reset": Reply._reset,
    "usage": Reply._usage,
    "run.completed": Reply._completed,
    "run.failed": Reply._failed,
    "run.cancelled": Reply._cancelled,
    "action.required": Reply._action,
}


def _text(data: dict[str, Any], name: str) -> str:
    value = data.get(name)
    return value if isinstance(value, str) else ""


def completion_id(run_id: str) -> str:
    """Returns the id of the completion that a run is."""
    return f"chatcmpl-{run_id}"


def usage_object(usage: dict[str, int]) -> dict[str, Any]:
    """Returns OpenAI's usage object."""
    read, written = usage.get("input_tokens", 0), usage.get("output_tokens", 0)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": usage.get("cached_tokens", 0)},
    }


class ChatChunks:
    """The streamed form: events to `data:` frames."""

    def __init__(self, model: str = "", *, include_usage: bool = False) -> None:
        """Starts a stream.

        Args:
            model: The name the client asked for, used where the log has none.
            include_usage: Whether a last chunk has the usage.
        """
        self.reply = Reply(model=model)
        self._include_usage = include_usage
        self._opened = False
        self._head = b""
        self.ended = False

    def feed(self, event: LoggedEvent) -> bytes:
        """Takes the next event and returns the frames that it makes; often none."""
        if self.ended:
            return b""
        text, reasoning, taken_back = self.reply.feed(event)
        if taken_back:
            # What was sent cannot be taken back in this protocol.
            self.ended = True
            return self._error(
                Failure("ABORTED", "ATTEMPT_RESET", "the reply was begun anew; ask again for all of it", True)
            )
        out = b""
        if reasoning:
            out += self._open() + self._chunk({"reasoning_content": reasoning})
        if text:
            out += self._open() + self._chunk({"content": text})
        if self.reply.ended:
            self.ended = True
            failure = self.reply.failure
            if failure is not None:
                return out + self._error(failure)
            # Its text has been sent as it came; only now it is known to be a refusal.
            last = {"refusal": self.reply.text} if self.reply.refused else {}
            out += self._open() + self._chunk(last, self.reply.finish_reason)
            if self._include_usage:
                out += self._frame(b"[]", orjson.dumps(usage_object(self.reply.usage)))
            out += DONE
        return out

    def _open(self) -> bytes:
        if self._opened:
            return b""
        self._opened = True
        return self._chunk({"role": "assistant", "content": ""})

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        reason = b"null" if finish_reason is None else orjson.dumps(finish_reason)
        choice = b'[{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b}]' % (
            orjson.dumps(delta),
            reason,
        )
        return self._frame(choice, b"null" if self._include_usage else b"")

    def _frame(self, choices: bytes, usage: bytes) -> bytes:
        if not self._head:
            reply = self.reply
            self._head = (
                b'data: {"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,"choices":'
                % (
                    orjson.dumps(completion_id(reply.run_id)),
                    reply.created,
                    orjson.dumps(reply.model),
                )
            )
        return self._head + choices + (b',"usage":' + usage if usage else b"") + b"}\n\n"

    def _error(self, failure: Failure) -> bytes:
        return error_chunk(failure)


def error_chunk(failure: Failure) -> bytes:
    """Returns the frame that ends a stream with an error, in OpenAI's shape."""
    body = {
        "error": {
            "message": failure.message,
            "type": "server_error",
            "param": None,
            "code": failure.reason.lower(),
        }
    }
    return b"data: " + orjson.dumps(body) + b"\n\n"


def completion(reply: Reply) -> dict[str, Any]:
    """Returns the whole completion of a reply that ended well."""
    text, refusal = (None, reply.text) if reply.refused else (reply.text, None)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": refusal}
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    return {
        "id": completion_id(reply.run_id),
        "object": "chat.completion",
        "created": reply.created,
        "model": reply.model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}],
        "usage": usage_object(reply.usage),
    }
