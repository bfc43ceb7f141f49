"""What a mesh was told is kept, shown without its secrets, and compared with what it is told now."""

import stat
from pathlib import Path

import pytest

from launcher.folder import Folder
from launcher.kept import Kept, fill, moved, places, replace, shown, stores, told

URL = "postgresql://ada:secret@db.example/hermesh?sslmode=require"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_settings_are_kept_for_their_owner_only(folder: Folder) -> None:
    kept = Kept(
        told({"HERMESH_DATABASE_URL": URL, "hermesh_max_turns": "7", "PATH": "/bin"}), "f", exists=True
    )
    kept.save(folder)
    assert Kept.load(folder) == kept
    assert kept.variables == {"HERMESH_DATABASE_URL": URL, "HERMESH_MAX_TURNS": "7"}
    assert stat.S_IMODE(folder.settings_file.stat().st_mode) == 0o600


def test_the_keys_of_an_object_store_are_kept_with_it_and_no_others() -> None:
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_ENDPOINT_URL": "http://s3"}
    store = {"HERMESH_OBJECT_STORE_URL": "s3://bucket"}
    assert told(keys | {"AWS_PROFILE": "p"} | store) == keys | store
    assert told(keys | {"HERMESH_OBJECT_STORE_URL": "file:///objects"}).keys() == store.keys()
    assert told(keys) == {}
    assert shown("AWS_SECRET_ACCESS_KEY", "s") == "(a secret)"
    shell = {"AWS_REGION": "here"} | keys
    replace(shell, Kept(keys | store))
    assert shell == keys | store


def test_what_is_of_one_process_or_of_a_test_is_not_kept() -> None:
    names = ("DATA_DIR", "FAILPOINTS", "REPLICA", "LISTEN", "READY_FILE", "MESH_TOKEN", "XYZZY")
    assert told({f"HERMESH_{name}": "x" for name in names} | {"HERMESH_LLM_MODEL": ""}) == {}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"variables": 1, "fingerprint": ""}', "\x00"])
def test_a_damaged_file_keeps_nothing(folder: Folder, text: str) -> None:
    folder.settings_file.write_text(text)
    assert Kept.load(folder) == Kept()


def test_what_the_shell_says_goes_before_and_nothing_means_the_default() -> None:
    kept = Kept({"HERMESH_HTTP_PORT": "81", "HERMESH_GRPC_PORT": "82", "HERMESH_REDIS_URL": "redis://r"})
    shell = {"HERMESH_HTTP_PORT": "91", "HERMESH_REDIS_URL": ""}
    assert fill(shell, kept) == ["HERMESH_GRPC_PORT"]
    assert told(shell) == {"HERMESH_GRPC_PORT": "82", "HERMESH_HTTP_PORT": "91"}


@pytest.mark.parametrize(
    ("kept", "shell"),
    [
        ({"HERMESH_API_KEY_FILE": "/run/key"}, {"HERMESH_API_KEY": "k"}),
        ({"HERMESH_API_KEY": "k"}, {"HERMESH_API_KEY_FILE": "/run/key"}),
        ({"HERMESH_API_KEY_FILE": "/run/key"}, {"HERMESH_API_KEY": ""}),
    ],
)
def test_a_secret_and_its_file_take_back_each_other(kept: dict[str, str], shell: dict[str, str]) -> None:
    before = dict(shell)
    assert fill(shell, Kept(kept)) == []
    assert shell == before


