"""What a normal run does beside talking: tools are called and journalled, memory is read and written."""

import json
from pathlib import Path

import grpc

from bench.mesh import Mesh, wait_until
from hermesh.memory.v1 import memory_service_pb2, memory_service_pb2_grpc
from tests.e2e.client import assert_whole, http, new_session, run_to_end, text_of


async def test_a_run_calls_tools_side_by_side_and_uses_their_results(mesh: Mesh) -> None:
    ask = '[[tool=calculator {"expression":"6*7"}]] [[tool=current_time {"zone":"Europe/Berlin"}]]'
    async with http(mesh) as client:
        session = await new_session(client)
        frames = await run_to_end(client, session, ask)
        assert_whole(frames)
        assert frames[-1].event == "run.completed"
        results = {
            frame.data["data"]["call_id"]: frame.data["data"]
            for frame in frames
            if frame.event == "tool.result"
        }
        assert [result["status"] for result in results.values()] == ["completed", "completed"]
        assert any("42" in result["content"] for result in results.values())
        assert [frame.event for frame in frames].count("tool.call") == 2
        assert "42" in text_of(frames)
        messages = (await client.get(f"/v1/sessions/{session}/messages")).json()["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant"]


async def test_a_tool_that_refuses_is_a_result_for_the_model(mesh: Mesh) -> None:
    asks = [
        '[[tool=fetch_page {"url":"http://127.0.0.1:1/"}]]',
        '[[tool=fetch_page {"url":"http://169.254.169.254/latest/meta-data"}]]',
        '[[tool=calculator {"expression":"9**9**9"}]]',
        '[[tool=calculator {"wrong":1}]]',
    ]
    async with http(mesh) as client:
        for ask in asks:
            frames = await run_to_end(client, await new_session(client), ask)
            assert frames[-1].event == "run.completed", frames[-1]
            result = next(frame for frame in frames if frame.event == "tool.result")
            assert result.data["data"]["status"] == "failed"


async def test_what_a_user_said_is_recalled_in_another_session(mesh: Mesh) -> None:
    async with http(mesh) as client:
        first = await new_session(client, user="ada")
        await run_to_end(client, first, "My favourite colour is teal, please remember that. [[tokens=3]]")
        key = (("authorization", f"Bearer {mesh.api_key}"),)
        async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
            memories = memory_service_pb2_grpc.MemoryServiceStub(channel)
            scope = memory_service_pb2.Scope(user="ada")
            found: list[str] = []
            for _ in range(50):
                listed = await memories.ListMemories(
                    memory_service_pb2.ListMemoriesRequest(scope=scope), metadata=key, timeout=10
                )
                found = [memory.text for memory in listed.memories]
                if found:
                    break
        assert any("teal" in text for text in found)
        second = await new_session(client, user="ada")
        frames = await run_to_end(client, second, "Which colour do I like best? [[tokens=3]]")
        recalled = next(frame for frame in frames if frame.event == "memory.recalled")
        assert any("teal" in memory["text"] for memory in recalled.data["data"]["memories"])
        stranger = await new_session(client, user="bob")
        frames = await run_to_end(client, stranger, "Which colour do I like best? [[tokens=3]]")
        assert not any(frame.event == "memory.recalled" for frame in frames)


async def test_a_trace_crosses_every_hop(mesh: Mesh, trace_file: Path) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    parent = f"00-{trace_id}-00f067aa0ba902b7-01"
    async with http(mesh, traceparent=parent) as client:
        session = await new_session(client, user="tracer")
        await run_to_end(client, session, '[[tool=calculator {"expression":"1+1"}]]')

    def services() -> set[str]:
        spans = [json.loads(line) for line in trace_file.read_text().splitlines()]
        return {span["service"] for span in spans if span["trace_id"] == trace_id}

    wait_until(
        lambda: services() >= {"gateway", "agent", "session", "tool", "memory"}, 20, "spans of every hop"
    )
