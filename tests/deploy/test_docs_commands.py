"""The commands of docs/deploy, as they stand: in a clean clone, against real servers; only places differ.

What cannot be run here carries a mark in its page that says why. Where a cluster is what is missing, kubectl
and helm are `tests.deploy.cluster_tools`, which make and check what would be sent.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import asyncpg
import httpx
import pytest

from bench.mesh import free_ports, wait_until
from launcher.cells import table as cells
from launcher.embedded.postgres import BIN as POSTGRES
from launcher.embedded.postgres import as_ordinary_user
from tests.chaos.drills import versions
from tests.deploy.certificates import Authority
from tests.deploy.debian import debian
from tests.deploy.pages import NOT_RUN, PAGES, ROOT, SERVES, Block, blocks, of
from tests.deploy.postgres15 import PASSWORD, postgres15
from tests.integration.session.standby import Replicated, replicated
from tests.seaweed import seaweed

LONG = pytest.mark.deploy_long
SECONDS = 280.0
# Of each page the languages whose blocks the tests below run; `sh` of what is marked goes to FAKE_CLUSTER.
RUN = {
    "backup.md": {"sh", "sql"},
    "cells.md": {"toml"},
    "haproxy.md": {"sh"},
    "nginx.md": {"sh"},
    "objects.md": {"sh"},
    "postgresql.md": {"sh", "sql", "ini"},
    "prometheus.md": {"sh", "promql"},
    "redis.md": {"conf", "redis"},
    "release.md": {"sh"},
}
# Marked blocks that are run with tools that stand for a cluster's.
FAKE_CLUSTER = ("kubernetes.md", "prometheus.md")


def places() -> list[Path]:
    return sorted(PAGES.glob("*.md"))


@pytest.mark.parametrize("page", places(), ids=lambda page: page.name)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        if block.runs:
            assert block.language in RUN.get(page.name, ()), (
                f"{block.place}: nothing runs it, and no mark says so"
            )
            assert block.mark in ("", SERVES), f"{block.place}: {block.mark!r} is no mark"
        else:
            assert len(block.mark) > len(NOT_RUN) + 10, f"{block.place}: its mark does not say why"
            assert block.language == "sh", block.place
        for placeholder in ("...", "<your", "CHANGEME"):
            assert placeholder not in block.text or not block.runs, f"{block.place}: {placeholder}"


def test_nothing_is_said_to_be_run_that_is_not_there() -> None:
    for page, languages in RUN.items():
        for language in languages:
            assert of(page, language)
    assert not [path for path in places() if not blocks(path)]


def test_the_cells_of_the_page_are_read(tmp_path: Path) -> None:
    [written] = of("cells.md", "toml")
    file = tmp_path / "cells.toml"
    file.write_text(written.text)
    found = cells.read(file)
    assert found.where("anybody").name == "a"
    assert found.cell("b").name == "b"


# What the commands run in.


class Shell:
    """A shell in a clean clone, with a data folder of its own.

    Attributes:
        tree: the clone.
        environment: what a command there sees: nothing of a mesh but its folder and free ports.
    """

    def __init__(self, tree: Path, data: Path) -> None:
        http, grpc = free_ports(2)
        outside = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HERMESH_", "MAKE", "AWS_"))
        }
        path = [
            str(tree / ".venv" / "bin"),
            str(ROOT / ".venv" / "bin"),
            outside["PATH"],
            "/usr/sbin",
            "/sbin",
        ]
        self.tree = tree
        self.environment = outside | {
            "HERMESH_DATA_DIR": str(data),
            "HERMESH_HTTP_PORT": str(http),
            "HERMESH_GRPC_PORT": str(grpc),
            "PATH": os.pathsep.join(path),
            "TMPDIR": str(data.parent),
        }

    def run(
        self, script: str, *, within: tuple[str, ...] = (), status: int = 0, seconds: float = SECONDS
    ) -> str:
        """Runs a script as a person types it, each command after the one before; returns what it printed."""
        done = subprocess.run(
            [*within, "bash", "-eu", "-o", "pipefail"],
            input=script,
            cwd=self.tree,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == status, f"{script}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def psql(self, url: str, script: str) -> None:
        """Has psql run a block of SQL."""
        done = subprocess.run(
            [str(POSTGRES / "psql"), "-v", "ON_ERROR_STOP=1", "-q", url],
            input=script,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stderr}"

    @contextmanager
    def serving(self, script: str) -> Iterator[subprocess.Popen[bytes]]:
        """Has a command run that serves until it is stopped."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {script}"], cwd=self.tree, env=self.environment, stdin=subprocess.DEVNULL
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This working tree as somebody has it who has just cloned it and run `make up` once."""
    return versions.here(tmp_path_factory.mktemp("docs") / "hermesh").tree


@pytest.fixture
def shell(clone: Path, tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(clone, tmp_path / "data")
    yield shell
    shell.run("hermesh down")


def own(folders: tuple[str, ...]) -> tuple[str, ...]:
    """The words that have a command see empty folders of its own in these places, and change no others'."""
    made = "; ".join(f"mkdir -p {folder} && mount -t tmpfs tmpfs {folder}" for folder in folders)
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    return ("unshare", *user, "--mount", "sh", "-euc", f'{made}; exec "$@"', "sh")


