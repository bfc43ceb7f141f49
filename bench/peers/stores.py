"""PostgreSQL and Valkey for a peer alone: the same servers that `hermesh up` embeds, on ports of loopback."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import asyncpg
import redis

from bench.mesh import MeshError, free_ports, wait_until
from bench.peers.processes import end
from launcher.embedded.postgres import Postgres
from launcher.embedded.valkey import binary
from launcher.processes import spawn

READY_SECONDS = 60.0
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Stores:
    """The running stores.

    Attributes:
        postgres_url: of PostgreSQL, with a password, as libpq reads it.
        redis_url: of Valkey.
        pids: of both, by the kind that the bench counts as stores.
    """

    postgres_url: str
    redis_url: str
    pids: dict[str, int]

    @classmethod
    def start(cls, folder: Path, stack: ExitStack) -> Self:
        """Starts both with their files in a folder; they are ended when `stack` is left.

        Raises:
            LaunchError: PostgreSQL cannot make its data.
            MeshError: One of them did not become ready.
        """
        postgres_port, redis_port = free_ports(2)
        password = secrets.token_hex(16)
        postgres = Postgres.in_folder(folder / "postgresql", folder, password)
        postgres.prepare()
        command = [*postgres.command(), *_on_tcp(postgres_port)]
        server = _spawn("postgresql", command, folder, stack)
        url = f"postgresql://postgres:{password}@{HOST}:{postgres_port}/postgres"
        cache = _spawn("valkey", _valkey(folder, redis_port, password), folder, stack)
        redis_url = f"redis://:{password}@{HOST}:{redis_port}/0"
        wait_until(lambda: _redis_answers(redis_url), READY_SECONDS, "the peers' Valkey")
        wait_until(lambda: _postgres_answers(url, server), READY_SECONDS, "the peers' PostgreSQL")
        return cls(url, redis_url, {"postgresql": server.pid, "valkey": cache.pid})


def _on_tcp(port: int) -> list[str]:
    # PostgreSQL takes the last word on a setting.
    return ["-c", f"listen_addresses={HOST}", "-c", f"port={port}"]


def _valkey(folder: Path, port: int, password: str) -> list[str]:
    config = folder / "valkey.conf"
    config.write_text(
        f"bind {HOST}\nport {port}\nrequirepass {password}\n"
        f'save ""\nappendonly no\ndaemonize no\ndir {folder}\n'
    )
    config.chmod(0o600)
    return [str(binary()), str(config)]


def _spawn(name: str, command: list[str], folder: Path, stack: ExitStack) -> subprocess.Popen[bytes]:
    process = spawn(command, {"PATH": "/usr/bin:/bin"}, folder / f"{name}.log")
    stack.callback(end, process)
    return process


def _redis_answers(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


def _postgres_answers(url: str, server: subprocess.Popen[bytes]) -> bool:
    async def ask() -> None:
        connection = await asyncpg.connect(url, timeout=5)
        await connection.close()

    if server.poll() is not None:
        raise MeshError(f"the peers' PostgreSQL ended with {server.returncode}")
    try:
        asyncio.run(ask())
    except (OSError, asyncpg.PostgresError):
        return False
    return True
