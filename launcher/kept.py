"""What `hermesh up` was told, kept in the data folder: the next one, from any shell, starts the same mesh.

`settings.json` holds the settings, as variables, of the last `up` that succeeded. It is its owner's only, as
the embedded parts' passwords beside it are: without a URL's password the mesh could not start.
What the shell says goes before; a variable that it sets to nothing is told to be its default again.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from launcher.folder import Folder, write_private
from meshkit.s3 import S3_VARIABLES
from meshkit.secret_files import secret
from meshkit.settings import PREFIX
from meshkit.variables import known, secret_files

# Which folder it is, what the launcher itself tells each process, and what only tests set.
_NOT_KEPT = frozenset(
    {
        "HERMESH_DATA_DIR",
        "HERMESH_FAILPOINTS",
        "HERMESH_LISTEN",
        "HERMESH_MESH_TOKEN",
        "HERMESH_MESH_TOKEN_FILE",
        "HERMESH_METRICS_LISTEN",
        "HERMESH_READY_FILE",
        "HERMESH_REPLICA",
    }
)
_OF_S3 = S3_VARIABLES | {"SSL_CERT_FILE"}
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")
# To the last @ before the path, as all who read a URL take it: a password may have one.
_CREDENTIALS = re.compile(r"//[^/\s]*@")
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Kept:
    """The content of `settings.json`.

    Attributes:
        variables: the settings, by variable.
        fingerprint: of the whole environment it was started with; see `launcher.plan.fingerprint`.
        exists: whether anything is kept at all.
        places: where the stores were, by the variable of each, as `Store.place`: a secret's file may hold
            another one by now.
    """

    variables: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    exists: bool = False
    places: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Folder) -> Kept:
        """Reads the file; a missing or broken one keeps nothing."""
        try:
            found = json.loads(folder.settings_file.read_bytes())
            variables = {str(name): str(value) for name, value in found["variables"].items()}
            places = {str(name): str(place) for name, place in found.get("places", {}).items()}
            return cls(variables, str(found["fingerprint"]), exists=True, places=places)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def save(self, folder: Folder) -> None:
        """Writes the file by rename, with mode 0600."""
        content = {"variables": self.variables, "fingerprint": self.fingerprint, "places": self.places}
        write_private(folder.settings_file, json.dumps(content, indent=1) + "\n")


def told(environment: Mapping[str, str]) -> dict[str, str]:
    """The settings that an environment holds and that are to be kept."""
    names = known() - _NOT_KEPT
    found = {
        name.upper(): value
        for name, value in sorted(environment.items())
        if value and name.upper().startswith(PREFIX) and name.upper() in names
    }
    if _on_s3(found):
        # Without its keys the store that is kept could not be used. What else may need them is not ours.
        found |= {name: environment[name] for name in sorted(_OF_S3) if environment.get(name)}
    return found


def _on_s3(variables: Mapping[str, str]) -> bool:
    return variables.get("HERMESH_OBJECT_STORE_URL", "").startswith("s3:")


def fill(environment: MutableMapping[str, str], kept: Kept) -> list[str]:
    """Adds what is kept and what the environment says nothing of; returns its names."""
    named = {name.upper() for name in environment}
    # A secret is named by its variable and by that of its file: the one takes back the other.
    for file, name in secret_files().items():
        if named & {file, name}:
            named |= {file, name}
    added = {name: value for name, value in kept.variables.items() if name not in named}
    environment.update(added)
    return sorted(added)


def replace(environment: MutableMapping[str, str], kept: Kept) -> None:
    """Has the environment say what is kept and nothing else, whatever the shell says."""
    names = (known() - _NOT_KEPT) | (_OF_S3 if _on_s3(kept.variables) else frozenset())
    for name in [name for name in environment if name.upper() in names]:
        del environment[name]
    environment.update(kept.variables)


def shown(name: str, value: str) -> str:
    """A setting's value as anybody may see it: without keys, credentials and queries."""
    if _SECRET.search(name):
        return "(a secret)"
    if "://" in value:
        value = _CREDENTIALS.sub("//", value).partition("?")[0]
    text = " ".join(value.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


@dataclass(frozen=True, slots=True)
class Store:
    """Where something that lasts is kept.

    Attributes:
        what: its name for people.
        variable: the setting that names it.
        place: what tells it from others; no credentials are in it.
    """

    what: str
    variable: str
    place: str


def stores(variables: Mapping[str, str], folder: Folder) -> list[Store]:
    """The stores that settings name. Redis is none: it holds nothing that PostgreSQL does not.

    Raises:
        SecretFileError: The database's URL is in a file that cannot be read.
    """
    return [
        Store("database", "HERMESH_DATABASE_URL", _database_of(variables, folder)),
        Store("object store", "HERMESH_OBJECT_STORE_URL", _objects_of(variables, folder)),
    ]


def places(variables: Mapping[str, str], folder: Folder) -> dict[str, str]:
    """Where the stores of some settings are, by the variable of each."""
    return {store.variable: store.place for store in stores(variables, folder)}


def moved(before: Kept, now: Mapping[str, str], folder: Folder) -> list[tuple[Store, Store]]:
    """The stores that are others than last time: as they were, as they are."""
    if not before.exists and not _used(folder.postgres):
        return []
    # What a folder of an earlier version holds is an embedded database, and whatever objects there are.
    was = before.places or places(before.variables, folder)
    pairs = [
        (dataclasses.replace(store, place=was[store.variable]), store)
        for store in stores(now, folder)
        if was[store.variable] != store.place
    ]
    return [pair for pair in pairs if before.exists or pair[0].what == "database"]


def _used(postgres: Path) -> bool:
    # Noted once the schema is there; a start that came to nothing leaves a folder without it.
    try:
        return (postgres / "hermesh-schema").exists()
    except OSError:
        return False


def _database_of(variables: Mapping[str, str], folder: Folder) -> str:
    url = secret(variables, "HERMESH_DATABASE_URL")
    return _database(url) if url else f"the embedded one in {folder.postgres}"


def _objects_of(variables: Mapping[str, str], folder: Folder) -> str:
    url = variables.get("HERMESH_OBJECT_STORE_URL") or folder.objects.as_uri()
    return shown("", url).rstrip("/")


def _database(url: str) -> str:
    """Host, port and database, wherever in the URL they stand."""
    try:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        host = ",".join(query.get("host", [])) or parts.netloc.rpartition("@")[2]
        port = ",".join(query.get("port", []))
        name = (query.get("dbname") or query.get("database") or [parts.path.lstrip("/")])[0]
    except ValueError:
        return shown("", url)
    if host.startswith("/"):
        return f"{host}{':' + port if port else ''} {name}"
    hosts = [one if _has_port(one) else f"{one}:{port or 5432}" for one in host.split(",")]
    return f"postgresql://{','.join(hosts)}/{name}"


def _has_port(host: str) -> bool:
    return re.search(r":\d+$", host) is not None
