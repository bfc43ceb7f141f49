"""What the command `hermesh` reads from its environment."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr

from launcher.envoy import DEFAULT_POLICY, Policy
from launcher.model_pool import Balance
from meshkit.settings import EnvironmentSettings

CHECKOUT = Path(__file__).resolve().parent.parent


def home() -> Path:
    """What a relative data folder is relative to: the checkout; for an installed package, where one is."""
    return CHECKOUT if (CHECKOUT / "pyproject.toml").exists() else Path.cwd()


class LauncherSettings(EnvironmentSettings):
    """Settings of the launcher, as HERMESH_<NAME>. A URL replaces the embedded part."""

    data_dir: Path = Field(
        Path(".hermesh"),
        description="Folder of everything the mesh keeps; relative to the checkout.",
    )
    http_port: int = Field(8080, ge=1, le=65535, description="Port of the HTTP API and the chat page.")
    grpc_port: int = Field(50051, ge=1, le=65535, description="Port of the public gRPC services.")
    mesh_port: int = Field(
        0, ge=0, le=65535, description="Port of Envoy's inner listener, on loopback; 0 picks a free one."
    )
    envoy_metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port of loopback at which Envoy serves /stats/prometheus and /ready; 0 is nowhere.",
    )
    mesh_address: str = Field(
        "", description="host:port at which services reach it, where that is not the listener itself."
    )
    gateway_port: int = Field(
        0,
        ge=0,
        le=65_000,
        description=(
            "Port of the first gateway on loopback, the next one has the next port and so on, for a balancer "
            "straight before them; a rolling restart needs one more than there are. 0 picks free ones, "
            "others at each start."
        ),
    )
    agent_lb: Policy = Field(
        DEFAULT_POLICY,
        description=(
            "How Envoy chooses the agent of a run: least_request_full_scan (the fewest under way of all), "
            "least_request (of two), round_robin, random, ring_hash (by session), ring_hash_bounded (by "
            "session, none above 1.25 times its share)."
        ),
    )
    edge_max_connections: int = Field(
        10_000,
        ge=1,
        description=(
            "Connections that Envoy takes from outside, both public ports together; less where the limit on "
            "open files does not allow for two each."
        ),
    )
    edge_max_heap_mib: int = Field(
        1024,
        ge=64,
        description=(
            "Envoy's memory in MiB near which it resets the largest unfinished requests, then refuses new "
            "ones; calls between services go on."
        ),
    )
    database_url: SecretStr = Field(
        SecretStr(""),
        description=(
            "PostgreSQL with pgvector, postgresql://user:password@host:port/database; of several hosts "
            "(host:port,host:port) the primary is used. Empty starts the embedded one."
        ),
    )
    wal_archive: Path | None = Field(
        None,
        description=(
            "Folder, on another disk, into which the embedded PostgreSQL archives its write-ahead log, so "
            "that any moment can be restored: docs/deploy/backup.md. It has to exist. Empty archives nothing."
        ),
    )
    redis_url: SecretStr = Field(
        SecretStr(""), description="Redis or Valkey; empty starts the embedded Valkey."
    )
    object_store_url: str = Field(
        "", description="Where large tool results go, file:// or s3://; empty is a folder in the data folder."
    )
    llm_base_url: str = Field(
        "",
        description=(
            "OpenAI-compatible model API with its /v1; several that serve the same models stand in for each "
            "other, separated by commas or spaces. Empty starts the embedded model."
        ),
    )
    model_balance: Balance = Field(
        "agent",
        description=(
            "Which of several model backends gets a request: agent (the first that works, by each agent), or "
            "through Envoy least_request (the one with the fewest) or session (the same for all turns of a "
            "session, so that its prompt cache is hit, unless that has too much to do)."
        ),
    )
    llm_api_key: SecretStr = Field(SecretStr(""), description="API key for the model API.")
    llm_model: str = Field("", description="Default model; empty is the first that the backend lists.")
    api_key: SecretStr = Field(
        SecretStr(""),
        description="API key of the first tenant; empty makes one and keeps it in <data folder>/api-key.",
    )

    hang_seconds: float = Field(
        20.0,
        ge=0,
        description=(
            "Seconds after which a process that runs and does not answer is killed and started again; more "
            "than a lease's 10 s. 0 = never. PostgreSQL never is."
        ),
    )

    @property
    def fixed_ports(self) -> dict[str, int]:
        """The ports that somebody outside has to know, by the names of their variables."""
        ports = {"HERMESH_HTTP_PORT": self.http_port, "HERMESH_GRPC_PORT": self.grpc_port}
        if self.envoy_metrics_port:
            ports["HERMESH_ENVOY_METRICS_PORT"] = self.envoy_metrics_port
        return ports

    @property
    def archive(self) -> Path | None:
        """Where the write-ahead log is archived, absolute."""
        return home() / self.wal_archive.expanduser() if self.wal_archive else None

    @property
    def folder(self) -> Path:
        """The data folder, absolute."""
        # Not to the current folder: every shell and every child has to mean the same one.
        return home() / self.data_dir.expanduser()
