"""Carries out one run: asks the loop what to do, does it, writes it down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import structlog

from hermesh.session.v1.resources_pb2 import (
    EFFECT_CLASS_IDEMPOTENT,
    EFFECT_CLASS_NON_IDEMPOTENT,
    EFFECT_CLASS_PURE,
)
from meshkit import failpoints, tracing
from meshkit.errors import HermeshError
from services.agent import metrics
from services.agent.clients.tools import CallPlace, ToolInfo, allowed
from services.agent.domain import loop
from services.agent.domain.loop import (
    AskApproval,
    AwaitAction,
    Call,
    CallModel,
    CallState,
    CallTools,
    Fail,
    FindOut,
    Finish,
    LoopState,
    Partial,
    ReportCalls,
    Turn,
)
from services.agent.domain.prompt import Background, RunSpec, build_prompt, estimated_usage
from services.agent.domain.turn import TurnBuilder
from services.agent.model.errors import ModelError, ModelRequestLimitError
from services.agent.model.port import ChatMessage, ToolOffer, Usage
from services.agent.runs import spans
from services.agent.runs.journal import RunJournal
from services.agent.runs.ports import World
from services.agent.runs.start import Start
from services.agent.runs.turn_limit import turn_limit
from services.agent.runs.writer import RunWriter, WriterStopped

_log = structlog.get_logger("agent.run")

# How long a run's last events may wait for the store before the run is left to a takeover.
LAST_WRITE_SECONDS = 30.0
RELEASE_SECONDS = 1.0
# The longest that a tool may take; of one that is not listed now no more is known.
UNLISTED_SECONDS = 3600.0
# How a run ends here that could not write its end: by an error of ours, or refused by the store.
UNWRITTEN, REFUSED = "unwritten", "refused"
_BROKE_OFF = "model_stream_broke"
_TAKEN_OVER = "taken_over"

_first_token = failpoints.point("agent.model.first_token")
_turn_done = failpoints.point("agent.model.turn_done")
_last_write = failpoints.point("agent.run.last_write")


class Runner:
    """One run on this replica, from its claim to its end here.

    `run` returns how it ended here: "completed", "failed", "cancelled", "requires_action", "lost" (another
    replica owns it), "released" (this one gives it up, to drain), UNWRITTEN or REFUSED (it could not write
    its end, and somebody else has to).

    Args:
        start: the claimed run.
        writer: its writer, already served by the append stream.
        world: everything it uses.
    """

    def __init__(self, start: Start, writer: RunWriter, world: World) -> None:
        self.spec: RunSpec = start.spec
        self._start = start
        self._writer = writer
        self._world = world
        self._journal = RunJournal(writer)
        writer.written = start.written
        self._interrupt = ""
        self._ending = False
        self._work: asyncio.Task[str] | None = None
        self._began = world.monotonic()
        self._deadline = self._began + start.spec.timeout
        self._ttft_ms = 0
        self._usage = Usage()
        self._turn_text = ""
        self._turns = 0
        self._requests = 0
        self._requests_limit = 0
        self._again = False
        self._tools: Mapping[str, ToolInfo] = {}
        self._running_calls: dict[str, CallPlace] = {}
        # When this process first knew that a call may have been begun.
        self._known_since: dict[str, float] = {}
        self.reply = ""
        writer.on_stopped = self._writer_stopped

    # the supervisor's side

    def cancel(self) -> None:
        """Somebody asked to cancel: the model and the tools are told at once."""
        self._stop("cancelled")

    def release(self) -> None:
        """Give the run up where it stands; another replica goes on."""
        self._stop("released")

    def _writer_stopped(self, stopped: WriterStopped) -> None:
        self._stop(stopped.kind)

    def _stop(self, kind: str) -> None:
        # A lost lease ends everything; nothing else ends a run that is writing its last events.
        if kind not in ("lost", "rejected") and (self._ending or self._interrupt):
            return
        self._interrupt = kind
        if self._work is not None:
            self._work.cancel()

    def exchange(self) -> str:
        """What to remember of a completed run: what was said and what was answered; "" for nothing."""
        said, reply = self._start.said.strip(), self.reply.strip()
        return f"User: {said}\nAssistant: {reply}" if said and reply else ""

    async def run(self) -> str:
        """Work until the run ends here; see the class."""
        with spans.run(self.spec, self._start.traceparent, self._world.replica) as span:
            outcome = await self._run()
            spans.run_ended(span, outcome, self._usage)
        return outcome

    async def _run(self) -> str:
        outcome = "failed"
        async with asyncio.TaskGroup() as group:
            self._work = group.create_task(self._guarded(), name=f"work-{self.spec.run_id}")
            if self._interrupt:
                self._work.cancel()
        if not self._work.cancelled():
            outcome = self._work.result()
        if self._interrupt:
            outcome = await self._interrupted(self._interrupt)
        metrics.runs_ended.labels(outcome).inc()
        _log.info(
            "run ended here",
            run_id=self.spec.run_id,
            outcome=outcome,
            attempt=self.spec.attempt,
            seconds=round(self._world.monotonic() - self._began, 3),
            ttft_ms=self._ttft_ms,
            output_tokens=self._usage.output_tokens,
        )
        return outcome

    async def _guarded(self) -> str:
        try:
            try:
                return await self._loop()
            except WriterStopped:
                raise
            except Exception:
                _log.exception("a run failed by a bug", run_id=self.spec.run_id)
                return await self._fail(Fail("INTERNAL", "INTERNAL", "an internal error ended the run"))
        except WriterStopped as stopped:
            self._interrupt = stopped.kind
            return stopped.kind
        except Exception:
            _log.exception("a run could not write its end", run_id=self.spec.run_id)
            return UNWRITTEN

    async def _interrupted(self, kind: str) -> str:
        """End the run for a reason that came from outside of the loop."""
        if kind == "lost":
            return kind
        try:
            if kind == "cancelled":
                await self._cancel_calls()
                reason = await self._world.reasons.cancel_reason(self.spec.run_id, self.spec.tenant_id)
                self._journal.cancelled(self._turn_text, reason or "requested", self._usage, self._ttft_ms)
            elif kind == "rejected":
                _log.error("the store refused a write", run_id=self.spec.run_id)
                self._writer.discard()
                failure = Fail("INTERNAL", "INTERNAL", "the run's events were refused by the store")
                self._journal.failed(failure, self._usage, self._ttft_ms)
                kind = "failed"
            async with asyncio.timeout(RELEASE_SECONDS if kind == "released" else LAST_WRITE_SECONDS):
                await self._writer.flush()
        except WriterStopped as stopped:
            return REFUSED if stopped.kind == "rejected" else stopped.kind
        except TimeoutError:
            return "released"
        except Exception:
            _log.exception("a run could not write its end", run_id=self.spec.run_id)
            return UNWRITTEN
        return kind

    def _begin_end(self) -> None:
        """From here on nothing but a lost lease keeps the run from ending as it is about to."""
        if self._interrupt:
            raise asyncio.CancelledError
        self._ending = True

    # the loop

    async def _loop(self) -> str:
        start, world = self._start, self._world
        self._journal.started(self.spec.attempt, world.replica)
        failure = await self._prepare()
        if failure is not None:
            return await self._fail(failure)
        # A tool that is not listed now, as all are while no tool service answers, is asked all the same.
        start = await self._whole(start)
        state = start.restore({name for name, info in self._tools.items() if not info.reconciles})
        if state.step:
            metrics.takeovers.inc()
        self._requests = state.requests
        limits = world.limits(self.spec)
        background: Background | None = None
        while True:
            decision = loop.decide(
                state,
                limits,
                seconds_left=self._deadline - world.monotonic(),
                can_prefill=world.can_prefill and not self._constrained(state),
                written=self._writer.written,
            )
            if world.draining() and isinstance(decision, CallModel | CallTools | FindOut):
                self._interrupt = "released"
                return "released"
            match decision:
                case CallModel():
                    self._begin_turn(decision, state)
                    if background is None:
                        background = await self._background(state)
                    outcome = await self._model_turn(loop.turn_begun(state, decision), decision, background)
                    if isinstance(outcome, Fail):
                        return await self._fail(outcome)
                    state = outcome
                case CallTools():
                    state = loop.calls_done(state, await self._call_tools(decision))
                case AskApproval():
                    self._journal.asks(decision.calls)
                    state = loop.calls_asked(state, decision.calls)
                case FindOut():
                    state = loop.calls_done(state, await self._find_out(decision))
                case ReportCalls():
                    for call in decision.calls:
                        if not call.reported:
                            self._journal.result(call)
                    self._journal.carry(loop.tool_messages(decision.calls))
                    state = loop.calls_reported(state)
                case AwaitAction():
                    self._begin_end()
                    self._journal.requires_action(decision.calls)
                    await self._last_write()
                    return "requires_action"
                case Finish():
                    return await self._finish(state, decision)
                case Fail():
                    return await self._fail(decision)

    async def _prepare(self) -> Fail | None:
        """Learn the model's name and the tools."""
        try:
            name = await self._world.catalog.resolve(self.spec.model)
        except HermeshError as error:
            wait = error.retry_after_ms
            return Fail(error.code.name, error.reason, error.message, wait is not None, wait or 0)
        self.spec = replace(self.spec, model=name)
        if self._world.tool_mode == "none" or (
            self.spec.tool_choice == "none" and not self._start.journalled
        ):
            return None
        try:
            tools = await self._world.tools.tools()
        except HermeshError as error:
            self._degraded("tools", error)
            return None
        self._tools = allowed(tools, self.spec.tools)
        wanted = [*self.spec.tools]
        if self.spec.tool_choice not in ("", "auto", "none", "required"):
            wanted.append(self.spec.tool_choice)
        for name in wanted:
            if name not in self._tools:
                return Fail("NOT_FOUND", "TOOL_NOT_FOUND", f"there is no tool named {name[:100]!r}")
        return None

    async def _whole(self, start: Start) -> Start:
        """Read what the claim's answer had no room for.

        Raises:
            WriterStopped: the run is another replica's, or it cannot be read here now.
        """
        if start.more is None:
            return start
        began = self._world.monotonic()
        try:
            pages = await self._world.contexts.rest(self.spec.run_id, lambda: self._writer.fence, start.more)
        except HermeshError as error:
            lost = error.reason == "FENCE_STALE"
            raise WriterStopped("lost" if lost else "released", "its context cannot be read") from error
        seconds = round(self._world.monotonic() - began, 3)
        _log.info("context read", run_id=self.spec.run_id, pages=len(pages), seconds=seconds)
        self._start = start.whole(pages)
        return self._start

    def _constrained(self, state: LoopState) -> bool:
        choice = self.spec.tool_choice
        return self._world.tool_mode == "json" and state.turns == 0 and choice not in ("", "auto", "none")

    # the model

    def _begin_turn(self, decision: CallModel, state: LoopState) -> None:
        if decision.resume == "fresh":
            self._journal.step(decision.step, self._requests + 1, self.spec.attempt)
        elif decision.resume == "reset":
            reason = _BROKE_OFF if state.breaks else _TAKEN_OVER
            self._journal.reset(decision.from_seq, reason, self._requests + 1, self.spec.attempt)
        # Finished turns have used one each, and so may this one.
        self._requests_limit = state.turns + 1 + self._world.limits(self.spec).spare_requests
        self._again = decision.resume != "fresh"

    def _asking(self) -> None:
        """Count a request that is about to go to a model backend.

        Raises:
            ModelRequestLimitError: it would be one too many.
        """
        if self._requests >= self._requests_limit:
            text = f"the run has made {self._requests} requests to its model, and may make no more"
            raise ModelRequestLimitError(text)
        self._requests += 1
        metrics.model_requests.labels("again" if self._again else "first").inc()
        self._again = True

    async def _background(self, state: LoopState) -> Background:
        """Ask the memory service what it knows; a run starts without it rather than wait."""
        if not self.spec.memory:
            return Background()
        query = self._start.said
        known = await self._world.memory.known(self.spec, query, self._world.memory_timeout)
        for part, error in known.missing.items():
            self._degraded(part, error)
        found = known.recalled
        if found:
            self._journal.recalled(found)
        # What this session said itself stands in the conversation already, unless that was cut.
        texts = [one.text for one in found if self._start.omitted or one.source != self.spec.session_id]
        return Background(known.preferences, texts)

    def _degraded(self, part: str, error: HermeshError) -> None:
        """Say that the run goes on without something."""
        metrics.degraded_contexts.labels(part).inc()
        self._journal.degraded(part, error.message)

    async def _model_turn(
        self, state: LoopState, decision: CallModel, background: Background
    ) -> LoopState | Fail:
        with spans.turn(self.spec, decision) as span:
            return await self._turn(state, decision, background, span)

    async def _turn(
        self, state: LoopState, decision: CallModel, background: Background, span: tracing.Span
    ) -> LoopState | Fail:
        world = self._world
        began = world.monotonic()
        prompt = build_prompt(
            self.spec,
            state.messages,
            background,
            [info.offer for info in self._tools.values()],
            mode=world.tool_mode,
            first_turn=state.turns == 0,
            prefix=decision.prefix,
            max_tokens=decision.max_tokens,
            context_tokens=world.context_tokens,
        )
        request = replace(prompt.request, asking=self._asking)
        builder = TurnBuilder(self.spec.run_id, decision.step, decision.prefix, prompt.constrained)
        self._turn_text = decision.prefix
        first_seq = decision.from_seq if decision.resume == "prefill" else 0
        pieces = [decision.prefix] if decision.prefix else []
        first_at: float | None = None
        writer = self._writer
        try:
            async with (
                asyncio.timeout_at(self._deadline),
                turn_limit(self.spec.turn_timeout),
                aclosing(world.model.stream(request)) as batches,
            ):
                async for batch in batches:
                    text, reasoning = builder.add(batch)
                    if reasoning:
                        seq = writer.text("reasoning.delta", reasoning)
                        first_seq = first_seq or seq
                    if text:
                        seq = writer.text("text.delta", text)
                        first_seq = first_seq or seq
                        pieces.append(text)
                    if not self._ttft_ms and (text or reasoning):
                        self._first_token()
                    if first_at is None:
                        first_at = world.monotonic()
                    if builder.full:
                        break
                    if writer.full:
                        await writer.room()
            turn = builder.build()
            if builder.full and turn.usage == Usage():
                turn = replace(turn, usage=estimated_usage(prompt.request, turn))
        except ModelError as error:
            span.fail(error.reason)
            metrics.model_errors.labels(error.reason).inc()
            _log.warning("model turn failed", run_id=self.spec.run_id, reason=error.reason, detail=str(error))
            wait = round(error.retry_after * 1000) if error.retry_after is not None else 0
            failure = Fail(error.code, error.reason, str(error), error.retryable, wait)
            partial = Partial("".join(pieces), first_seq) if first_seq else None
            return loop.turn_broken(state, partial, failure, world.limits(self.spec))
        except TimeoutError:
            span.fail("RUN_TIMEOUT")
            return state  # the run's time limit: the next decision says so
        finally:
            self._turn_text = "".join(pieces)
        spans.turn_ended(span, turn, first_at - began if first_at is not None else None)
        self._usage = self._usage + turn.usage
        self._turns += 1
        _turn_done()
        return self._end_turn(state, turn)

    def _first_token(self) -> None:
        seconds = self._world.monotonic() - self._began
        self._ttft_ms = max(1, round(seconds * 1000))
        metrics.first_token.observe(seconds)
        _first_token()

    def _end_turn(self, state: LoopState, turn: Turn) -> LoopState:
        if not turn.calls:
            return loop.turn_done(state, turn)
        calls = tuple(self._resolve(call) for call in turn.calls)
        turn = replace(turn, calls=calls)
        effects = {
            call.call_id: self._tools[call.name].effect for call in calls if call.state is CallState.INTENT
        }
        self._journal.called(turn, effects)
        self._turn_text = ""
        return loop.turn_done(state, turn)

    def _resolve(self, call: Call) -> Call:
        if call.state is not CallState.INTENT:
            return call
        info = self._tools.get(call.name)
        if info is None:
            known = ", ".join(sorted(self._tools)) or "none"
            content = f"There is no tool named {call.name!r}. The tools are: {known}."
            return replace(call, state=CallState.FAILED, content=content)
        needs_approval = info.requires_approval or call.name in self._start.approval
        return replace(call, needs_approval=needs_approval, reconcilable=info.reconciles)

    # tools

    async def _call_tools(self, decision: CallTools) -> list[Call]:
        """Run calls side by side; at the run's time limit those that are not done stay as they are."""
        with tracing.span("await commit"):
            await self._writer.flush()  # nothing acts before its intent is stored
        done: list[Call] = []
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._side_by_side(decision.calls, lambda call: self._call_tool(call, done))
        except TimeoutError:
            # Those that may have acted are not passed over: the journal knows whether they did.
            cut_off = [
                replace(call, state=CallState.UNKNOWN, looks=loop.MAX_LOOKS)
                for call in decision.calls
                if call.call_id in self._running_calls
                and self._info(call).effect not in (EFFECT_CLASS_PURE, EFFECT_CLASS_IDEMPOTENT)
            ]
            await self._cancel_calls()
            done += cut_off
        return done

    async def _find_out(self, decision: FindOut) -> list[Call]:
        """Have tools look up what became of calls, side by side; until the run's time limit."""
        found: list[Call] = []
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._side_by_side(decision.calls, lambda call: self._look(call, found))
        except TimeoutError:
            pass  # the next decision leaves them to a person
        return found

    async def _side_by_side(
        self, calls: Sequence[Call], work: Callable[[Call], Coroutine[Any, Any, None]]
    ) -> None:
        # Raised after `except*`: before Python 3.11.4 what is raised within it comes out as a group.
        failed: list[BaseException] = []
        try:
            async with asyncio.TaskGroup() as group:
                for call in calls:
                    group.create_task(work(call), name=f"tool-{call.call_id}")
        except* WriterStopped as stopped:
            failed.extend(stopped.exceptions)
        if failed:
            raise failed[0]

    def _info(self, call: Call) -> ToolInfo:
        """Return a call's tool; one that is not listed now was when the call was made, by another replica."""
        return self._tools.get(call.name) or ToolInfo(
            ToolOffer(call.name, "", {}),
            EFFECT_CLASS_NON_IDEMPOTENT,
            UNLISTED_SECONDS,
            requires_approval=False,
        )

    async def _call_tool(self, call: Call, done: list[Call]) -> None:
        place = self._running_calls[call.call_id] = CallPlace()
        self._known_since[call.call_id] = self._world.monotonic()
        with spans.tool(self.spec, call) as span:
            result = await self._world.tools.execute(
                self.spec,
                call,
                self._info(call),
                lambda: self._writer.fence,
                lambda text: self._progress(call, text),
                lambda: self._deadline - self._world.monotonic(),
                place,
            )
            spans.tool_ended(span, result)
        del self._running_calls[call.call_id]
        metrics.tool_calls.labels(result.state.value).inc()
        if result.waits and result.state is CallState.INTENT:
            done.append(result)  # it turned out to need approval
            return
        self._journal.result(result)
        done.append(replace(result, reported=result.state.settled))

    def _progress(self, call: Call, text: str) -> None:
        # A sign of life: while much waits to be stored, one less is no loss.
        if not self._writer.full:
            self._journal.progress(call.call_id, text)

    async def _look(self, call: Call, found: list[Call]) -> None:
        self._journal.progress(call.call_id, "looking up whether it took effect")
        known_since = self._known_since.setdefault(call.call_id, self._world.monotonic())
        result = await self._world.tools.reconcile(self.spec, call, known_since)
        self._journal.reconciled(result)
        if result.state.settled:
            self._journal.result(result)
        found.append(replace(result, reported=result.state.settled))

    async def _cancel_calls(self) -> None:
        calls, self._running_calls = self._running_calls, {}
        if not calls:
            return
        async with asyncio.TaskGroup() as group:
            for call_id, place in calls.items():
                group.create_task(self._world.tools.cancel(call_id, self.spec.tenant_id, place))

    # the end

    async def _finish(self, state: LoopState, decision: Finish) -> str:
        self._begin_end()
        reply = state.messages[-1] if state.messages else ChatMessage("assistant", "")
        self.reply = reply.content if reply.role == "assistant" else ""
        # A takeover may find the reply stored and only the run's end missing.
        new = self._turns and reply.role == "assistant"
        self._journal.completed(
            self.reply if new else None,
            decision.finish_reason,
            self._usage,
            self._ttft_ms,
        )
        await self._last_write()
        return "completed"

    async def _fail(self, failure: Fail) -> str:
        self._begin_end()
        self._journal.failed(failure, self._usage, self._ttft_ms)
        await self._last_write()
        return "failed"

    async def _last_write(self) -> None:
        """Wait for the run's last events to be stored, so long that only a takeover can help after it."""
        _last_write()
        try:
            async with asyncio.timeout(LAST_WRITE_SECONDS):
                with tracing.span("await commit"):
                    await self._writer.flush()
        except TimeoutError:
            raise WriterStopped("lost", "the store did not take the run's last events") from None