def there(package: str, binary: str) -> tuple[str, str]:
    """A package that a page has installed: it is, and `apt-get` says no more than that."""
    debian(package, binary)
    return f"apt-get install {package}", f"dpkg -s {package} > {os.devnull}"


def certificate(tree: Path, tmp_path: Path) -> None:
    """A person's `tls.crt` and `tls.key`."""
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.issue("mesh.example.com")
    shutil.copy(certificate, tree / "tls.crt")
    shutil.copy(key, tree / "tls.key")


# The pages.


@LONG
@pytest.mark.timeout(300)
def test_haproxy(shell: Shell, tmp_path: Path) -> None:
    certificate(shell.tree, tmp_path)
    installed, looked_for = there("haproxy", "haproxy")
    for block in of("haproxy.md"):
        shell.run(block.at({installed: looked_for}), within=own(("/etc/haproxy",)))


@LONG
@pytest.mark.timeout(300)
def test_nginx(shell: Shell, tmp_path: Path) -> None:
    certificate(shell.tree, tmp_path)
    installed, looked_for = there("nginx-light", "nginx")
    for block in of("nginx.md"):
        printed = shell.run(
            block.at({installed: looked_for}), within=own(("/etc/nginx", "/var/log/nginx", "/run"))
        )
        assert "test is successful" in printed


@LONG
@pytest.mark.timeout(600)
def test_release(shell: Shell) -> None:
    for block in of("release.md"):
        shell.run(block.text, seconds=550)


@LONG
@pytest.mark.timeout(600)
def test_backup(shell: Shell, tmp_path: Path) -> None:
    shell.run("hermesh up --no-reply")
    [elsewhere] = [block for block in of("backup.md") if "db.example.com" in block.text]
    printed = shell.run("\n".join(block.text for block in of("backup.md") if block != elsewhere))
    assert "manifest.json" in printed
    assert "Restored" in printed
    url = shell.run("hermesh env HERMESH_DATABASE_URL").strip()
    for block in of("backup.md", "sql"):
        shell.psql(url, block.text)
    server = url.partition("@")[2].removeprefix("/postgres")
    with seaweed(tmp_path / "s3") as store:
        other = Shell(shell.tree, tmp_path / "no-mesh")
        (tmp_path / "backups").mkdir()
        changes = {
            "backup:secret@db.example.com:5432/hermesh": f"backup:secret@/postgres{server}",
            "http://127.0.0.1:8333": store.http,
            "/backups/": f"{tmp_path}/backups/",
        }
        other.run(elsewhere.at(changes))
    assert (tmp_path / "backups" / "2026-11-30" / "manifest.json").exists()
    assert not (tmp_path / "no-mesh").exists()


@LONG
@pytest.mark.timeout(300)
def test_objects(shell: Shell, tmp_path: Path) -> None:
    with seaweed(tmp_path / "s3") as store:
        for block in of("objects.md"):
            printed = shell.run(block.at({"http://127.0.0.1:8333": store.http}))
            assert "The mesh is up" in printed
            assert "objects" in shell.run("hermesh status")


