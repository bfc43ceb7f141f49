"""Large results on a real S3, SeaweedFS: over HTTP and HTTPS, and all ways to set one up wrong."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from uuid import UUID, uuid4

import obstore
import pytest

from meshkit.errors import NotFoundError, UnavailableError
from meshkit.objects import open_store
from services.tool.results import INLINE_BYTES, ObjectResults, open_results
from tests.integration.tool.process import ToolProcess
from tests.seaweed import ADMIN, BUCKET, KEYS, READER, SeaweedFS, seaweed

URL = f"s3://{BUCKET}/mesh-1"
DATA = os.urandom(3 * INLINE_BYTES)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    with seaweed(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever keys this machine has are no part of a test."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def results(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str = URL) -> ObjectResults:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = open_results(url)
    assert isinstance(found, ObjectResults)
    return found


async def read(store: ObjectResults, tenant: UUID, session: UUID, ref: str) -> bytes:
    size, pieces = await store.get(tenant, session, ref)
    data = b"".join([piece async for piece in pieces])
    assert len(data) == size
    return data


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
async def test_a_result_is_stored_and_read_back(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, *, tls: bool
) -> None:
    store, tenant, session = results(monkeypatch, s3.environment(tls=tls)), uuid4(), uuid4()
    assert await store.problem() is None
    ref = await store.put(tenant, session, DATA)
    assert await store.put(tenant, session, DATA) == ref
    assert await read(store, tenant, session, ref) == DATA
    for other_tenant, other_session, other in (
        (uuid4(), session, ref),
        (tenant, uuid4(), ref),
        (tenant, session, "sha256:" + "0" * 64),
    ):
        with pytest.raises(NotFoundError):
            await store.get(other_tenant, other_session, other)
    assert await store.problem() is None


async def test_a_result_of_an_earlier_version_is_read_and_those_of_a_session_are_deleted(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, tenant, session, other = results(monkeypatch, s3.environment()), uuid4(), uuid4(), uuid4()
    digest = hashlib.sha256(DATA).hexdigest()
    await obstore.put_async(open_store(URL), f"tool-results/{tenant}/{digest}", DATA)
    assert await read(store, tenant, session, f"sha256:{digest}") == DATA
    for each in (session, other):
        for number in range(3):
            await store.put(tenant, each, DATA + bytes([number]))
    assert await store.delete(tenant, session) == (3, False)
    assert await store.delete(tenant, session) == (0, False)
    left = hashlib.sha256(DATA + b"\x00").hexdigest()
    with pytest.raises(NotFoundError):
        await store.get(tenant, session, f"sha256:{left}")
    assert await read(store, tenant, other, f"sha256:{left}") == DATA + b"\x00"
    assert await read(store, tenant, session, f"sha256:{digest}") == DATA


WRONG = {
    "secret": (URL, {"AWS_SECRET_ACCESS_KEY": "x"}, "AWS_SECRET_ACCESS_KEY is not the secret"),
    "key": (URL, {"AWS_ACCESS_KEY_ID": "x"}, "does not know the key in AWS_ACCESS_KEY_ID"),
    "no keys": (URL, {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "needs keys"),
    "may only read": (
        URL,
        {"AWS_ACCESS_KEY_ID": READER[0], "AWS_SECRET_ACCESS_KEY": READER[1]},
        "does not let these keys in (AccessDenied)",
    ),
    "bucket of others": ("s3://theirs/x", {}, "is the bucket's name right?"),
    "no such bucket": (
        "s3://none/x",
        {"AWS_ACCESS_KEY_ID": ADMIN[0], "AWS_SECRET_ACCESS_KEY": ADMIN[1]},
        "has no such bucket",
    ),
    "unknown authority": (URL, {"AWS_ENDPOINT_URL": "https"}, "unknown authority: name"),
    "wrong name": (URL, {"AWS_ENDPOINT_URL": "https-127", "SSL_CERT_FILE": "ca"}, "for another name"),
    "no TLS there": (URL, {"AWS_ENDPOINT_URL": "https-to-http"}, "does not speak TLS"),
    "only TLS there": (URL, {"AWS_ENDPOINT_URL": "http-to-https"}, "speaks TLS"),
    "refused": (URL, {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "the connection is refused"),
    "no such host": (URL, {"AWS_ENDPOINT_URL": "http://nowhere.invalid:9"}, "its name is not known"),
    "no S3": (URL, {"AWS_ENDPOINT_URL": "no-s3"}, "answers as no S3 does"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_what_is_wrong_is_named_in_one_line(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    url, settings, words = WRONG[what]
    meant = {
        "https": s3.https,
        "https-127": s3.https.replace("localhost", "127.0.0.1"),
        "https-to-http": s3.http.replace("http://", "https://"),
        "http-to-https": s3.https.replace("https://", "http://"),
        "no-s3": s3.no_s3,
        "ca": str(s3.ca),
    }
    environment = s3.environment() | {name: meant.get(value, value) for name, value in settings.items()}
    store = results(monkeypatch, {name: value for name, value in environment.items() if value}, url)
    problem = await store.problem()
    assert problem is not None
    assert words in problem
    assert problem.startswith(f"the object store {url} at {environment['AWS_ENDPOINT_URL']} ")
    assert len(problem.splitlines()) == 1
    assert KEYS[1] not in problem
    with pytest.raises(UnavailableError, match=r"^SERVICE_UNAVAILABLE: the object store does not answer$"):
        await store.put(uuid4(), uuid4(), DATA)
    # A wrong bucket has no result either, and that is no answer to who asks for one.
    if what != "may only read":
        with pytest.raises(UnavailableError):
            await store.get(uuid4(), uuid4(), "sha256:" + "0" * 64)


async def test_what_was_wrong_is_right_once_it_is_repaired(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = results(monkeypatch, s3.environment())
    assert await store.problem() is None
    s3.stop()
    assert "the connection is refused" in (await store.problem() or "")
    with pytest.raises(UnavailableError):
        await store.put(uuid4(), uuid4(), DATA)
    s3.start()
    assert await store.problem() is None


@asynccontextmanager
async def loses_answers(upstream: str, number: int) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A proxy that passes requests on and, of so many writes, ends the connection in place of the answer."""
    port = int(upstream.rpartition(":")[2])
    lost: list[bytes] = []
    connections: set[asyncio.StreamWriter] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, onward = await asyncio.open_connection("127.0.0.1", port)
        connections.update((writer, onward))
        with suppress(OSError, asyncio.IncompleteReadError):
            first = await reader.readuntil(b"\r\n")
            onward.write(first)
            sending = asyncio.ensure_future(copy(reader, onward))
            if first.startswith(b"PUT") and len(lost) < number:
                lost.append(await there.readuntil(b"\r\n"))
            else:
                await copy(there, writer)
            sending.cancel()
        writer.close()
        onward.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", lost
    finally:
        server.close()
        for each in connections:
            each.close()


