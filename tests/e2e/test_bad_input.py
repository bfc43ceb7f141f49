"""Bad input: a typed error with a reason or the run's own failed event; nothing lost, nothing leaked."""

import asyncio
import json
import uuid

import httpx
import pytest

from bench.mesh import Mesh
from tests.e2e.client import (
    assert_whole,
    frames_of,
    http,
    new_session,
    run_to_end,
    submit,
    watch,
    watch_to_end,
)


def assert_problem(answer: httpx.Response, status: int, reason: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/problem+json")
    problem = answer.json()
    assert problem["reason"] == reason
    assert problem["status"] == status
    assert problem["request_id"]
    assert "Traceback" not in answer.text


async def test_unknown_ids_are_not_found(mesh: Mesh) -> None:
    nobody = str(uuid.uuid4())
    async with http(mesh) as client:
        assert_problem(await client.get(f"/v1/sessions/{nobody}"), 404, "SESSION_NOT_FOUND")
        assert_problem(await client.get(f"/v1/runs/{nobody}"), 404, "RUN_NOT_FOUND")
        assert_problem(await client.get(f"/v1/runs/{nobody}/events"), 404, "RUN_NOT_FOUND")
        for stream in (True, False):
            answer = await client.post(f"/v1/sessions/{nobody}/runs", json={"input": "x", "stream": stream})
            assert_problem(answer, 404, "SESSION_NOT_FOUND")
        session = await new_session(client)
        for stream in (True, False):
            body = {"input": "x", "stream": stream, "model": "no-such-model"}
            answer = await client.post(f"/v1/sessions/{session}/runs", json=body)
            assert_problem(answer, 404, "MODEL_NOT_FOUND")


@pytest.mark.parametrize("key", ["", "Bearer wrong", "Bearer hm_" + "x" * 43, "Basic abc"])
async def test_a_missing_or_wrong_key_is_refused(mesh: Mesh, key: str) -> None:
    async with httpx.AsyncClient(base_url=mesh.url, timeout=30) as client:
        answer = await client.get("/v1/sessions", headers={"Authorization": key} if key else {})
        assert_problem(answer, 401, "API_KEY_INVALID" if key.startswith("Bearer") else "API_KEY_MISSING")
        assert "www-authenticate" in answer.headers


async def test_bodies_that_are_not_what_they_should_be(mesh: Mesh) -> None:
    async with http(mesh) as client:
        session = await new_session(client)
        url = f"/v1/sessions/{session}/runs"
        json_type = {"Content-Type": "application/json"}
        for content in (b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"input": "\xc3\x28"}', b"null"):
            answer = await client.post(url, content=content, headers=json_type)
            assert_problem(answer, 400, "INVALID_ARGUMENT")
        for body in (
            {},
            {"input": ""},
            {"input": 7},
            {"input": []},
            {"input": None},
            {"input": [{"role": "x"}]},
        ):
            assert_problem(await client.post(url, json=body), 400, "INVALID_ARGUMENT")
        for size in (1_100_000, 5_000_000):
            answer = await client.post(url, json={"input": "x" * size})
            assert_problem(answer, 413, "INPUT_TOO_LARGE")
        assert (await client.get(f"/v1/sessions/{session}/messages")).json()["messages"] == []


async def test_an_idempotency_key_gives_one_run(mesh: Mesh) -> None:
    async with http(mesh) as client:
        session = await new_session(client)
        key = {"Idempotency-Key": str(uuid.uuid4())}
        url = f"/v1/sessions/{session}/runs"
        body = {"input": "[[tokens=5]]", "stream": False}
        first = await client.post(url, json=body, headers=key)
        second = await client.post(url, json=body, headers=key)
        assert first.json()["run_id"] == second.json()["run_id"]
        other = await client.post(url, json={"input": "another", "stream": False}, headers=key)
        assert_problem(other, 409, "REQUEST_ID_REUSED")
        await watch_to_end(client, first.json()["run_id"])
        async with client.stream("POST", url, json=body | {"stream": True}, headers=key) as response:
            if response.status_code == 200:
                assert (await anext(frames_of(response))).run_id == first.json()["run_id"]
            else:
                raise AssertionError((response.status_code, await response.aread()))
        runs = (await client.get(f"/v1/sessions/{session}/messages")).json()["messages"]
        assert len(runs) == 2


async def test_a_cursor_past_the_end_is_named(mesh: Mesh) -> None:
    async with http(mesh) as client:
        frames = await run_to_end(client, await new_session(client), "[[tokens=3]]")
        run, last = frames[-1].run_id, frames[-1].seq
        answer = await client.get(f"/v1/runs/{run}/events", params={"after_seq": str(last + 7)})
        assert_problem(answer, 416, "CURSOR_PAST_END")
        for cursor in ("nonsense", f"{run}:x", f"{uuid.uuid4()}:3", f"{run}:-1"):
            answer = await client.get(f"/v1/runs/{run}/events", headers={"Last-Event-ID": cursor})
            assert_problem(answer, 400, "INVALID_ARGUMENT")


MODEL_FAULTS = [
    ("[[status=401]]", "MODEL_UNAUTHENTICATED"),
    ("[[status=429]]", "MODEL_RATE_LIMITED"),
    ("[[status=500]]", "MODEL_UNAVAILABLE"),
    ("[[garbage]]", "MODEL_BAD_RESPONSE"),
    ("[[half]]", "MODEL_STREAM_TRUNCATED"),
    ("[[silent]]", "MODEL_TIMEOUT"),
]


@pytest.mark.parametrize(("fault", "reason"), MODEL_FAULTS)
async def test_a_model_that_misbehaves_fails_the_run_by_name(mesh: Mesh, fault: str, reason: str) -> None:
    async with http(mesh) as client:
        session = await new_session(client)
        frames = await run_to_end(client, session, fault)
        assert_whole(frames)
        assert frames[-1].event == "run.failed"
        assert frames[-1].data["data"]["reason"] == reason
        assert "Traceback" not in json.dumps(frames[-1].data)
        after = await run_to_end(client, session, "[[tokens=3]]")
        assert after[-1].event == "run.completed"


async def test_a_model_that_fails_twice_is_asked_again(mesh: Mesh) -> None:
    async with http(mesh) as client:
        frames = await run_to_end(
            client, await new_session(client), f"[[status=500 times=2 tokens=4]] {uuid.uuid4()}"
        )
        assert frames[-1].event == "run.completed"


async def test_a_cancel_reaches_the_model_at_once(mesh: Mesh) -> None:
    assert mesh.model is not None
    stats_url = mesh.model.url.removesuffix("/v1") + "/stats"
    async with http(mesh) as client:
        session = await new_session(client)
        aborted = (await client.get(stats_url)).json()["aborted"]
        run = await submit(client, session, "[[tokens=2000 rate=20]]")
        watcher = asyncio.create_task(watch_to_end(client, run))
        async with asyncio.timeout(10):
            await watch(client, run, 0, lambda frame: frame.event == "text.delta")
        assert (await client.post(f"/v1/runs/{run}/cancel", json={"reason": "enough"})).status_code in (
            200,
            202,
        )
        frames = await asyncio.wait_for(watcher, 5)
        assert_whole(frames)
        assert frames[-1].event == "run.cancelled"
        assert (await client.get(stats_url)).json()["aborted"] == aborted + 1
        again = await client.post(f"/v1/runs/{run}/cancel", json={})
        assert again.status_code in (200, 202)
