"""Several model backends as one: tries before the first token, and a short memory of which of them fail.

A request goes to the first backend that is not known to fail. Before its first token it may go to the next
one at once, and after a wait around again. After it nothing is sent again here: the reply is broken, the run
says so (`attempt.reset`, or a prefill), and its next request finds the failing backend last in line.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import structlog

from meshkit.probes import Check
from services.agent import metrics
from services.agent.model.errors import (
    ModelError,
    ModelRateLimitedError,
    ModelRejectedError,
    ModelRequestLimitError,
    ModelTimeoutError,
    ModelUnavailableError,
)
from services.agent.model.port import Model, ModelEvent, ModelInfo, ModelRequest

_log = structlog.get_logger("agent.model")

# How long a backend that failed is asked last, seconds: doubled by each failure after that time.
COOL_FIRST = 1.0
COOL_LIMIT = 30.0
# A backend that nobody has used for this long is asked for its models, to know whether it still answers.
SILENT_SECONDS = 60.0
PROBE_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how patiently a request is sent again before its first token.

    Attributes:
        attempts: all tries of one backend together.
        base: seconds before the second try; doubles, with full jitter.
        cap: the most seconds to wait; a Retry-After above it ends the tries.
    """

    attempts: int = 3
    base: float = 0.1
    cap: float = 5.0

    def wait(self, attempt: int, error: ModelError) -> float | None:
        """Return the seconds before the next try, None when there is none.

        Args:
            attempt: the try that failed, from 1.
            error: how it failed.
        """
        passes = isinstance(error, ModelRateLimitedError | ModelUnavailableError) and error.retryable
        if attempt >= self.attempts or not passes:
            return None
        if error.retry_after is not None:
            return error.retry_after if error.retry_after <= self.cap else None
        ceiling = min(self.cap, self.base * 2 ** (attempt - 1))
        return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - jitter, not a secret


@dataclass(slots=True)
class Backend:
    """One backend, and how it was the last time.

    Attributes:
        name: host and port, for people.
        model: its adapter, which sends each request once.
        wrong: the reason of its last failure, "" while it works.
        failures: in a row, each after the time of the one before; a whole reply ends them.
        cools_until: on the pool's clock; until then the others are asked first.
        heard_at: when it last answered or failed.
    """

    name: str
    model: Model
    wrong: str = ""
    failures: int = 0
    cools_until: float = 0.0
    heard_at: float = 0.0


class Backends:
    """A `Model` over one backend or several that serve the same models.

    Args:
        backends: name and adapter of each, the preferred first.
        retry: tries before the first token.
        monotonic: a clock, seconds.
    """

    def __init__(
        self,
        backends: Sequence[tuple[str, Model]],
        *,
        retry: Retry | None = None,
        monotonic: Callable[[], float],
    ) -> None:
        self._monotonic = monotonic
        self._retry = retry or Retry()
        self.backends = [Backend(name, model, heard_at=monotonic()) for name, model in backends]

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Sequence[ModelEvent], None]:
        """See `Model.stream`."""
        asked = self._in_order()
        failed: list[ModelError] = []
        attempt = 0
        while True:
            attempt += 1
            waits: dict[str, float] = {}
            for backend in asked:
                started = False
                try:
                    async with aclosing(backend.model.stream(request)) as batches:
                        async for batch in batches:
                            if not started:
                                started = True
                                self._answers(backend)
                            yield batch
                    backend.failures = 0
                    return
                except ModelRequestLimitError:
                    raise  # nothing was sent
                except ModelError as error:
                    self._fails(backend, error)
                    if isinstance(error, ModelRejectedError):
                        raise  # the request is at fault, and would be anywhere
                    if started:
                        # Another backend may well give what this one could not.
                        error.retryable = error.retryable or self._another(backend)
                        raise
                    failed.append(error)
                    wait = self._retry.wait(attempt, error)
                    if wait is not None:
                        waits[backend.name] = wait
            if not waits:
                raise _blamed(failed)
            asked = [backend for backend in asked if backend.name in waits]
            await asyncio.sleep(min(waits.values()))

    async def list_models(self) -> Sequence[ModelInfo]:
        """List the models of the first backend that answers.

        Raises:
            ModelError: none does.
        """
        failed: list[ModelError] = []
        for backend in self._in_order():
            try:
                return await self._list(backend)
            except ModelError as error:
                failed.append(error)
        raise _blamed(failed)

    # health

    def checks(self) -> list[tuple[str, Check]]:
        """Return the readiness checks by name: `model`, and of several backends each one beside it."""
        if len(self.backends) == 1:
            return [("model", partial(self.problem, self.backends[0]))]
        each = [(f"model/{backend.name}", partial(self.problem, backend)) for backend in self.backends]
        return [("model", self._all_fail), *each]

    async def problem(self, backend: Backend) -> str | None:
        """Return why a backend does not work, None when it does.

        One that failed, and one that was silent for long, is asked: /ready tells how it is now, without a
        question a second to a backend that runs keep busy.
        """
        now = self._monotonic()
        stale = now - backend.heard_at > SILENT_SECONDS
        if stale or (backend.wrong and now >= backend.cools_until):
            try:
                async with asyncio.timeout(PROBE_SECONDS):
                    await self._list(backend)
            except TimeoutError:
                self._fails(backend, ModelTimeoutError("its list of models does not come"))
            except ModelError:
                pass  # noted already
        return f"the model backend fails: {backend.wrong}" if backend.wrong else None

    async def _all_fail(self) -> str | None:
        if all(backend.wrong for backend in self.backends):
            return "no model backend works"
        return None

    def _in_order(self) -> list[Backend]:
        now = self._monotonic()
        return sorted(self.backends, key=lambda one: (bool(one.wrong), max(0.0, one.cools_until - now)))

    def _another(self, than: Backend) -> bool:
        return any(not backend.wrong for backend in self.backends if backend is not than)

    async def _list(self, backend: Backend) -> Sequence[ModelInfo]:
        try:
            models = await backend.model.list_models()
        except ModelError as error:
            self._fails(backend, error)
            raise
        self._answers(backend)
        return models

    def _answers(self, backend: Backend) -> None:
        if backend.wrong:
            _log.info("a model backend answers again", backend=backend.name)
        backend.wrong, backend.cools_until = "", 0.0
        backend.heard_at = self._monotonic()

    def _fails(self, backend: Backend, error: ModelError) -> None:
        backend.heard_at = self._monotonic()
        if isinstance(error, ModelRejectedError):
            return
        metrics.backend_errors.labels(backend.name, error.reason).inc()
        backend.wrong = error.reason
        if backend.heard_at >= backend.cools_until:
            # Requests that fail together, or the tries of one, are one failure.
            backend.failures += 1
        cools = COOL_FIRST * 2 ** min(backend.failures - 1, 10)
        if error.retry_after is not None:
            cools = max(cools, error.retry_after)
        backend.cools_until = backend.heard_at + min(cools, COOL_LIMIT)
        _log.warning(
            "a model backend failed",
            backend=backend.name,
            reason=error.reason,
            detail=str(error),
            failures=backend.failures,
        )


def _blamed(failed: Sequence[ModelError]) -> ModelError:
    """Return the error that says best what to expect: one that passes, before one that stays."""
    last_first = list(reversed(failed))
    for error in last_first:
        if isinstance(error, ModelUnavailableError):
            return error
    return next((error for error in last_first if error.retryable), last_first[0])
