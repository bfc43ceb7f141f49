"""What has to run: every process of a mesh, its command, and the environment that it may see."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launcher import envoy, model, probes
from launcher.embedded.postgres import Postgres
from launcher.embedded.valkey import Valkey
from launcher.errors import LaunchError
from launcher.folder import Folder, write_private
from launcher.model_pool import ModelPool
from launcher.settings import CHECKOUT, LauncherSettings
from meshkit.s3 import S3_VARIABLES, place
from meshkit.secret_files import secret
from meshkit.settings import words
from meshkit.variables import secret_files

SERVICES = ("session", "memory", "tool", "agent", "gateway")
PARTS = ("postgresql", "valkey", "model", "envoy")
# In which order processes end: what others need outlives them.
STAGES: tuple[tuple[str, ...], ...] = (SERVICES, ("envoy", "model", "valkey"), ("postgresql",))
DEFAULT_REPLICAS = {"gateway": 1, "agent": 2, "session": 2, "tool": 1, "memory": 1}
MAX_REPLICAS = 64

# What only some processes may see; everything else named HERMESH_* is passed on as it is.
_DATABASE_WAYS = ("HERMESH_DATABASE_DIRECT_URL", "HERMESH_DATABASE_STANDBY_URL")
_GUARDED = {
    "HERMESH_DATABASE_URL",
    *_DATABASE_WAYS,
    "HERMESH_REDIS_URL",
    "HERMESH_OBJECT_STORE_URL",
    "HERMESH_LLM_API_KEY",
    "HERMESH_API_KEY",
    "HERMESH_MESH_TOKEN",
    "HERMESH_DATA_DIR",
}


@dataclass(frozen=True, slots=True)
class Spec:
    """One process to keep running.

    Attributes:
        service: what it is: one of SERVICES or PARTS.
        replica: its name.
        command: what to run.
        environment: what it sees.
        ready_file: where it says that it serves; None when `probe` tells.
        probe: asks whether it serves.
        address: where it serves, where that is known beforehand.
        trouble: asks why it is not all well with one that serves; empty for nothing.
        prepare: done right before each start.
        explain: finds in the end of its log what starting it again cannot mend; empty for nothing.
    """

    service: str
    replica: str
    command: list[str]
    environment: Mapping[str, str]
    ready_file: Path | None = None
    probe: Callable[[], Awaitable[bool]] | None = None
    address: str = ""
    trouble: Callable[[], Awaitable[str]] | None = None
    prepare: Callable[[], None] | None = None
    explain: Callable[[str], str] | None = None

    @property
    def number(self) -> int:
        """Which of its service's replicas it is, from 1."""
        return int(self.replica.rpartition("-")[2])


def fingerprint() -> str:
    """Changes when a setting does that a running mesh would not notice."""
    # Neither how the folder is named nor a variable without a value makes another mesh.
    passed = sorted(
        f"{name}={value}"
        for name, value in os.environ.items()
        if value and name.startswith("HERMESH_") and name != "HERMESH_DATA_DIR"
    )
    # Another password in the same file does.
    passed += [
        secret(os.environ, name) for file, name in sorted(secret_files().items()) if os.environ.get(file)
    ]
    return hashlib.sha256("\0".join(passed).encode()).hexdigest()[:16]


def parse_replicas(text: str) -> dict[str, int]:
    """Reads `agent=3,session=2`. Raises LaunchError that says how it should look."""
    wanted: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch(r"(\w+)=(\d+)", item)
        if found is None or found[1] not in SERVICES or int(found[2]) > MAX_REPLICAS:
            raise LaunchError(
                f"'{item}' is not SERVICE=NUMBER with one of {', '.join(sorted(SERVICES))} "
                f"and a number up to {MAX_REPLICAS}, such as agent=3"
            )
        wanted[found[1]] = int(found[2])
    return wanted


