"""Which models there are, and which one a run gets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from meshkit.errors import HermeshError, NotFoundError, UnavailableError
from services.agent.model.errors import ModelError
from services.agent.model.port import Model, ModelInfo

_log = structlog.get_logger("agent.models")

REFRESH_SECONDS = 60.0
RETRY_SECONDS = 2.0


class ModelCatalog:
    """The backend's list of models, cached.

    Args:
        model: the backend.
        default: the default model's name; "" = the first of the list.
        monotonic: a clock, seconds.
    """

    def __init__(self, model: Model, default: str, monotonic: Callable[[], float]) -> None:
        self._model = model
        self._default = default
        self._monotonic = monotonic
        self._models: Sequence[ModelInfo] | None = None
        self._loading = asyncio.Lock()
        self._asked_at = float("-inf")

    async def models(self) -> Sequence[ModelInfo]:
        """Return the models, the default first.

        Raises:
            UnavailableError: none is known and the backend cannot be asked.
        """
        known = self._models
        if known is None:
            async with self._loading:
                known = self._models if self._models is not None else await self._load()
        default = [one for one in known if one.name == self._default]
        if not default and self._default:
            default = [ModelInfo(self._default)]
        return [*default, *(one for one in known if one.name != self._default)]

    async def resolve(self, name: str) -> str:
        """Return the backend's name of a model, "" = the default.

        A name that is not in the list is looked for once more in a fresh one.

        Raises:
            NotFoundError: there is no such model.
            UnavailableError: the list is needed and the backend cannot be asked.
        """
        if self._default and name in ("", self._default):
            return self._default
        models = await self.models()
        if not name:
            if not models:
                raise NotFoundError("MODEL_NOT_FOUND", "the model backend lists no model")
            return models[0].name
        if any(one.name == name for one in models):
            return name
        if self._monotonic() - self._asked_at > RETRY_SECONDS:
            async with self._loading:
                if any(one.name == name for one in await self._load()):
                    return name
        raise NotFoundError("MODEL_NOT_FOUND", f"there is no model named {name[:100]!r}")

    async def keep_fresh(self) -> None:
        """Renew the list until cancelled; while the backend is away the old one stays."""
        while True:
            try:
                async with self._loading:
                    await self._load()
            except HermeshError as error:
                _log.debug("the list of models was not renewed", reason=error.reason)
            await asyncio.sleep(REFRESH_SECONDS if self._models is not None else RETRY_SECONDS)

    async def _load(self) -> Sequence[ModelInfo]:
        self._asked_at = self._monotonic()
        try:
            self._models = await self._model.list_models()
        except ModelError as error:
            _log.warning("the model backend did not list its models", reason=error.reason, detail=str(error))
            raise UnavailableError(error.reason, str(error), retry_after_ms=2000) from error
        return self._models
