"""Redis as platforms run it, in real processes, for tests to break: with a replica, Sentinel, as a cluster.

The server is the embedded Valkey. All of it is on loopback, wants a password, and keeps nothing.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
import redis.asyncio

from bench.mesh import free_ports
from launcher.embedded.valkey import binary
from meshkit.redis_servers import open_redis

PASSWORD = "test-password"
PRIMARY_NAME = "mesh"
SECONDS = 60.0
# A cluster's nodes and Sentinel take a silent server for gone after so long.
_GONE_MS = 1000


def documented(heading: str) -> list[str]:
    """The lines of the block under a heading of the page for operators, so that what it says is tested."""
    page = (Path(__file__).resolve().parents[1] / "docs/deploy/redis.md").read_text()
    return re.split(r"^```\w*\n", page.split(f"## {heading}\n", 1)[1], flags=re.MULTILINE)[1].splitlines()


def client_of(url: str) -> redis.asyncio.Redis:
    """Returns a client as services have it; close it."""
    servers = open_redis(url)
    assert servers is not None
    return servers.link().redis


def wait(check: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    """Returns once something is so; servers tell nobody that it is."""
    end = time.monotonic() + seconds
    while True:
        try:
            if check():
                return
        except (redis.RedisError, OSError):
            pass
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.05)


class Server:
    """One server process; however often it starts, it is at the same place.

    Attributes:
        port: where it listens; 0 for TLS only.
        process: None while it is stopped.
    """

    def __init__(self, folder: Path, port: int, *lines: str, command: Sequence[str] = (), tls: Any = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "log"
        self._tls = tls
        self._config = folder / "conf"
        program, *arguments = command or (str(binary()),)
        self._command = [program, str(self._config), *arguments]
        listens = () if tls else (f"port {port}",)
        self._config.write_text(
            "\n".join(
                [
                    "bind 127.0.0.1",
                    *listens,
                    f"dir {folder}",
                    "daemonize no",
                    f"requirepass {PASSWORD}",
                    *lines,
                ]
            )
            + "\n"
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"redis://:{PASSWORD}@{self.address}/0"

    def ask(self, *command: Any) -> Any:
        """What it answers to a command."""
        tls = {"ssl": True, "ssl_ca_certs": self._tls} if self._tls else {}
        with redis.Redis(
            port=self.port, password=PASSWORD, decode_responses=True, socket_timeout=5, **tls
        ) as client:
            return client.execute_command(*command)

    def info(self, section: str) -> dict[str, Any]:
        return dict(self.ask("INFO", section))

    def start(self) -> None:
        assert self.process is None
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        process = self.process

        def answers() -> bool:
            assert process.poll() is None, self.log.read_text()[-2000:]
            return bool(self.ask("PING"))

        wait(answers, f"port {self.port}")

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=30)
            self.process = None


_QUIET = (
    'save ""',
    "appendonly no",
    f"masterauth {PASSWORD}",
    "repl-diskless-sync-delay 0",
    "repl-ping-replica-period 1",
)


@contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Starts servers for the time of the block."""
    try:
        for server in servers:
            server.start()
        yield
    finally:
        for server in servers:
            server.kill()


@contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="hm-vks-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def follows(replica: Server) -> bool:
    """Whether it has all of its primary's data and gets more."""
    found = replica.info("replication")
    return found["role"] == "slave" and found["master_link_status"] == "up"


@contextmanager
def primary_and_replica() -> Iterator[tuple[Server, Server]]:
    """A primary and its read-only replica."""
    with folder() as place:
        ports = free_ports(2)
        primary = Server(place / "primary", ports[0], *_QUIET)
        replica = Server(place / "replica", ports[1], *_QUIET, f"replicaof 127.0.0.1 {ports[0]}")
        with running(primary, replica):
            wait(lambda: follows(replica), "the replica")
            yield primary, replica