@LONG
@pytest.mark.timeout(300)
def test_prometheus(shell: Shell) -> None:
    installed, looked_for = there("prometheus", "prometheus")
    port, metrics = free_ports(2)
    up, serves = of("prometheus.md")
    # machine.yml names the folder beside itself.
    shell.environment.pop("HERMESH_DATA_DIR")
    shell.run(up.at({installed: looked_for, "9902": str(metrics)}))
    assert serves.mark == SERVES
    with shell.serving(f"{serves.text.strip()} --web.listen-address=127.0.0.1:{port}"):

        def value(query: str) -> list[object]:
            try:
                answer = httpx.get(
                    f"http://127.0.0.1:{port}/api/v1/query",
                    params={"query": query},
                    timeout=5,
                    trust_env=False,
                )
                found: list[object] = answer.json()["data"]["result"]
            except (httpx.HTTPError, ValueError, KeyError):
                return []
            return found

        # Twice its interval for a rate.
        wait_until(lambda: len(value("up == 1")) >= 8, 90, "Prometheus to read every process")
        for block in of("prometheus.md", "promql"):
            wait_until(lambda text=block.text: bool(value(text)), 90, f"an answer to {block.text}")


@LONG
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", FAKE_CLUSTER)
def test_what_a_cluster_would_be_sent(shell: Shell, tmp_path: Path, page: str) -> None:
    tools, objects = tmp_path / "bin", tmp_path / "objects"
    tools.mkdir()
    objects.mkdir()
    for name in ("kubectl", "helm"):
        tool = tools / name
        tool.write_text(
            f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.deploy.cluster_tools {name} "$@"\n'
        )
        tool.chmod(0o755)
    shell.environment["PATH"] = f"{tools}{os.pathsep}{shell.environment['PATH']}"
    shell.environment["HERMESH_TEST_OBJECTS"] = str(objects)
    marked = [block for block in blocks(PAGES / page) if "cluster" in block.mark]
    assert marked
    for block in marked:
        assert "is well formed" in shell.run(block.text)