def test_another_database_in_the_same_file_is_noticed(folder: Folder, tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(f"{URL}\n")
    now = {"HERMESH_DATABASE_URL_FILE": str(file)}
    before = Kept(now, "f", exists=True, places=places(now, folder))
    before.save(folder)
    assert Kept.load(folder) == before
    assert "secret" not in folder.settings_file.read_text()
    assert moved(before, now, folder) == []
    assert moved(before, {"HERMESH_DATABASE_URL": URL}, folder) == []
    file.write_text("postgresql://elsewhere/hermesh")
    [(was, is_now)] = moved(before, now, folder)
    assert was.place == "postgresql://db.example:5432/hermesh"
    assert is_now.place == "postgresql://elsewhere:5432/hermesh"


def test_a_running_mesh_is_what_it_was_told_whatever_the_shell_says() -> None:
    kept = Kept({"HERMESH_HTTP_PORT": "81"})
    shell = {"HERMESH_HTTP_PORT": "91", "HERMESH_REDIS_URL": "redis://r", "HERMESH_DATA_DIR": "/d"}
    replace(shell, kept)
    assert shell == {"HERMESH_HTTP_PORT": "81", "HERMESH_DATA_DIR": "/d"}


@pytest.mark.parametrize(
    ("name", "value", "seen"),
    [
        ("HERMESH_DATABASE_URL", URL, "postgresql://db.example/hermesh"),
        (
            "HERMESH_DATABASE_URL",
            "postgresql://ada:p@ss@db.example/hermesh",
            "postgresql://db.example/hermesh",
        ),
        ("HERMESH_LLM_BASE_URL", "http://u:s@cret@a/v1,http://u:s@cret@b/v1", "http://a/v1,http://b/v1"),
        ("HERMESH_LLM_API_KEY", "sk-secret", "(a secret)"),
        ("HERMESH_LLM_BASE_URL", "http://u:secret@a/v1, http://b/v1", "http://a/v1, http://b/v1"),
        ("HERMESH_MAX_TURNS", "7", "7"),
        ("HERMESH_INSTRUCTIONS", "Be\nkind.", "Be kind."),
    ],
)
def test_a_setting_is_shown_without_its_secrets(name: str, value: str, seen: str) -> None:
    assert shown(name, value) == seen


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (URL, "postgresql://bob:another@db.example:5432/hermesh"),
        ("postgresql:///hermesh?host=/run/pg&port=1", "postgresql://x:y@/hermesh?port=1&host=%2Frun%2Fpg"),
    ],
)
def test_another_password_is_not_another_database(folder: Folder, one: str, other: str) -> None:
    before = Kept({"HERMESH_DATABASE_URL": one}, exists=True)
    assert moved(before, {"HERMESH_DATABASE_URL": other}, folder) == []


@pytest.mark.parametrize(
    "now",
    [
        {},
        {"HERMESH_DATABASE_URL": "postgresql://db.example/other"},
        {"HERMESH_DATABASE_URL": "postgresql://db.example:5433/hermesh"},
        {"HERMESH_DATABASE_URL": "postgresql://elsewhere/hermesh"},
    ],
)
def test_another_database_than_last_time_is_noticed(folder: Folder, now: dict[str, str]) -> None:
    before = Kept({"HERMESH_DATABASE_URL": URL}, exists=True)
    [(was, is_now)] = moved(before, now, folder)
    assert was.place == "postgresql://db.example:5432/hermesh"
    assert is_now.variable == "HERMESH_DATABASE_URL"
    assert "secret" not in f"{was} {is_now}"


def test_another_object_store_is_noticed_and_another_redis_is_none(folder: Folder) -> None:
    before = Kept({"HERMESH_OBJECT_STORE_URL": "s3://one/", "HERMESH_REDIS_URL": "redis://r"}, exists=True)
    assert moved(before, {"HERMESH_OBJECT_STORE_URL": "s3://one"}, folder) == []
    [(was, is_now)] = moved(before, {"HERMESH_OBJECT_STORE_URL": "s3://two"}, folder)
    assert (was.place, is_now.place) == ("s3://one", "s3://two")
    assert [store.what for store in stores({}, folder)] == ["database", "object store"]


def test_a_folder_that_kept_nothing_yet_has_its_embedded_database(folder: Folder) -> None:
    now = {"HERMESH_DATABASE_URL": URL}
    assert moved(Kept(), now, folder) == []
    folder.postgres.mkdir()
    (folder.postgres / "hermesh-schema").write_text("x")
    [(was, _)] = moved(Kept(), now, folder)
    assert "embedded" in was.place
    assert moved(Kept(), {}, folder) == []
