"""The cells' file, written by people, and the table of who is where, written by commands.

    default = "a"            # the cell of keys without a tag, and of tenants that no command has placed

    [edge]                   # where its Envoys listen
    http = "0.0.0.0:8080"
    grpc = "0.0.0.0:50051"
    folders = ["edge"]       # what its Envoys read; more than one where each machine has a copy of its own

    [cells.a]
    http = ["10.0.1.5:8080"] # the cell's own Envoys
    grpc = ["10.0.1.5:50051"]
    max_requests = 20000     # at once; what is more is told that the cell is full

How a cell's stores are reached is secret: HERMESH_CELL_A_DATABASE_URL and HERMESH_CELL_A_OBJECT_STORE_URL,
or these names with _FILE, for a cell that is called a. Only the commands that look into a cell read them.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launcher.errors import LaunchError, explain_os_error
from meshkit.api_keys import is_tag
from meshkit.secret_files import SecretFileError, secret

FILE = "cells.toml"
TABLE = "tenants.json"
_ADDRESS = re.compile(r"[A-Za-z0-9._-]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}")
_NAME = re.compile(r"[a-z][a-z0-9]{0,15}")
MAX_REQUESTS = 20_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Edge(_Strict):
    http: str = "127.0.0.1:8080"
    grpc: str = "127.0.0.1:50051"
    folders: list[str] = Field(default=["edge"], min_length=1)


class _Cell(_Strict):
    http: list[str] = Field(min_length=1)
    grpc: list[str] = Field(min_length=1)
    max_requests: int = Field(default=MAX_REQUESTS, ge=1)


class _File(_Strict):
    default: str
    edge: _Edge = _Edge()
    cells: dict[str, _Cell] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Cell:
    """One mesh.

    Attributes:
        name: Of a small letter and up to 15 small letters and digits.
        http: HOST:PORT of its Envoys, for HTTP.
        grpc: The same, for gRPC.
        max_requests: Most requests and streams that the edge has there at once.
    """

    name: str
    http: tuple[str, ...]
    grpc: tuple[str, ...]
    max_requests: int = MAX_REQUESTS

    def secret(self, what: str, environment: Mapping[str, str] | None = None) -> str:
        """Returns how one of its stores is reached; empty when nobody says.

        Args:
            what: DATABASE_URL or OBJECT_STORE_URL.
            environment: Variables; the process's own by default.

        Raises:
            LaunchError: The file that is named for it cannot be read.
        """
        try:
            return secret(os.environ if environment is None else environment, self.variable(what))
        except SecretFileError as error:
            raise LaunchError(str(error)) from None

    def variable(self, what: str) -> str:
        """The name of the variable for it."""
        return f"HERMESH_CELL_{self.name.upper()}_{what}"


@dataclass(frozen=True, slots=True)
class Cells:
    """All cells.

    Attributes:
        file: Where they stand.
        default: The cell of whoever has no place.
        cells: By name.
        http: Where the edge listens for HTTP.
        grpc: Where it listens for gRPC.
        folders: What its Envoys read; the first one is the truth, the others copies.
    """

    file: Path
    default: str
    cells: Mapping[str, Cell]
    http: str = "127.0.0.1:8080"
    grpc: str = "127.0.0.1:50051"
    folders: tuple[Path, ...] = field(default=())

    def cell(self, name: str) -> Cell:
        """Returns a cell. Raises LaunchError where there is none of that name."""
        found = self.cells.get(name)
        if found is None:
            raise LaunchError(f"{self.file} has no cell {name}; it has {', '.join(self.cells)}")
        return found

    def table(self) -> dict[str, str]:
        """Returns where tenants were placed: tag to cell.

        Raises:
            LaunchError: The table is damaged, or cannot be read.
        """
        path = self.folders[0] / TABLE
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise explain_os_error(error, f"read {path}") from error
        except ValueError as error:
            raise LaunchError(f"{path} is damaged; put back a copy, such as that of another edge") from error
        if not isinstance(found, dict) or not all(
            is_tag(tag) and cell in self.cells for tag, cell in found.items()
        ):
            raise LaunchError(f"{path} names what is no tenant's tag, or a cell that {self.file} has not")
        return found

    def where(self, tag: str) -> Cell:
        """Returns the cell of a tenant."""
        return self.cells[self.table().get(tag, self.default)]


def read(file: Path) -> Cells:
    """Reads the cells' file.

    Raises:
        LaunchError: One line that says what is wrong with it.
    """
    try:
        text: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        found = _File.model_validate(text)
    except FileNotFoundError:
        raise LaunchError(f"there is no {file}; docs/deploy/cells.md shows one") from None
    except OSError as error:
        raise explain_os_error(error, f"read {file}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise LaunchError(f"{file}: {place}: {first['msg']}") from None
    except ValueError as error:
        raise LaunchError(f"{file} is no TOML: {error}") from None
    for name, cell in found.cells.items():
        if not _NAME.fullmatch(name):
            raise LaunchError(f"{file}: a cell is called by small letters and digits, 16 at most, not {name}")
        for address in (*cell.http, *cell.grpc):
            _check(file, f"cells.{name}", address)
    if found.default not in found.cells:
        raise LaunchError(f"{file}: default names {found.default}, which is none of its cells")
    for address in (found.edge.http, found.edge.grpc):
        _check(file, "edge", address)
    folder = file.absolute().parent
    return Cells(
        file,
        found.default,
        {
            name: Cell(name, tuple(cell.http), tuple(cell.grpc), cell.max_requests)
            for name, cell in found.cells.items()
        },
        found.edge.http,
        found.edge.grpc,
        tuple(folder / name for name in found.edge.folders),
    )


def _check(file: Path, place: str, address: str) -> None:
    if not _ADDRESS.fullmatch(address) or not 0 < int(address.rpartition(":")[2]) < 65536:
        raise LaunchError(f"{file}: {place}: {address!r} is no HOST:PORT")
