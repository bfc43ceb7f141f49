"""The agent's settings, by environment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr, field_validator

from meshkit.settings import MeshSettings, words
from services.agent.model.http import Origin


class AgentSettings(MeshSettings):
    """What an agent process reads from its environment, as HERMESH_<NAME>."""

    llm_base_url: str = Field(
        "",
        description=(
            "URL of the OpenAI-compatible language model, with its /v1; several that serve the same models, "
            "separated by commas or spaces, stand in for each other. Empty = the embedded one."
        ),
    )
    llm_api_key: SecretStr = Field(SecretStr(""), description="API key for the language model.")
    llm_model: str = Field(
        "", description="Default model; empty = the first one that the backend lists.", max_length=200
    )
    llm_profile: str = Field(
        "auto",
        description=(
            "What kind of server the model's is, for what it takes: a name of docs/models.md, `unknown`, or "
            "`auto` = found out by its host and its answers. For several URLs one for all, or one for each."
        ),
    )
    llm_profile_file: str = Field(
        "",
        description="A TOML file of further kinds of model servers, in the form of profiles.toml.",
    )
    llm_tool_mode: Literal["native", "json", "none"] = Field(
        "native",
        description=(
            "How the model calls tools: native (OpenAI tools), json (grammar-constrained JSON, only when a "
            "request asks for a tool by tool_choice), none."
        ),
    )
    llm_prefill: bool = Field(
        False,
        description="Whether the model continues a last message of role assistant (llama.cpp and vLLM do).",
    )
    llm_context_tokens: int = Field(
        0, ge=0, description="The model's context window in tokens; older messages are left out. 0 = unknown."
    )
    llm_connections: int = Field(512, ge=1, le=10_000, description="Most connections to the model at once.")
    llm_connect_timeout: float = Field(5.0, gt=0, description="Seconds to wait for the model to accept.")
    llm_first_byte_timeout: float = Field(
        120.0, gt=0, description="Seconds to wait for the first byte of a model's reply."
    )
    llm_idle_timeout: float = Field(
        60.0, gt=0, description="Seconds between two pieces of a reply before the model counts as dead."
    )
    llm_turn_timeout: float = Field(
        300.0,
        gt=0,
        description="Seconds that a model's whole reply may take when a run sets no limit for it.",
    )
    llm_attempts: int = Field(
        3,
        ge=1,
        le=10,
        description="Tries of a model request at each backend before its first token; none after it.",
    )
    llm_resumes: int = Field(
        1, ge=0, le=10, description="How often a reply that broke off midway is taken up again."
    )
    llm_spare_requests: int = Field(
        32,
        ge=0,
        le=10_000,
        description=(
            "Requests to the model that a run may make beyond one for each of its turns: tries again, "
            "replies taken up again, takeovers. The next one fails the run with MODEL_REQUEST_LIMIT."
        ),
    )
    instructions: str = Field(
        "", description="System prompt of the default agent; a run's own instructions replace it."
    )
    max_active_runs: int = Field(
        256, ge=1, description="Most runs of one agent replica at once; more are refused with OVERLOADED."
    )
    accept_target_seconds: float = Field(
        0.5,
        ge=0,
        le=60,
        description=(
            "While even the fastest run takes longer than this to be accepted, one agent replica works on "
            "fewer runs at once, but never on fewer than 32; 0 = always on up to HERMESH_MAX_ACTIVE_RUNS."
        ),
    )
    max_turns: int = Field(16, ge=1, le=1000, description="Most model turns of a run that sets no limit.")
    max_output_tokens: int = Field(
        0,
        ge=0,
        description="Most tokens that a run writes when it sets no limit; 0 = the model's own.",
    )
    max_run_bytes: int = Field(
        64 * 1024 * 1024,
        ge=1024 * 1024,
        le=1024 * 1024 * 1024,
        description=(
            "Most bytes that one run may write to its log: text, reasoning, tool calls and results. A run "
            "that has passed it fails with RUN_TOO_LARGE before its next model turn or tool call. It bounds "
            "disk, memory and the time of a takeover; a model's window, some MB at most, is far smaller."
        ),
    )
    max_appends_per_second: float = Field(
        6000.0,
        ge=0,
        description=(
            "Writes a second that one agent replica aims at: its runs divided by it are the seconds between "
            "two beats on which the text of all of them goes out, from 8 to 50 ms; with fewer than four runs "
            "there is no beat. Text that comes faster than anyone reads goes out each 50 ms. 0 = text is "
            "never held back."
        ),
    )
    reconcile_tries: int = Field(
        8,
        ge=1,
        le=100,
        description="How often a tool is asked what became of an unknown call while its outside is away; the "
        "waits between grow from 1 to 30 seconds.",
    )
    reconcile_seconds: float = Field(
        300.0,
        ge=0,
        le=86_400,
        description="Longest time that a run waits until its tool has found that out; then a person decides.",
    )
    memory_timeout: float = Field(
        0.3, gt=0, le=10, description="Seconds to wait for memories before a run starts without them."
    )

    @field_validator("llm_base_url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        for url in words(value):
            try:
                Origin.parse(url)
            except ValueError:
                raise ValueError("must be http(s) URLs such as http://127.0.0.1:8000/v1") from None
        return value

    @property
    def llm_profiles(self) -> tuple[str, ...]:
        """The names of the backends' profiles, one for all or one for each."""
        return tuple(words(self.llm_profile))

    @property
    def llm_base_urls(self) -> tuple[str, ...]:
        """The URLs of the model's backends, the preferred first, each once."""
        return tuple(dict.fromkeys(url.rstrip("/") for url in words(self.llm_base_url)))
