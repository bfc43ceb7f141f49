"""The memory service's settings."""

from __future__ import annotations

from pydantic import Field, SecretStr

from meshkit.settings import MeshSettings


class MemorySettings(MeshSettings):
    """What the memory service reads from its environment."""

    database_url: SecretStr = Field(
        SecretStr(""),
        description="The PostgreSQL database, with the extension pgvector: postgresql://user:password@host/db",
    )
    database_direct_url: SecretStr = Field(
        SecretStr(""),
        description="PostgreSQL itself where HERMESH_DATABASE_URL names a pooler, for migrations.",
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
    memory_pool_size: int = Field(8, ge=1, le=100, description="Most database connections of one replica.")
    memory_min_score: float = Field(
        0.15,
        ge=-1,
        le=1,
        description="Least nearness in meaning (cosine) of what is recalled, unless a call says otherwise.",
    )
    memory_importance_weight: float = Field(
        0.1, ge=0, le=1, description="How much importance 1 over importance 0 adds to nearness in the order."
    )
    memory_max_per_scope: int = Field(
        20_000, ge=1, le=1_000_000, description="Most memories of one user or session; more are refused."
    )
    memory_sweep_seconds: float = Field(
        60.0, ge=0.1, le=86_400, description="Seconds between two removals of expired memories."
    )
