"""The peers: packages, how their own pages start them, what was set beside that, what they promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.peers.targets import AgnoTarget, ChatTarget, LangGraphTarget, PeerTarget, ResponsesTarget

Make = Callable[[str, Mapping[str, int]], PeerTarget]


@dataclass(frozen=True, slots=True)
class Peer:
    """A server that is installed and started as its own pages say.

    Attributes:
        name: how the command line names it, and its folder beside this file is named.
        title: how pages name it.
        packages: whose versions pages tell.
        command: program of its environment and arguments; `{port}` is filled in.
        variables: environment; the values of `server.running` are filled in.
        ready: path that answers 200 once it is ready.
        stores: whether PostgreSQL and Valkey are started for it.
        pages: where its own pages say that it is started so.
        changed: what differs from there, and why.
        targets: what is asked of it.
        folder: of another peer that is installed and started from the same files.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    command: tuple[str, ...]
    variables: Mapping[str, str]
    ready: str
    stores: bool
    pages: str
    changed: str
    targets: Sequence[Make]
    folder: str = ""

    @property
    def files(self) -> str:
        """The folder beside this file with what it is installed and started from."""
        return self.folder or self.name

    def named(self) -> list[PeerTarget]:
        """Returns its targets as if it ran nowhere, for their names."""
        return [make("", {}) for make in self.targets]


PEERS = (
    Peer(
        name="agno",
        title="Agno AgentOS",
        packages=("agno", "fastapi", "uvicorn", "uvloop", "openai"),
        command=("python", "app.py"),
        variables={
            "DATABASE_URL": "{postgres_psycopg}",
            "REDIS_URL": "{redis}?max_connections=1000",
            "OPENAI_BASE_URL": "{model}",
            "PORT": "{port}",
            "AGNO_TELEMETRY": "false",
        },
        ready="/health",
        stores=True,
        pages="docs.agno.com, «Durable Queue» and «Redis Event Stream»",
        changed=(
            "128 background runs at once in place of 32, so that 100 streams are not queued; 1,000 "
            "connections to Redis in place of its client's 100, beyond which streams lost their events."
        ),
        targets=(lambda url, pids: AgnoTarget("Agno background", url, pids, durable=True, background=True),),
    ),
    Peer(
        name="agno-stream",
        title="Agno AgentOS, no stores",
        folder="agno",
        packages=("agno", "fastapi", "uvicorn", "uvloop", "openai"),
        command=("python", "app.py"),
        variables={"OPENAI_BASE_URL": "{model}", "PORT": "{port}", "AGNO_TELEMETRY": "false"},
        ready="/health",
        stores=False,
        pages="docs.agno.com, «Background Execution» (its default streaming)",
        changed="no database: the least that it can do.",
        targets=(lambda url, pids: AgnoTarget("Agno stream", url, pids, durable=False, background=False),),
    ),
    Peer(
        name="aegra",
        title="Aegra",
        packages=("aegra-api", "langgraph", "langchain-openai", "fastapi", "uvicorn", "uvloop"),
        command=("aegra", "serve", "--host", "127.0.0.1", "--port", "{port}"),
        variables={
            "DATABASE_URL": "{postgres}",
            "REDIS_BROKER_ENABLED": "true",
            "REDIS_URL": "{redis}",
            "OPENAI_BASE_URL": "{model}",
            "AUTH_TYPE": "noop",
            "AEGRA_CONFIG": "aegra.json",
            "N_JOBS_PER_WORKER": "50",
        },
        ready="/ready",
        stores=True,
        pages="docs.aegra.dev, «Deployment» (`aegra serve` with PostgreSQL and the Redis broker)",
        changed="50 runs at once for each of its 3 workers in place of 10, so that 100 streams never queue.",
        targets=(lambda url, pids: LangGraphTarget("Aegra", url, pids, durable=True),),
    ),
    Peer(
        name="ogx",
        title="ogx",
        packages=("ogx", "fastapi", "uvicorn", "uvloop", "openai"),
        command=("ogx", "run", "config.yaml", "--insecure", "--port", "{port}"),
        variables={
            "OPENAI_BASE_URL": "{model}",
            "SQLITE_STORE_DIR": "{folder}/store",
            "TIKTOKEN_CACHE_DIR": "{packages}/litellm/litellm_core_utils/tokenizers",
        },
        ready="/v1/health",
        stores=False,
        pages="ogx's pages, «Starting a OGX Server» and «Starter Distribution»",
        changed=(
            "a configuration with inference and Responses alone in place of the starter distribution, whose "
            "other providers bring torch; stores in SQLite as there. The vocabulary that it would download "
            "is a file of another package."
        ),
        targets=(
            lambda url, pids: ChatTarget("ogx chat", url, pids, durable=False),
            lambda url, pids: ResponsesTarget("ogx Responses", url, pids, durable=False),
        ),
    ),
    Peer(
        name="langgraph",
        title="LangGraph API, in memory",
        packages=(
            "langgraph-api",
            "langgraph-runtime-inmem",
            "langgraph",
            "langchain-openai",
            "uvicorn",
            "uvloop",
        ),
        command=(
            *("langgraph", "dev", "--no-browser", "--no-reload", "--host", "127.0.0.1", "--port", "{port}"),
            *("--n-jobs-per-worker", "128"),
        ),
        variables={
            "OPENAI_BASE_URL": "{model}",
            "LANGSMITH_TRACING": "false",
            "LANGGRAPH_CLI_NO_ANALYTICS": "1",
        },
        ready="/ok",
        stores=False,
        pages="docs.langchain.com, «Run a local server» (`langgraph dev`)",
        changed="128 runs at once in place of 10, so that 100 streams are not queued; no reload, no browser.",
        targets=(lambda url, pids: LangGraphTarget("LangGraph in memory", url, pids, durable=False),),
    ),
)
