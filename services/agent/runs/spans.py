"""What a run's trace says, in the words of OpenTelemetry's conventions for generative AI.

One span an attempt (`invoke_agent`), below the request that the input came with, whichever replica works on
it and however it got there; in it one for each turn of the model (`chat`), each tool call (`execute_tool`),
and each wait for a commit. A run that was taken over has an attempt more, linked to the one before. Nothing
that a person or a model said is in it.
"""

from __future__ import annotations

from meshkit import tracing
from services.agent.domain.loop import Call, CallModel, CallState, Turn
from services.agent.domain.prompt import RunSpec
from services.agent.model.port import Usage

# Whose protocol it is, as the conventions want it; who answers is a matter of the model and the address.
_PROVIDER = "openai"
_WELL = ("completed", "requires_action", "cancelled", "released")


def run(spec: RunSpec, former: str, replica: str) -> tracing.Span:
    """Return the span of one attempt.

    Args:
        spec: the run.
        former: the traceparent of the attempt before; empty for none.
        replica: which agent this is.
    """
    if not tracing.enabled():
        return tracing.NO_SPAN
    # Who dispatches a run knows nothing of its trace, and who submitted it may have gone.
    here = tracing.current_trace()
    parent = here if here is not None and here.flags else tracing.parse_traceparent(spec.traceparent)
    link = tracing.parse_traceparent(former)
    return tracing.span(
        "invoke_agent",
        {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.conversation.id": spec.session_id,
            "hermesh.run_id": spec.run_id,
            "hermesh.session_id": spec.session_id,
            "hermesh.tenant_id": spec.tenant_id,
            "hermesh.attempt": spec.attempt,
            "hermesh.replica": replica,
        },
        parent=parent,
        links=() if link is None else (link,),
    )


def run_ended(span: tracing.Span, outcome: str, usage: Usage) -> None:
    """Say how an attempt ended here."""
    if not span.recording:
        return
    span.set("hermesh.outcome", outcome)
    _say_usage(span, usage)
    if outcome not in _WELL:
        span.fail(outcome)


def turn(spec: RunSpec, decision: CallModel) -> tracing.Span:
    """Return the span of one turn of the model."""
    if not tracing.recording():
        return tracing.NO_SPAN
    about: dict[str, tracing.Value] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": _PROVIDER,
        "gen_ai.request.model": spec.model,
        "gen_ai.request.stream": True,
        "gen_ai.conversation.id": spec.session_id,
        "hermesh.run_id": spec.run_id,
        "hermesh.session_id": spec.session_id,
        "hermesh.tenant_id": spec.tenant_id,
        "hermesh.step": decision.step,
        "hermesh.resume": decision.resume,
    }
    if decision.max_tokens:
        about["gen_ai.request.max_tokens"] = decision.max_tokens
    for name, value in (("temperature", spec.temperature), ("top_p", spec.top_p), ("seed", spec.seed)):
        if value is not None:
            about[f"gen_ai.request.{name}"] = value
    return tracing.span(f"chat {spec.model}", about, kind="client")


def turn_ended(span: tracing.Span, whole: Turn, first_after: float | None) -> None:
    """Say what a turn came to; `first_after` is how many seconds its first piece took."""
    if not span.recording:
        return
    if whole.finish_reason:
        span.set("gen_ai.response.finish_reasons", [whole.finish_reason])
    if first_after is not None:
        span.set("gen_ai.response.time_to_first_chunk", first_after)
    _say_usage(span, whole.usage)


def tool(spec: RunSpec, call: Call) -> tracing.Span:
    """Return the span of one tool call."""
    if not tracing.recording():
        return tracing.NO_SPAN
    about: dict[str, tracing.Value] = {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": call.name,
        "gen_ai.tool.call.id": call.call_id,
        "gen_ai.tool.type": "function",
        "hermesh.run_id": spec.run_id,
        "hermesh.session_id": spec.session_id,
        "hermesh.tenant_id": spec.tenant_id,
    }
    return tracing.span(f"execute_tool {call.name}", about)


def tool_ended(span: tracing.Span, call: Call) -> None:
    """Say what a tool call came to."""
    span.set("hermesh.state", call.state.value)
    if call.state in (CallState.FAILED, CallState.UNKNOWN):
        span.fail(call.state.value)


def _say_usage(span: tracing.Span, usage: Usage) -> None:
    if usage == Usage():
        return
    span.set("gen_ai.usage.input_tokens", usage.input_tokens)
    span.set("gen_ai.usage.output_tokens", usage.output_tokens)
    if usage.cached_tokens:
        span.set("gen_ai.usage.cache_read.input_tokens", usage.cached_tokens)
