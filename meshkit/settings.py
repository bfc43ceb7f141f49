"""Settings by environment: one frozen class a process, built once in `__main__` and passed down."""

from __future__ import annotations

import os
import socket
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from meshkit.proxies import Proxies
from meshkit.secret_files import SecretFileError, secret

PREFIX = "HERMESH_"


def words(text: str) -> list[str]:
    """Splits a list that is written with commas or spaces."""
    return text.replace(",", " ").split()


def parse_address(text: str) -> tuple[str, int]:
    """Splits `host:port` (`[v6]:port` too).

    Raises:
        ValueError: The text has another form, or the port is not 0 to 65535.
    """
    host, colon, port = text.rpartition(":")
    # A scheme is none of it: gRPC would look for a host of that name, and go on looking.
    if not colon or not host or "/" in host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("must be host:port, for example 127.0.0.1:8080")
    return host.removeprefix("[").removesuffix("]"), int(port)


class EnvironmentSettings(BaseSettings):
    """Settings from the environment, as HERMESH_<NAME>; a secret also from HERMESH_<NAME>_FILE's file."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="ignore", env_ignore_empty=True, hide_input_in_errors=True
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Names the sources, the first before the others."""
        return (init_settings, _SecretFiles(settings_cls), env_settings)


class _SecretFiles(PydanticBaseSettingsSource):
    """The secrets of a class, from variables or files."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Part of the interface; `__call__` reads all fields at once."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """Reads them.

        Raises:
            SettingsError: Some cannot be read; the text has what is wrong with each.
        """
        found: dict[str, Any] = {}
        wrong: list[str] = []
        for name, field in secret_names(self.settings_cls).items():
            try:
                value = secret(os.environ, name)
            except SecretFileError as error:
                wrong.append(str(error))
            else:
                if value:
                    found[field] = value
        if wrong:
            raise SettingsError("; ".join(wrong))
        return found


class MeshSettings(EnvironmentSettings):
    """What every process of the mesh reads from its environment."""

    listen: str = Field(
        "127.0.0.1:0", description="host:port that the process serves on; port 0 picks a free one."
    )
    metrics_listen: str = Field(
        "127.0.0.1:0", description="host:port of /metrics, /health and /ready; port 0 picks a free one."
    )
    ready_file: Path | None = Field(
        None, description="File to which the process writes its addresses as JSON once it serves."
    )
    replica: str = Field(
        "",
        description="Name of this replica in logs, leases and metrics; `<service>-<host>-<pid>` if empty.",
        max_length=64,
        pattern=r"^[A-Za-z0-9._-]*$",
    )
    mesh_address: str = Field(
        "127.0.0.1:50052", description="host:port of Envoy's inner listener, for calls between services."
    )
    mesh_token: SecretStr = Field(
        SecretStr(""),
        description="Secret that the mesh's processes share; calls without it count as from outside.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged."
    )
    log_format: Literal["json", "console"] = Field("json", description="Form of a log line on stderr.")
    drain_seconds: float = Field(
        10.0, ge=0, le=600, description="Longest time in seconds to finish calls after SIGTERM."
    )
    drain_delay_seconds: float = Field(
        2.5,
        ge=0,
        le=60,
        description="Seconds between reporting NOT_SERVING and refusing calls: Envoy's time to notice.",
    )
    trusted_proxies: str = Field(
        "",
        description=(
            "Proxies before Envoy, or before the balancer in its place, whose X-Forwarded-For says which "
            "client a request comes from, for throttling and logs: their addresses and networks, or how many "
            "of them a request passes. Empty: Envoy's own clients are the clients."
        ),
    )
    envoy_status_port: int = Field(
        0,
        ge=0,
        le=65535,
        description=(
            "Port on which each Envoy answers GET /ready, with 503 once it is about to stop: event streams "
            "of clients that came by it are then sent to another one. 0: nobody is asked."
        ),
    )
    arrival_seconds: float = Field(
        20.0, gt=0, le=600, description="Longest time in seconds that a unary request may take to arrive."
    )
    trace_file: Path | None = Field(
        None, description="File to which finished spans are appended as JSON lines."
    )
    trace_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description=(
            "How many of the traces that begin here are recorded, where spans go anywhere at all; a caller's "
            "own decision is kept, and `OTEL_TRACES_SAMPLER` goes before."
        ),
    )
    failpoints: str = Field(
        "",
        description="For tests only: where in the code the process is to crash; see meshkit/failpoints.py.",
    )

    @classmethod
    def service_name(cls) -> str:
        """Returns the service's name: the package that holds the settings class."""
        return _package(cls)

    @property
    def proxies(self) -> Proxies:
        """The proxies before the mesh."""
        return Proxies.parse(words(self.trusted_proxies))

    @model_validator(mode="before")
    @classmethod
    def _name_replica(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("replica"):
            values = {**values, "replica": f"{cls.service_name()}-{socket.gethostname()}-{os.getpid()}"}
        return values

    @field_validator("trusted_proxies")
    @classmethod
    def _check_proxies(cls, value: str) -> str:
        Proxies.parse(words(value))
        return value

    @field_validator("log_level", "log_format", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("listen", "metrics_listen", "mesh_address")
    @classmethod
    def _check_address(cls, value: str) -> str:
        parse_address(value)
        return value


S = TypeVar("S", bound=BaseSettings)


def load(cls: type[S]) -> S:
    """Builds settings from the environment, or ends the process with one clear line.

    The line names the variables and what is wrong with them, never their values.

    Raises:
        SystemExit: With status 1, after the line went to stderr.
    """
    try:
        return cls()
    except ValidationError as error:
        _fail("; ".join(_explain(cls, item) for item in error.errors(include_input=False, include_url=False)))
    except SettingsError as error:
        # Its text names the field and the source; the cause may hold the value.
        _fail(str(error).splitlines()[0])


def _explain(cls: type[BaseSettings], item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    name = env_name(cls, location[0]) if location else "the settings"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "missing":
        message = "is not set"
    return f"{name}: {message}"


def _fail(text: str) -> NoReturn:
    sys.stderr.write(f"hermesh: bad settings: {text}\n")
    raise SystemExit(1)


def env_name(cls: type[BaseSettings], field: str) -> str:
    """Returns the environment variable that sets a field."""
    info = cls.model_fields.get(field)
    if info is not None and isinstance(info.validation_alias, str):
        return info.validation_alias
    return f"{cls.model_config.get('env_prefix') or ''}{field}".upper()


def secret_names(cls: type[BaseSettings]) -> dict[str, str]:
    """Returns the fields of a class that are secrets, by their environment variables."""
    return {
        env_name(cls, field): field for field, info in cls.model_fields.items() if _is_secret(info.annotation)
    }


def settings_table(*classes: type[BaseSettings]) -> str:
    """Renders the settings of some classes as one markdown table.

    Returns:
        Rows `variable | default | used by | meaning`; a variable that several classes share comes once, and
        one that all subclasses of `MeshSettings` have is used by "every process".
    """
    rows: dict[str, tuple[str, str]] = {}
    users: dict[str, list[str]] = {}
    for cls in classes:
        for field, info in cls.model_fields.items():
            name = env_name(cls, field)
            rows.setdefault(name, (_default(field, info), info.description or ""))
            users.setdefault(name, []).append(_package(cls))
    lines = ["| variable | default | used by | meaning |", "|---|---|---|---|"]
    common = {_package(cls) for cls in classes if issubclass(cls, MeshSettings)}
    for name, (default, meaning) in rows.items():
        owners = list(dict.fromkeys(users[name]))
        used_by = "every process" if len(common) > 1 and common == set(owners) else ", ".join(owners)
        lines.append(f"| `{name}` | {default} | {used_by} | {_cell(meaning).replace('<', '&lt;')} |")
    return "\n".join(lines) + "\n"


def _package(cls: type[BaseSettings]) -> str:
    parts = cls.__module__.split(".")
    return parts[-2] if len(parts) > 1 else parts[0].strip("_") or "hermesh"


def _default(field: str, info: FieldInfo) -> str:
    if field == "replica":
        return "`<service>-<host>-<pid>`"
    value = info.default
    if info.default_factory is not None:
        return "computed"
    if value is PydanticUndefined:
        return "required"
    if _is_secret(info.annotation) or value is None or value == "":
        return "none"
    return f"`{_cell(str(value))}`"


def _is_secret(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_is_secret(part) for part in typing.get_args(annotation))
    return isinstance(annotation, type) and issubclass(annotation, SecretStr)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
