"""What a backup is: a folder with the database, the objects that it refers to, and a manifest.

manifest.json    what is in it; written last
database.dump    pg_dump's custom format: the schemas `session` and `memory`
base/            in its place in a base backup: the files of the whole server, as pg_basebackup writes them
objects.tsv      tenant, session and reference of each large result that the database refers to
objects/         these results, at the paths that they have in the object store
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from launcher.errors import LaunchError, explain_os_error

FORMAT = 1
# One more: versions that know no base backups say so, in place of that it is damaged.
BASE_FORMAT = 2
# The schemas in dependency's order, and which of their tables are counted.
SCHEMAS = {
    "session": ("tenant", "api_key", "session", "run", "message", "event", "tool_call"),
    "memory": ("item", "preference"),
}
_PIECE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Base:
    """What there is to know of a base backup beside what is in every backup.

    Attributes:
        wal_archive: the folder into which its database's write-ahead log was archived.
        wal_from: the first segment of it that is needed to go on from this backup.
        results: the URL of the object store that the mesh had, without credentials.
        bytes: how large it is.
    """

    wal_archive: str
    wal_from: str
    results: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup holds.

    Attributes:
        taken_at: the moment as which the database is in it, by PostgreSQL's clock; ISO 8601. Of a base backup
            the first moment that can be restored from it.
        hermesh: the version that took it.
        postgresql: the server's version.
        migrations: names of the applied migrations, by schema.
        rows: how many rows, by `schema.table`.
        dump_sha256: of database.dump; empty where there is none.
        objects: how many large results are in it.
        object_bytes: how large they are together.
        missing: results to which the database refers and that the object store did not have.
        format: of the backup.
        base: what it is besides where it is a base backup; None where it is a dump.
    """

    taken_at: str
    hermesh: str
    postgresql: str
    migrations: dict[str, list[str]]
    rows: dict[str, int]
    dump_sha256: str
    objects: int
    object_bytes: int
    missing: list[str] = field(default_factory=list)
    format: int = FORMAT
    base: Base | None = None


@dataclass(frozen=True, slots=True)
class Ref:
    """A large result that the database refers to."""

    tenant_id: UUID
    session_id: UUID
    ref: str

    @property
    def sha256(self) -> str:
        """The SHA-256 of its bytes, in hex."""
        return self.ref.removeprefix("sha256:")

    def line(self) -> str:
        """Its line in objects.tsv."""
        return f"{self.tenant_id}\t{self.session_id}\t{self.ref}\n"

    @classmethod
    def of_line(cls, line: str) -> Ref:
        """Reads one."""
        tenant_id, session_id, ref = line.rstrip("\n").split("\t")
        return cls(UUID(tenant_id), UUID(session_id), ref)


@dataclass(frozen=True, slots=True)
class Archive:
    """The layout of a backup's folder."""

    root: Path

    @property
    def manifest(self) -> Path:
        """What is in it."""
        return self.root / "manifest.json"

    @property
    def dump(self) -> Path:
        """The database."""
        return self.root / "database.dump"

    @property
    def base(self) -> Path:
        """The files of the server."""
        return self.root / "base"

    @property
    def refs(self) -> Path:
        """The list of the large results."""
        return self.root / "objects.tsv"

    @property
    def objects(self) -> Path:
        """The folder of the large results."""
        return self.root / "objects"

    def listed(self) -> Iterator[Ref]:
        """The large results that the database refers to, each once."""
        yield from read_refs(self.refs)

    def write(self, manifest: Manifest) -> None:
        """Writes the manifest."""
        record = asdict(manifest)
        if manifest.base is None:
            # Versions that know no other backups than dumps read it, too.
            del record["base"]
        self.manifest.write_text(json.dumps(record, indent=1) + "\n")

    def read(self) -> Manifest:
        """Reads the manifest and checks that what it names is there, whole.

        Raises:
            LaunchError: This is no backup, one of another version's, or not whole.
        """
        try:
            found: dict[str, Any] = json.loads(self.manifest.read_bytes())
            if found.get("format") not in (FORMAT, BASE_FORMAT):
                raise LaunchError(
                    f"the backup in {self.root} has the format {found.get('format')}, and this version reads "
                    f"{FORMAT} and {BASE_FORMAT}"
                )
            if found["format"] == BASE_FORMAT:
                # Its files have sums of their own, which pg_verifybackup looks at.
                return Manifest(**(found | {"base": Base(**found["base"])}))
            manifest = Manifest(**found)
            whole = sha256_of(self.dump) == manifest.dump_sha256
        except FileNotFoundError as error:
            name = Path(error.filename).name
            raise LaunchError(f"{self.root} is no whole backup: it has no {name}") from error
        except OSError as error:
            raise explain_os_error(error, f"read the backup in {self.root}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LaunchError(f"{self.manifest} is damaged: use another backup") from error
        if not whole:
            raise LaunchError(
                f"{self.dump} is damaged: its SHA-256 is not the manifest's; use another backup"
            )
        return manifest


def read_refs(path: Path) -> Iterator[Ref]:
    """The large results in a list of them."""
    with path.open() as lines:
        yield from map(Ref.of_line, lines)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