async def test_a_write_whose_answer_is_lost_is_done_once_more_and_stored(
    s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant, session = uuid4(), uuid4()
    async with loses_answers(s3.http, 2) as (endpoint, lost):
        store = results(monkeypatch, s3.environment(AWS_ENDPOINT_URL=endpoint))
        ref = await store.put(tenant, session, DATA)
        assert [answer.split(b" ")[1] for answer in lost] == [b"200", b"200"]
    assert await read(results(monkeypatch, s3.environment()), tenant, session, ref) == DATA


def test_a_replica_says_at_its_start_what_is_wrong_and_serves_what_needs_no_store(
    s3: SeaweedFS, tmp_path: Path
) -> None:
    wrong = s3.environment() | {"AWS_SECRET_ACCESS_KEY": "not-it", "HERMESH_OBJECT_STORE_URL": URL}
    replica = ToolProcess(tmp_path, **wrong)
    try:
        replica.wait_ready()
        metrics = json.loads(replica.ready.read_text())["metrics_address"]
        with urllib.request.urlopen(f"http://{metrics}/ready", timeout=10) as answer:
            checks = json.load(answer)["checks"]
        assert "AWS_SECRET_ACCESS_KEY is not the secret" in checks["object_store"]["reason"]
        [line] = [line for line in replica.log.read_text().splitlines() if '"object_store"' in line]
        assert "AWS_SECRET_ACCESS_KEY is not the secret" in line
        assert "not-it" not in replica.log.read_text()
    finally:
        replica.kill()


def test_an_endpoint_without_a_scheme_stops_the_start_with_one_line(tmp_path: Path) -> None:
    replica = ToolProcess(tmp_path, HERMESH_OBJECT_STORE_URL=URL, AWS_ENDPOINT_URL="127.0.0.1:9000")
    try:
        assert replica.process.wait(timeout=60) == 1
    finally:
        replica.kill()
    [line] = replica.log.read_text().strip().splitlines()
    assert "AWS_ENDPOINT_URL must be http://host:port or https://host:port" in line