class Watched:
    """A primary, two replicas, and three sentinels that watch them."""

    def __init__(self, place: Path) -> None:
        ports = free_ports(6)
        self.servers = [
            Server(place / f"server-{number}", port, *_QUIET, *self._role(ports[0], port))
            for number, port in enumerate(ports[:3])
        ]
        self.sentinels = [
            Server(
                place / f"sentinel-{number}",
                port,
                f"sentinel monitor {PRIMARY_NAME} 127.0.0.1 {ports[0]} 2",
                f"sentinel auth-pass {PRIMARY_NAME} {PASSWORD}",
                f"sentinel sentinel-pass {PASSWORD}",
                f"sentinel down-after-milliseconds {PRIMARY_NAME} {_GONE_MS}",
                f"sentinel failover-timeout {PRIMARY_NAME} 5000",
                command=(str(binary()), "--sentinel"),
            )
            for number, port in enumerate(ports[3:])
        ]

    @staticmethod
    def _role(first: int, port: int) -> tuple[str, ...]:
        # A primary that nobody follows any more takes no writes that would be lost.
        safe = ("min-replicas-to-write 1", "min-replicas-max-lag 2")
        return safe if port == first else (*safe, f"replicaof 127.0.0.1 {first}")

    @property
    def url(self) -> str:
        sentinels = ",".join(sentinel.address for sentinel in self.sentinels)
        return f"redis+sentinel://:{PASSWORD}@{sentinels}/{PRIMARY_NAME}?sentinel_password={PASSWORD}"

    def primary(self) -> Server:
        """The server that the sentinels name."""
        _, port = self.sentinels[0].ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", PRIMARY_NAME)
        return next(server for server in self.servers if server.port == int(port))

    def settled(self) -> bool:
        """Whether all of them know of each other, and a failover could begin."""
        for sentinel in self.sentinels:
            found = sentinel.ask("SENTINEL", "MASTER", PRIMARY_NAME)
            if isinstance(found, list):
                found = dict(zip(found[::2], found[1::2], strict=True))
            if (int(found["num-other-sentinels"]), int(found["num-slaves"])) != (2, 2):
                return False
        return sum(follows(server) for server in self.servers) == 2


@contextmanager
def sentinels() -> Iterator[Watched]:
    """All of them, settled."""
    with folder() as place:
        watched = Watched(place)
        with running(*watched.servers):
            wait(lambda: sum(follows(server) for server in watched.servers) == 2, "two replicas")
            with running(*watched.sentinels):
                wait(watched.settled, "sentinels that know each other")
                yield watched


class Cluster:
    """A Redis Cluster of three primaries with a replica each."""

    def __init__(self, place: Path, *lines: str) -> None:
        ports = free_ports(12)
        self.nodes = [
            Server(
                place / f"node-{number}",
                port,
                *_QUIET,
                "cluster-enabled yes",
                f"cluster-port {bus}",
                *documented("Cluster"),
                f"cluster-node-timeout {_GONE_MS}",
                "cluster-replica-validity-factor 0",
                *lines,
            )
            for number, (port, bus) in enumerate(zip(ports[:6], ports[6:], strict=True))
        ]
        self._buses = ports[6:]

    @property
    def url(self) -> str:
        # One that is gone must not matter, and who is not named is found.
        return f"redis+cluster://:{PASSWORD}@{','.join(node.address for node in self.nodes[:3])}"

    def make(self) -> None:
        """Makes a cluster of the nodes, which run."""
        first = self.nodes[0]
        for number, node in enumerate(self.nodes):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for number, node in enumerate(self.nodes[:3]):
            start, end = (16384 * number) // 3, (16384 * (number + 1)) // 3 - 1
            node.ask("CLUSTER", "ADDSLOTSRANGE", start, end)
        for node, bus in zip(self.nodes[1:], self._buses[1:], strict=True):
            first.ask("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        wait(lambda: all(self._knows(node) == 6 for node in self.nodes), "six nodes that know each other")
        for replica, primary in zip(self.nodes[3:], self.nodes[:3], strict=True):
            replica.ask("CLUSTER", "REPLICATE", primary.ask("CLUSTER", "MYID"))
        wait(self.settled, "a cluster that serves")

    @staticmethod
    def _knows(node: Server) -> int:
        return int(node.ask("CLUSTER INFO")["cluster_known_nodes"])

    def primaries(self) -> list[Server]:
        """The nodes that have slots."""
        return [node for node in self.nodes if node.process and node.info("replication")["role"] == "master"]

    def settled(self) -> bool:
        """Whether every slot is served, and each primary has a replica that could take its place."""
        return (
            all(node.ask("CLUSTER INFO")["cluster_state"] == "ok" for node in self.nodes)
            and len(self.primaries()) == 3
            and sum(follows(node) for node in self.nodes) == 3
        )

    def serves(self) -> bool:
        """Whether every slot has a primary that lives."""
        return len(self.primaries()) == 3 and all(
            node.ask("CLUSTER INFO")["cluster_state"] == "ok" for node in self.primaries()
        )


@contextmanager
def cluster(*lines: str) -> Iterator[Cluster]:
    """One that serves; `lines` go into each node's configuration."""
    with folder() as place:
        found = Cluster(place, *lines)
        with running(*found.nodes):
            found.make()
            yield found