class Plan:
    """The processes of one mesh, from the settings and the data folder.

    Args:
        settings: What the person asked for.
        folder: Where everything is kept.
        ports: The ports that must stay the same: `mesh` and `model`.

    Attributes:
        envoy_number: which Envoy takes new connections; another one once it has been replaced.
    """

    def __init__(self, settings: LauncherSettings, folder: Folder, ports: Mapping[str, int]) -> None:
        self.settings = settings
        self.folder = folder
        self.ports = ports
        self.mesh_token = folder.secret("mesh-token")
        self.api_key = settings.api_key.get_secret_value() or folder.secret("api-key", "hm_")
        self.postgres: Postgres | None = None
        self.valkey: Valkey | None = None
        if not settings.database_url.get_secret_value():
            password = folder.secret("postgresql-password")
            self.postgres = Postgres.in_folder(folder.postgres, folder.sockets, password, settings.archive)
        if not settings.redis_url.get_secret_value():
            password = folder.secret("valkey-password")
            self.valkey = Valkey(folder.sockets, folder.root / "valkey.conf", password)
        self.embedded_model, self.envoy_number = not settings.llm_base_url, 1
        self.pool = ModelPool.of(words(settings.llm_base_url), settings.model_balance, ports.get("model", 0))

    @property
    def database_url(self) -> str:
        """Where PostgreSQL is."""
        return self.postgres.url() if self.postgres else self.settings.database_url.get_secret_value()

    @property
    def redis_url(self) -> str:
        """Where Valkey or Redis is."""
        return self.valkey.url if self.valkey else self.settings.redis_url.get_secret_value()

    @property
    def object_store_url(self) -> str:
        """Where large tool results go."""
        return self.settings.object_store_url or self.folder.objects.as_uri()

    @property
    def llm_base_url(self) -> str:
        """Where the model API is."""
        return (
            f"http://127.0.0.1:{self.ports['model']}/v1"
            if self.embedded_model
            else self.settings.llm_base_url
        )

    @property
    def llm_api_key(self) -> str:
        """The model API's key."""
        if self.embedded_model:
            return self.folder.secret("model-key")
        return self.settings.llm_api_key.get_secret_value()

    @property
    def admin(self) -> envoy.Admin:
        """The admin interface of the Envoy that takes new connections."""
        return self.admin_of(self.envoy_number)

    def admin_of(self, number: int) -> envoy.Admin:
        """The admin interface of one Envoy."""
        return envoy.Admin(self.folder.sockets / f"envoy{_suffix(number)}.sock")

    def parts(self) -> list[Spec]:
        """The embedded parts and Envoy."""
        specs = []
        if self.postgres:
            url = self.postgres.url()
            specs.append(
                Spec(
                    "postgresql",
                    "postgresql-1",
                    self.postgres.command(),
                    _base_environment(),
                    probe=lambda: probes.postgres(url),
                    address=f"unix:{self.postgres.socket}",
                    trouble=self.postgres.archive_trouble,
                    prepare=self.postgres.prepare,
                    explain=self.postgres.explain,
                )
            )
        if self.valkey:
            valkey = self.valkey
            specs.append(
                Spec(
                    "valkey",
                    "valkey-1",
                    valkey.command(),
                    _base_environment(),
                    probe=lambda: probes.valkey(valkey.url),
                    address=f"unix:{valkey.socket}",
                )
            )
        if self.embedded_model:
            ready = self.folder.ready / "model-1.json"
            specs.append(
                Spec(
                    "model",
                    "model-1",
                    [
                        *(sys.executable, "-m", "launcher.model", "--ready-file", str(ready)),
                        *("--port", str(self.ports["model"])),
                    ],
                    _base_environment() | {"HERMESH_LLM_API_KEY": self.llm_api_key},
                    probe=lambda: probes.model(self.llm_base_url, self.llm_api_key),
                    address=f"127.0.0.1:{self.ports['model']}",
                )
            )
        specs.append(self.envoy_spec(self.envoy_number))
        return specs

    def envoy_spec(self, number: int) -> Spec:
        """One Envoy. Two listen on the same ports while one takes the other's place."""
        config = self.folder.envoy / f"envoy{_suffix(number)}.yaml"
        return Spec(
            "envoy",
            f"envoy-{number}",
            envoy.command(config),
            _base_environment(),
            probe=self.admin_of(number).answers,
            address=f"127.0.0.1:{self.settings.http_port}",
            prepare=lambda: self._write_envoy(config, self.admin_of(number)),
        )

    def _write_envoy(self, config: Path, admin: envoy.Admin) -> None:
        eds = self.folder.envoy / "eds"
        for name in envoy.CLUSTERS:
            if not (eds / f"{name}.yaml").exists():
                envoy.write_endpoints(eds, name, ())
        write_private(
            config,
            envoy.render_local(
                eds=eds,
                admin_socket=admin.socket,
                http_port=self.settings.http_port,
                grpc_port=self.settings.grpc_port,
                mesh_port=self.ports["mesh"],
                metrics_port=self.settings.envoy_metrics_port,
                agent_policy=self.settings.agent_lb,
                max_connections=envoy.connections(
                    self.settings.edge_max_connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                ),
                max_heap_mib=self.settings.edge_max_heap_mib,
                pool=(self.pool.listener(), self.pool.cluster()) if self.pool else ("", ""),
            ),
        )
        admin.socket.unlink(missing_ok=True)

    def external(self) -> list[tuple[str, str, Callable[[], Awaitable[str]]]]:
        """The parts that a URL names: service, address without credentials, and what says what is wrong.

        There may be several rows of the model: its backends, of which one is enough.
        """
        rows: list[tuple[str, str, Callable[[], Awaitable[str]]]] = []
        if not self.postgres:
            url = self.database_url
            rows.append(("postgresql", _place(url), lambda: probes.postgres_problem(url)))
        if not self.valkey:
            redis_url = self.redis_url
            rows.append(("valkey", _place(redis_url), lambda: probes.valkey_problem(redis_url)))
        if not self.embedded_model:
            key = self.llm_api_key
            for base_url in words(self.llm_base_url):
                rows.append(("model", _place(base_url), partial(probes.model_problem, base_url, key)))
        objects = self.object_store_url
        if objects.startswith("s3:"):
            rows.append(("objects", place(objects), partial(probes.objects_problem, objects)))
        return rows

    def service(self, service: str, number: int) -> Spec:
        """One replica of a service."""
        replica = f"{service}-{number}"
        ready = self.folder.ready / f"{replica}.json"
        module = "gateway" if service == "gateway" else f"services.{service}"
        environment = self._service_environment(service) | {
            "HERMESH_REPLICA": replica,
            "HERMESH_READY_FILE": str(ready),
            "HERMESH_LISTEN": f"127.0.0.1:{self._port(service, number)}",
            "HERMESH_METRICS_LISTEN": "127.0.0.1:0",
        }
        return Spec(
            service,
            replica,
            [sys.executable, "-m", module],
            environment,
            ready_file=ready,
            prepare=lambda: ready.unlink(missing_ok=True),
            explain=_taken_port if service == "gateway" and self.settings.gateway_port else None,
        )

    def _port(self, service: str, number: int) -> int:
        """Where a replica listens, 0 for any free port: only balancers of others have to know it."""
        first = self.settings.gateway_port
        return first + number - 1 if service == "gateway" and first else 0

    def schema_fingerprint(self) -> str:
        """Changes when the database has to be prepared again."""
        digest = hashlib.sha256(self.api_key.encode())
        for file in sorted((CHECKOUT / "services").glob("*/store/migrations/*.sql")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()

    @property
    def drain_seconds(self) -> float:
        """How long a service may take to end: its own drain and a little."""
        return sum(map(_seconds, (("HERMESH_DRAIN_SECONDS", 10.0), ("HERMESH_DRAIN_DELAY_SECONDS", 2.5)))) + 3

    def setup_commands(self, *, rollout: bool = False) -> list[tuple[str, list[str], dict[str, str]]]:
        """What is run before services start, or only what former ones survive: name, command, environment."""
        session = self._service_environment("session") | {"HERMESH_API_KEY": self.api_key}
        memory = self._service_environment("memory")
        python, migrate = sys.executable, ["migrate", *(["--pre"] if rollout else [])]
        bootstrap = [python, "-m", "services.session", "bootstrap", "--api-key-env", "HERMESH_API_KEY"]
        return [
            ("the session service's migrations", [python, "-m", "services.session", *migrate], session),
            ("the memory service's migrations", [python, "-m", "services.memory", *migrate], memory),
            ("the first tenant and its key", bootstrap, session),
        ]

    def _service_environment(self, service: str) -> dict[str, str]:
        environment = _base_environment() | {
            "HERMESH_MESH_ADDRESS": self.settings.mesh_address or f"127.0.0.1:{self.ports['mesh']}",
            "HERMESH_MESH_TOKEN": self.mesh_token,
        }
        if service in ("session", "memory"):
            environment["HERMESH_DATABASE_URL"] = self.database_url
            # They belong to a database that a URL names, too.
            if not self.postgres:
                environment |= {name: os.environ[name] for name in _DATABASE_WAYS if name in os.environ}
        if service == "session":
            environment["HERMESH_REDIS_URL"] = self.redis_url
        if service == "tool":
            environment["HERMESH_OBJECT_STORE_URL"] = self.object_store_url
            environment |= {name: os.environ[name] for name in S3_VARIABLES if name in os.environ}
        if service == "agent":
            environment |= {
                "HERMESH_LLM_BASE_URL": self.pool.url if self.pool else self.llm_base_url,
                "HERMESH_LLM_API_KEY": self.llm_api_key,
            }
            if self.embedded_model:
                environment = {
                    "HERMESH_LLM_MODEL": model.NAME,
                    "HERMESH_INSTRUCTIONS": model.INSTRUCTIONS,
                    "HERMESH_LLM_TOOL_MODE": "json",
                    "HERMESH_LLM_PREFILL": "true",
                    "HERMESH_LLM_CONTEXT_TOKENS": str(model.TOKENS_A_SLOT),
                } | environment
        return environment


def _suffix(number: int) -> str:
    # The first is called as versions with one Envoy call theirs: they have to find it.
    return "" if number == 1 else f"-{number}"


def _base_environment() -> dict[str, str]:
    # Without bytecode every start would compile each module anew: three times the work, for every process.
    # Each gets its secrets as they are, whether they came from a file or not.
    hidden = _GUARDED | S3_VARIABLES | secret_files().keys() | {"PYTHONDONTWRITEBYTECODE"}
    environment = {name: value for name, value in os.environ.items() if name.upper() not in hidden}
    # A proxy is for what is outside: what the mesh has to say to itself stays on this machine.
    for name in ("NO_PROXY", "no_proxy"):
        environment[name] = ",".join(filter(None, (environment.get(name), "127.0.0.1,localhost,::1")))
    return environment


def _taken_port(said: str) -> str:
    found = re.search(r"cannot listen on 127\.0\.0\.1:(\d+): ([^;]+)", said)
    if found is None:
        return ""
    return (
        f"a gateway cannot listen on port {found[1]}: {found[2]}; free it, or set HERMESH_GATEWAY_PORT so "
        "that as many ports as there are gateways and one more are free from there on"
    )


def _seconds(setting: tuple[str, float]) -> float:
    name, default = setting
    try:
        return float(os.environ.get(name, default))
    except ValueError:
        return default


def _place(url: str) -> str:
    """A URL without its credentials and its query."""
    return re.sub(r"//[^/@]*@", "//", url).partition("?")[0]
