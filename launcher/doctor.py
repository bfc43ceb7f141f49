"""What `hermesh doctor` looks at, each with the remedy."""

from __future__ import annotations

import asyncio
import importlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher import doctor_postgres, envoy, examine, model
from launcher.control import supervisor_of
from launcher.embedded import package_folder, wal
from launcher.embedded.postgres import BIN, USER, namespace_works
from launcher.embedded.valkey import binary as valkey_binary
from launcher.errors import LaunchError, library_remedy
from launcher.folder import NEEDED_BYTES, Folder
from launcher.plan import PARTS, Plan
from launcher.ports import port_problem
from launcher.settings import LauncherSettings
from launcher.state import State
from meshkit import variables
from meshkit.secret_files import SecretFileError, secret

IMPORTS = ("grpc", "asyncpg", "redis", "starlette", "uvicorn", "uvloop", "xllamacpp", "wordllama")
NEEDED_FILES = 4096


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; `remedy` is empty where it is well."""

    what: str
    found: str
    remedy: str = ""


def missing_libraries(binary: Path) -> list[str]:
    """The shared libraries that a binary needs and the machine lacks."""
    try:
        printed = subprocess.run(
            ["ldd", str(binary)], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.split()[0] for line in printed.stdout.splitlines() if "not found" in line]


def findings(settings: LauncherSettings) -> Iterator[Finding]:
    """Looks at everything, in the order in which `up` needs it."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    yield Finding(
        "python", version, "" if sys.version_info >= (3, 11) else "Hermesh needs Python 3.11 or later"
    )
    for name in IMPORTS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            yield Finding(f"package {name}", str(error), "run make up again: it installs what the lock names")
    binaries = [("PostgreSQL", BIN / "postgres"), ("Envoy", envoy.BINARY), ("Valkey", valkey_binary())]
    binaries += [("the model server", path) for path in package_folder("xllamacpp").glob("*.so")]
    for name, binary in binaries:
        lacking = missing_libraries(binary)
        remedy = "; ".join(library_remedy(library) for library in lacking)
        yield Finding(f"{name}'s libraries", ", ".join(lacking) or "all there", remedy)
    there = model.weights().exists()
    yield Finding(
        "the model's weights", "there" if there else "missing", "" if there else "run make up again"
    )
    for mistyped in variables.unknown(os.environ):
        yield Finding(mistyped.name, "not a setting", str(mistyped))
    folder = Folder(settings.folder)
    try:
        folder.prepare()
        yield Finding("data folder", str(folder.root))
    except LaunchError as error:
        yield Finding("data folder", str(folder.root), str(error))
        return
    free = shutil.disk_usage(folder.root).free
    yield Finding(
        "disk",
        f"{free >> 20} MiB free",
        "" if free > NEEDED_BYTES else f"{NEEDED_BYTES >> 20} MiB are needed",
    )
    # The supervisor raises the soft limit as far as it may.
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = files == resource.RLIM_INFINITY or files >= NEEDED_FILES
    remedy = "" if enough else f"have root raise the hard limit (nofile) to {NEEDED_FILES}"
    yield Finding("open files", "no limit" if files == resource.RLIM_INFINITY else str(files), remedy)
    if os.geteuid() == 0:
        how = "a user namespace" if namespace_works() else f"the system user {USER}"
        yield Finding("PostgreSQL beside root", how)
    if url := settings.database_url.get_secret_value():
        for row in asyncio.run(_database(url)):
            yield Finding(*row)
    running = supervisor_of(folder) is not None
    for name, port in settings.fixed_ports.items():
        problem = "" if running else port_problem(port)
        yield Finding(name, str(port), f"{problem}; set {name} to another port" if problem else "")
    for row in asyncio.run(_examined(settings, folder, running=running)):
        yield Finding(*row)
    yield Finding("the mesh", "runs" if running else f"does not run; {', '.join(PARTS)} come with hermesh up")


async def _database(url: str) -> list[examine.Row]:
    """Looks at a PostgreSQL that a URL names, and at the other ways to it."""
    try:
        direct, standby = (secret(os.environ, f"HERMESH_DATABASE_{way}_URL") for way in ("DIRECT", "STANDBY"))
    except SecretFileError as error:
        return [("PostgreSQL", "was not looked at", str(error))]
    prefix = os.environ.get("HERMESH_DATABASE_SCHEMA_PREFIX", "")
    return await doctor_postgres.rows(url, direct_url=direct, standby_url=standby, prefix=prefix)


async def _examined(settings: LauncherSettings, folder: Folder, *, running: bool) -> list[examine.Row]:
    """Looks at the parts: those that a URL names, whether a mesh runs or not, and of a running one all."""
    # Of a PostgreSQL that a URL names the clock is looked at with the rest of it.
    database, redis = "", settings.redis_url.get_secret_value()
    admin: envoy.Admin | None = None
    trouble = ""
    if running:
        plan = Plan(settings, folder, State.load(folder.state_file).ports)
        redis, admin = plan.redis_url, plan.admin
        if plan.postgres:
            database = plan.database_url
            trouble = await plan.postgres.archive_trouble()
    rows: list[examine.Row] = []
    if database:
        rows += await examine.database_clock(database)
    if settings.archive and not settings.database_url.get_secret_value():
        segments = wal.folder_of(folder.postgres, settings.archive)
        rows.append(wal.examined(settings.archive, segments, trouble))
    if redis:
        rows += await examine.redis(redis)
    if admin:
        rows += await examine.edge(admin)
    return rows
