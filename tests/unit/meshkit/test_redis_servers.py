"""URLs of Redis's, and the hash tags of a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis.crc

from meshkit.errors import StartupError
from meshkit.redis_servers import RedisServers, cluster_tags, open_redis


def opened(url: str) -> RedisServers:
    servers = open_redis(url)
    assert servers is not None
    return servers


def options(url: str) -> dict[str, object]:
    return dict(opened(url).link().redis.connection_pool.connection_kwargs)


def test_no_url_is_none() -> None:
    assert open_redis("") is None


@pytest.mark.parametrize(
    "url",
    [
        "localhost:6379",
        "tcp://127.0.0.1:6379",
        "http://x",
        "redis+http://x",
        "redis://h:port",
        "redis://h/name",
        "redis+cluster://",
        "redis+cluster://h:port",
        "redis+cluster://h:1/3",
        "redis+sentinel://h:1",
        "redis+sentinel://h:1/mesh/name",
        "unix+cluster:///x",
    ],
)
def test_a_bad_url_names_its_variable_and_not_itself(url: str) -> None:
    with pytest.raises(StartupError, match="HERMESH_REDIS_URL must be redis://") as found:
        open_redis(url.replace("h:", "u:hunter2@h:"))
    assert "hunter2" not in str(found.value)
    with pytest.raises(StartupError, match="HERMESH_OTHER"):
        open_redis(url, "HERMESH_OTHER")


def test_an_option_that_means_nothing_is_refused() -> None:
    for url in (
        "redis://h?ssl_cert=x",
        "rediss+cluster://h?ssl_cacerts=x",
        "redis+sentinel://h/n?sentinel=x",
    ):
        with pytest.raises(StartupError, match="option"):
            open_redis(url)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    with pytest.raises(StartupError, match=f"ssl_ca_certs names {file}"):
        open_redis(f"rediss://h?ssl_ca_certs={file}")
    file.touch()
    assert options(f"rediss://h?ssl_ca_certs={file}")["ssl_ca_certs"] == str(file)


def test_one_server_has_one_shard_of_any_key() -> None:
    servers = opened("redis://user:p%40ss@h:1/3")
    assert servers.tags == ("",)
    assert not servers.lists_replicas
    found = options("redis://user:p%40ss@h:1/3")
    assert (found["host"], found["port"], found["username"], found["password"], found["db"]) == (
        "h",
        1,
        "user",
        "p@ss",
        3,
    )


def test_a_cluster_has_as_many_shards_as_all_replicas_agree_on() -> None:
    servers = opened("redis+cluster://user:p%40ss@a:1,b,[::1]:3")
    assert len(servers.tags) == 16
    assert servers.lists_replicas
    found = options("redis+cluster://user:p%40ss@a:1,b")
    assert (found["username"], found["password"], "host" in found) == ("user", "p@ss", False)


def test_sentinels_have_credentials_of_their_own() -> None:
    servers = opened("redis+sentinel://user:data@a,b:2/mesh/1?sentinel_username=s&sentinel_password=watch")
    found = dict(servers.link().redis.connection_pool.connection_kwargs)
    assert (found["username"], found["password"], found["db"]) == ("user", "data", 1)
    assert "sentinel_password" not in found


def test_tags_are_spread_evenly_over_the_slots() -> None:
    tags = cluster_tags(16)
    assert tags == cluster_tags(16)
    assert [redis.crc.key_slot(tag.encode()) // 1024 for tag in tags] == list(range(16))
    # What is between the braces is all that counts.
    key = f"hermesh:{{{tags[3]}}}:x:run:y:events"
    assert redis.crc.key_slot(key.encode()) == redis.crc.key_slot(tags[3].encode())
