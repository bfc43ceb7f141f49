"""The body of POST /v1/chat/completions: which parameters are taken, and which are refused clearly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gateway.cursor import canonical_id
from gateway.problems import OpenAIError
from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.session.v1 import resources_pb2 as resources

_ROLES = {"user": "user", "system": "system", "developer": "system", "assistant": "assistant"}
_MAX_MESSAGES = 256
CONCURRENCY_HEADER = "X-Hermesh-Concurrency"
_POLICIES = {
    "enqueue": resources.CONCURRENCY_POLICY_ENQUEUE,
    "reject": resources.CONCURRENCY_POLICY_REJECT,
    "interrupt": resources.CONCURRENCY_POLICY_INTERRUPT,
    "rollback": resources.CONCURRENCY_POLICY_ROLLBACK,
}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked request.

    Attributes:
        model: As asked for.
        messages: The run's input.
        options: What is set for the run; without the model.
        stream: Whether chunks are asked for.
        include_usage: Whether the last chunk has the usage.
        user: Whose memories apply; empty for nobody's.
        session_id: The session to go on with; empty for a new one.
        concurrency: What happens when the session is busy.
    """

    model: str
    messages: list[InputMessage]
    options: resources.RunOptions
    stream: bool
    include_usage: bool
    user: str
    session_id: str
    concurrency: resources.ConcurrencyPolicy.ValueType = resources.CONCURRENCY_POLICY_UNSPECIFIED


def bad(param: str | None, message: str, code: str | None = None) -> OpenAIError:
    """Returns the error for a wrong parameter."""
    return OpenAIError(400, message, param=param, openai_code=code)


def parse_chat(
    value: Any, session_header: str | None = None, concurrency_header: str | None = None
) -> ChatRequest:
    """Checks a parsed body.

    Args:
        value: The JSON.
        session_header: The header X-Hermesh-Session, which names a session to go on with.
        concurrency_header: The header X-Hermesh-Concurrency, which says what happens when that one is busy.

    Raises:
        OpenAIError: 400 that names the parameter.
    """
    if not isinstance(value, dict):
        raise bad(None, "the body must be a JSON object")
    _refuse_unsupported(value)
    model = value.get("model")
    if not isinstance(model, str) or not model:
        raise bad("model", "model must be a non-empty string")
    stream = _flag(value, "stream")
    stream_options = value.get("stream_options")
    if stream_options is not None and not isinstance(stream_options, dict):
        raise bad("stream_options", "stream_options must be an object")
    if stream_options is not None and not stream:
        raise bad("stream_options", "stream_options is for stream: true only")
    session_id = session_header or value.get("session_id") or ""
    if session_id:
        try:
            session_id = canonical_id(session_id)
        except (ValueError, TypeError):
            raise bad("session_id", "session_id must be a session's id, a UUID") from None
    user = value.get("user") or ""
    if not isinstance(user, str) or len(user) > 200:
        raise bad("user", "user must be a string of at most 200 characters")
    return ChatRequest(
        model=model,
        messages=_messages(value.get("messages")),
        options=_options(value),
        stream=stream,
        include_usage=stream and _flag(stream_options or {}, "include_usage"),
        user=user,
        session_id=session_id,
        concurrency=_concurrency(concurrency_header),
    )


def _concurrency(name: str | None) -> resources.ConcurrencyPolicy.ValueType:
    if not name:
        return resources.CONCURRENCY_POLICY_UNSPECIFIED
    if name not in _POLICIES:
        raise bad(CONCURRENCY_HEADER, f"{CONCURRENCY_HEADER} must be one of {', '.join(_POLICIES)}")
    return _POLICIES[name]


def _refuse_unsupported(value: dict[str, Any]) -> None:
    n = value.get("n")
    if n is not None and (isinstance(n, bool) or n != 1):
        raise bad("n", "only n = 1 is served: a session has one reply at a time", "unsupported_value")
    for name in ("tools", "functions"):
        if value.get(name):
            raise bad(
                name,
                f"{name} given by the client are not served: the agent has tools of its own",
                "unsupported_parameter",
            )
    if _flag(value, "logprobs"):
        raise bad("logprobs", "logprobs are not served", "unsupported_parameter")
    response_format = value.get("response_format")
    if response_format is not None and (
        not isinstance(response_format, dict) or response_format.get("type") != "text"
    ):
        raise bad("response_format", "only response_format text is served", "unsupported_parameter")


def _messages(value: Any) -> list[InputMessage]:
    if not isinstance(value, list) or not value:
        raise bad("messages", "messages must be a non-empty array")
    if len(value) > _MAX_MESSAGES:
        raise bad("messages", f"messages may have at most {_MAX_MESSAGES} entries")
    return [_message(item, f"messages[{index}]") for index, item in enumerate(value)]


def _message(item: Any, where: str) -> InputMessage:
    if not isinstance(item, dict):
        raise bad(where, f"{where} must be an object")
    role = item.get("role")
    if role in ("tool", "function") or item.get("tool_calls"):
        raise bad(f"{where}.role", "tool messages are not taken: the agent has tools of its own")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad(f"{where}.role", f"{where}.role must be one of {', '.join(_ROLES)}")
    content = item.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise bad(f"{where}.content", f"{where}.content must be a string or an array of text parts")
    return InputMessage(role=_ROLES[role], content=content)


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise bad(where, f"{where}: only parts of type text are served")
    text: str = part["text"]
    return text


def _options(value: dict[str, Any]) -> resources.RunOptions:
    options = resources.RunOptions()
    temperature = _number(value, "temperature", 0, 2)
    if temperature is not None:
        options.temperature = temperature
    top_p = _number(value, "top_p", 0, 1)
    if top_p is not None:
        if top_p == 0:
            raise bad("top_p", "top_p must be above 0")
        options.top_p = top_p
    limit = "max_completion_tokens" if value.get("max_completion_tokens") is not None else "max_tokens"
    most = _integer(value, limit, 1, 2**31 - 1)
    if most is not None:
        options.max_output_tokens = most
    seed = _integer(value, "seed", -(2**63), 2**63 - 1)
    if seed is not None:
        options.seed = seed
    stop = value.get("stop")
    if stop is not None:
        strings = [stop] if isinstance(stop, str) else stop
        if not isinstance(strings, list) or len(strings) > 16 or not all(isinstance(s, str) for s in strings):
            raise bad("stop", "stop must be a string or an array of at most 16 strings")
        options.stop.extend(text for text in strings if text)
    return options


def _flag(value: dict[str, Any], name: str) -> bool:
    flag = value.get(name)
    if flag is None:
        return False
    if not isinstance(flag, bool):
        raise bad(name, f"{name} must be true or false")
    return flag


def _number(value: dict[str, Any], name: str, least: float, most: float) -> float | None:
    number = value.get(name)
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not least <= number <= most:
        raise bad(name, f"{name} must be a number from {least:g} to {most:g}")
    return float(number)


def _integer(value: dict[str, Any], name: str, least: int, most: int) -> int | None:
    number = value.get(name)
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
        raise bad(name, f"{name} must be an integer from {least} to {most}")
    return number