@LONG
@pytest.mark.timeout(300)
def test_redis(shell: Shell, tmp_path: Path) -> None:
    server = debian("redis-server", "redis-server")
    port, other = free_ports(2)
    plain, sentinel, cluster = of("redis.md", "conf")

    @contextmanager
    def serves(block: Block, more: str, at: int, changes: Mapping[str, str], *words: str) -> Iterator[None]:
        config = tmp_path / f"{at}.conf"
        config.write_text(f"port {at}\nbind 127.0.0.1\ndir {tmp_path}\n{more}{block.at(changes)}")
        with shell.serving(" ".join((str(server), str(config), *words))):
            wait_until(
                lambda: (
                    subprocess.run(
                        ["redis-cli", "-p", str(at), "ping"], capture_output=True, check=False
                    ).stdout
                    == b"PONG\n"
                ),
                20,
                f"Redis with the block at {block.place}",
            )
            yield

    def says(at: int, *words: str) -> str:
        done = subprocess.run(
            ["redis-cli", "-p", str(at), *words], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    with serves(plain, "", port, {}):
        assert says(port, "config", "get", "maxmemory-policy").endswith("allkeys-lru")
        for block in of("redis.md", "redis"):
            rules = block.text
            if float(says(port, "info", "server").partition("redis_version:")[2][:3]) < 7.2:
                # What the page says of those.
                rules = rules.replace("+client|setinfo +client|setname", "+client")
            assert says(port, *rules.split()) == "OK"
        assert "hermesh:*" in says(port, "acl", "list")
        with serves(sentinel, "", other, {"10.0.0.1 6379 2": f"127.0.0.1 {port} 1"}, "--sentinel"):
            assert says(other, "sentinel", "get-master-addr-by-name", "mesh").split()[1] == str(port)
    with serves(cluster, "cluster-enabled yes\n", port, {}):
        assert "cluster_enabled:1" in says(port, "info", "cluster")


@pytest.fixture
async def pair() -> AsyncIterator[Replicated]:
    async with replicated() as found:
        yield found


def folder_of(url: str) -> str:
    return quote(url.partition("host=")[2].partition("&")[0], safe=",%")


@LONG
@pytest.mark.timeout(600)
async def test_postgresql(shell: Shell, tmp_path: Path, pair: Replicated) -> None:
    await asyncio.to_thread(_with_tls, shell, tmp_path)
    role, schemas, limits, synchronous = of("postgresql.md", "sql")
    [pooler] = of("postgresql.md", "ini")
    _, hosts, standby = of("postgresql.md")
    both = folder_of(pair.both)
    here = f"hermesh:secret@/hermesh?host={both}&port=5432"
    primary = f"postgresql://hermesh:secret@/hermesh?host={folder_of(pair.url)}&port=5432"

    async def psql(url: str, block: Block) -> None:
        await asyncio.to_thread(shell.psql, url, block.text)

    await psql(pair.url, role)
    await psql(pair.url.replace("/postgres?", "/hermesh?"), schemas)
    # As the role itself: it needs no other's rights.
    await psql(primary, limits)
    await psql(pair.url, synchronous)
    await pair.until("SELECT sync_state FROM pg_stat_replication", "quorum")
    await asyncio.to_thread(_through_pgbouncer, pooler, pair, tmp_path)
    printed = await asyncio.to_thread(
        shell.run, hosts.at({"hermesh:secret@db-a:5432,db-b:5432/hermesh": here})
    )
    assert "1 standby, synchronous" in printed
    changes = {
        "hermesh:secret@db-a:5432,db-b:5432/hermesh": here,
        "hermesh:secret@db-b:5432/hermesh": (
            f"hermesh:secret@/hermesh?host={folder_of(pair.standby.url)}&port=5432"
        ),
    }
    assert "The mesh is up" in await asyncio.to_thread(shell.run, standby.at(changes))
    await asyncio.to_thread(shell.run, "hermesh down")


def _with_tls(shell: Shell, tmp_path: Path) -> None:
    """The page's first block, on Debian's PostgreSQL with TLS, which lacks pgvector and nothing else."""
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.issue("localhost")
    key.chmod(0o600)
    [port] = free_ports(1)
    options = [f"port={port}", "listen_addresses=127.0.0.1", "ssl=on"]
    options += [f"ssl_cert_file={certificate}", f"ssl_key_file={key}"]
    with postgres15(*(word for option in options for word in ("-c", option)), port=port) as url:

        async def prepare() -> None:
            connection = await asyncpg.connect(url, timeout=30)
            try:
                await connection.execute("CREATE ROLE hermesh LOGIN PASSWORD 'secret'")
                await connection.execute("CREATE DATABASE hermesh OWNER hermesh")
            finally:
                await connection.close()

        asyncio.run(prepare())
        first = of("postgresql.md")[0]
        changes = {"db.example.com:5432": f"localhost:{port}", "/etc/ssl/ca.pem": str(authority.file)}
        printed = shell.run(first.at(changes), status=1)
        wrong = [line for line in printed.splitlines() if line.startswith("✗")]
        assert len(wrong) == 1, printed
        assert "pgvector: not installed" in wrong[0]
    assert PASSWORD not in printed


def _through_pgbouncer(block: Block, pair: Replicated, tmp_path: Path) -> None:
    """The page's configuration, with what else a PgBouncer needs."""
    binary = debian("pgbouncer", "pgbouncer")
    [port] = free_ports(1)
    folder = tmp_path / "pgbouncer"
    folder.mkdir()
    (folder / "users.txt").write_text('"hermesh" "secret"\n')
    socket = pair.primary.socket.parent
    text = block.at({"host=10.0.0.5 port=5432": f"host={socket} port=5432"})
    text += f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
    text += f"auth_type = scram-sha-256\nauth_file = {folder}/users.txt\n"
    (folder / "pgbouncer.ini").write_text(text)

    async def ask() -> None:
        connection = await asyncpg.connect(
            f"postgresql://hermesh:secret@127.0.0.1:{port}/hermesh", timeout=5, statement_cache_size=0
        )
        try:
            assert await connection.fetchval("SELECT current_user") == "hermesh"
            assert await connection.fetchval("SHOW statement_timeout") == "5s"
        finally:
            await connection.close()

    def answers() -> bool:
        try:
            asyncio.run(ask())
        except (OSError, asyncpg.PostgresError, TimeoutError):
            return False
        return True

    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*as_ordinary_user(), str(binary), str(folder / "pgbouncer.ini")], stdout=log, stderr=log, cwd="/"
        )
    try:
        wait_until(answers, 20, f"PgBouncer with the block at {block.place}")
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(timeout=30)
