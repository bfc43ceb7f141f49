"""A whole mesh with a strict model server: what it wants back is stored and sent by the next agent, too."""

import asyncio

from bench.mesh import Mesh
from tests.e2e.client import assert_whole, http, new_session, run_to_end, text_of
from tests.fakes.dialects import DIALECTS, DialectServer, Reply


async def test_a_session_with_calls_goes_on_for_turns_with_a_server_that_wants_its_fields_back() -> None:
    calls = (("calculator", '{"expression":"6*7"}'), ("calculator", '{"expression":"1+1"}'))
    script = [Reply("", "I need sums.", calls), Reply("It is 42."), Reply("As I said, 42.")]
    async with DialectServer(DIALECTS["kimi"](), script) as server:
        mesh = Mesh(
            settings={
                "HERMESH_LLM_BASE_URL": server.base_url,
                "HERMESH_LLM_API_KEY": "fake",
                "HERMESH_LLM_MODEL": "fake",
            },
            replicas="gateway=1,agent=2,session=1,tool=1,memory=1",
            scripted_model=False,
        )
        # The fake server answers while the mesh starts.
        await asyncio.to_thread(mesh.__enter__)
        try:
            async with http(mesh) as client:
                session = await new_session(client)
                for said, reply in (("What is 6*7?", "It is 42."), ("Really?", "As I said, 42.")):
                    frames = await run_to_end(client, session, said)
                    assert_whole(frames)
                    assert (frames[-1].event, text_of(frames)) == ("run.completed", reply)
                shown = (await client.get(f"/v1/sessions/{session}/messages")).json()["messages"]
        finally:
            await asyncio.to_thread(mesh.__exit__, None, None, None)
    assert server.refused == []
    assistant = next(one for one in server.taken[-1]["messages"] if one.get("tool_calls"))
    assert assistant["reasoning_content"] == "I need sums."
    assert {call["id"] for call in assistant["tool_calls"]} == server.dialect.given_ids
    made = next(one for one in shown if one["tool_calls"])
    assert [set(call) for call in made["tool_calls"]] == [{"call_id", "name", "arguments"}] * 2
