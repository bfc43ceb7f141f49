"""What a session replica reads from its environment."""

from pydantic import Field, SecretStr

from meshkit.settings import MeshSettings


class SessionSettings(MeshSettings):
    """Settings of the session service; each is an environment variable HERMESH_<NAME>."""

    database_url: SecretStr = Field(
        SecretStr(""),
        description=(
            "PostgreSQL, postgresql://user:password@host:port/database; of several, host:port,host:port, the "
            "primary is used."
        ),
    )
    database_direct_url: SecretStr = Field(
        SecretStr(""),
        description=(
            "PostgreSQL itself where HERMESH_DATABASE_URL names a pooler: for notices (LISTEN) and "
            "migrations; empty takes that URL."
        ),
    )
    database_schema_prefix: str = Field(
        "",
        max_length=40,
        pattern=r"^([a-z_][a-z0-9_]*)?$",
        description=(
            "What the names of the mesh's schemas, session and memory, begin with, in a database shared with "
            "others: acme_ makes acme_session."
        ),
    )
    database_standby_url: SecretStr = Field(
        SecretStr(""),
        description="A standby of PostgreSQL, one host, from which old events are read; empty reads all from "
        "the primary.",
    )
    database_standby_max_lag_seconds: float = Field(
        5.0, gt=0, le=3600, description="A standby that is further behind is not read from."
    )
    redis_url: SecretStr = Field(
        SecretStr(""),
        description=(
            "Redis or Valkey: redis://host:port, rediss:// for TLS, unix://path, redis+cluster://host:port, "
            "or redis+sentinel://host:port/name; docs/deploy/redis.md has the options. Empty runs without."
        ),
    )
    redis_read_from: SecretStr = Field(
        SecretStr(""),
        description=(
            "Where live tails are read: empty for the primary, `replicas` for those that Sentinel or a "
            "cluster tells, or the URL of a read replica."
        ),
    )
    database_pool_size: int = Field(
        16, ge=4, le=200, description="Most connections of one session replica to PostgreSQL."
    )
    max_flush_appends: int = Field(1024, ge=1, le=10_000, description="Most runs in one group commit.")
    max_step_commits: int = Field(8, ge=1, le=100, description="Most step commits under way at once.")
    max_dispatches: int = Field(
        512, ge=1, le=100_000, description="Most runs that one replica keeps dispatched to agents at once."
    )
    max_queued_runs: int = Field(
        10_000,
        ge=1,
        le=1_000_000,
        description=(
            "About how many runs may wait in the whole mesh; input beyond that is refused with OVERLOADED, "
            "a tenant's that has the most of them first."
        ),
    )
    sweep_seconds: float = Field(
        0.5, gt=0, le=60, description="Seconds between two looks for runs that wait for an agent."
    )
    run_timeout: float = Field(
        600.0,
        ge=0.001,
        le=7 * 86_400,
        description=(
            "Seconds that a run may take, from its first claim on, when neither it nor its tenant sets a "
            "limit; waiting for a person does not count."
        ),
    )
    maintain_seconds: float = Field(
        600.0, ge=1, description="Seconds between two rounds of upkeep: partitions, expired keys."
    )
    result_grace_seconds: float = Field(
        3600.0,
        ge=0,
        le=90 * 86_400,
        description=(
            "Seconds that large results outlive the deletion of their session. A database that is restored "
            "to a point in time finds its results as far back as this."
        ),
    )
    watch_poll_seconds: float = Field(
        1.0, gt=0, le=60, description="Seconds between two looks in PostgreSQL for what the live tail missed."
    )
    watch_poll_degraded_seconds: float = Field(
        0.15, gt=0, le=60, description="The same while Redis does not answer."
    )
    stream_ttl_seconds: int = Field(
        3600, ge=1, description="How long Redis keeps a run's events after its last one."
    )
    stream_max_events: int = Field(
        10_000, ge=10, description="About how many events of a run Redis keeps; older ones are in PostgreSQL."
    )
    conversation_ttl_seconds: int = Field(
        86_400, ge=1, description="How long Redis keeps a conversation after its last use."
    )

    @property
    def direct_url(self) -> str:
        """The way to PostgreSQL itself."""
        return self.database_direct_url.get_secret_value() or self.database_url.get_secret_value()
