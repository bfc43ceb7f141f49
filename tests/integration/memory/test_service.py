"""The memory service behind a real gRPC server, on PostgreSQL and with the real embedder."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any
from uuid import UUID, uuid4

import grpc.aio
import pytest
from pydantic import SecretStr

from hermesh.memory.v1 import memory_service_pb2 as pb
from hermesh.memory.v1.memory_service_pb2_grpc import (
    MemoryServiceStub,
    add_MemoryServiceServicer_to_server,
)
from meshkit.channel import mesh_metadata, open_channel
from meshkit.errors import UnauthenticatedError, from_rpc_error
from meshkit.server import Server
from services.memory.app import SERVICE_NAME
from services.memory.embedding.wordllama import WordLlamaEmbedder
from services.memory.operations.recall import Ranking
from services.memory.servicer import MemoryServicer
from services.memory.settings import MemorySettings
from services.memory.store.postgres import PostgresStore

TENANT = UUID("0192aaaa-0000-7000-8000-000000000001")
OTHER = UUID("0192aaaa-0000-7000-8000-000000000002")
ANN = pb.Scope(user="ann")
SETTINGS = MemorySettings(mesh_token=SecretStr("token"), drain_delay_seconds=0, drain_seconds=1)
DEADLINE = 10.0


class Keys:
    async def authenticate(self, api_key: str) -> UUID:
        if api_key != "hm_good":
            raise UnauthenticatedError("API_KEY_INVALID", "no such key")
        return TENANT


@pytest.fixture(scope="module")
def llama() -> Any:
    return asyncio.run(WordLlamaEmbedder.load())._llama


@pytest.fixture
async def stub(postgres_store: PostgresStore, llama: Any) -> AsyncIterator[MemoryServiceStub]:
    async with Server(SETTINGS, service="memory", authenticator=Keys(), configure_logging=False) as server:
        ranking = Ranking(SETTINGS.memory_min_score, SETTINGS.memory_importance_weight)
        servicer = MemoryServicer(postgres_store, WordLlamaEmbedder(llama), ranking)
        server.add(add_MemoryServiceServicer_to_server, servicer, SERVICE_NAME)
        await server.start()
        async with open_channel(SETTINGS, server.address, mesh=False) as channel:
            yield MemoryServiceStub(channel)


def on_behalf(tenant: UUID = TENANT) -> Any:
    return mesh_metadata(SETTINGS, tenant)


async def recall(stub: MemoryServiceStub, tenant: UUID = TENANT, **more: Any) -> list[pb.RecallResponse]:
    call = stub.Recall(pb.RecallRequest(**more), metadata=on_behalf(tenant), timeout=DEADLINE)
    return [found async for found in call]


async def reason(awaitable: Awaitable[Any]) -> str:
    try:
        await awaitable
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error).reason
    return ""


async def test_what_was_said_is_recalled_by_its_meaning(stub: MemoryServiceStub) -> None:
    said = ["My dog is called Biscuit.", "I live in Lisbon.", "I work as a nurse at night."]
    for text in said:
        await stub.Remember(pb.RememberRequest(scope=ANN, text=text), metadata=on_behalf())
    for query, text in zip(("What pet do I have?", "Where do I live?", "What is my job?"), said, strict=True):
        found = await recall(stub, scope=ANN, query=query)
        assert found[0].memory.text == text
        assert found[0].score > SETTINGS.memory_min_score
    assert await recall(stub, scope=pb.Scope(user="bob"), query="What pet do I have?") == []
    assert await recall(stub, OTHER, scope=ANN, query="What pet do I have?") == []


async def test_a_session_without_a_user_has_a_scope_of_its_own(stub: MemoryServiceStub) -> None:
    session = uuid4()
    scope = pb.Scope(session_id=str(session).upper())
    await stub.Remember(pb.RememberRequest(scope=scope, text="A green door."), metadata=on_behalf())
    (found,) = await recall(stub, scope=pb.Scope(session_id=str(session)), query="green door")
    assert found.memory.scope.session_id == str(session)


async def test_a_memory_is_forgotten_for_good(stub: MemoryServiceStub) -> None:
    kept = await stub.Remember(pb.RememberRequest(scope=ANN, text="My dog."), metadata=on_behalf())
    request = pb.ForgetRequest(memory_id=kept.memory.memory_id)
    assert (await stub.Forget(request, metadata=on_behalf(OTHER))).deleted == 0
    assert (await stub.Forget(request, metadata=on_behalf())).deleted == 1
    assert (await stub.Forget(request, metadata=on_behalf())).deleted == 0
    assert await recall(stub, scope=ANN, query="dog") == []


async def test_a_repeated_request_is_one_memory(stub: MemoryServiceStub) -> None:
    request = pb.RememberRequest(scope=ANN, text="My dog.", request_id="r", importance=0.0)
    first = await stub.Remember(request, metadata=on_behalf())
    assert await stub.Remember(request, metadata=on_behalf()) == first
    assert first.memory.importance == 0.0
    request.text = "My cat."
    assert await reason(stub.Remember(request, metadata=on_behalf())) == "REQUEST_ID_REUSED"


async def test_a_scope_is_listed_page_by_page(stub: MemoryServiceStub) -> None:
    for number in range(3):
        await stub.Remember(pb.RememberRequest(scope=ANN, text=f"number {number}"), metadata=on_behalf())
    first = await stub.ListMemories(pb.ListMemoriesRequest(scope=ANN, page_size=2), metadata=on_behalf())
    rest = await stub.ListMemories(
        pb.ListMemoriesRequest(scope=ANN, page_size=2, page_token=first.next_page_token), metadata=on_behalf()
    )
    texts = [memory.text for memory in (*first.memories, *rest.memories)]
    assert (texts, rest.next_page_token) == (["number 2", "number 1", "number 0"], "")
    foreign = pb.ListMemoriesRequest(scope=ANN, page_token=first.next_page_token)
    assert await reason(stub.ListMemories(foreign, metadata=on_behalf(OTHER))) == "PAGE_TOKEN_INVALID"


async def test_preferences_are_a_users(stub: MemoryServiceStub) -> None:
    request = pb.SetPreferencesRequest(user="ann", preferences={"tone": "brief", "gone": ""})
    assert dict((await stub.SetPreferences(request, metadata=on_behalf())).preferences) == {"tone": "brief"}
    got = await stub.GetPreferences(pb.GetPreferencesRequest(user="ann"), metadata=on_behalf())
    assert dict(got.preferences) == {"tone": "brief"}
    got = await stub.GetPreferences(pb.GetPreferencesRequest(user="ann"), metadata=on_behalf(OTHER))
    assert dict(got.preferences) == {}


@pytest.mark.parametrize(
    "request_",
    [
        pb.RememberRequest(text="x"),
        pb.RememberRequest(scope=pb.Scope(), text="x"),
        pb.RememberRequest(scope=pb.Scope(user=""), text="x"),
        pb.RememberRequest(scope=pb.Scope(user="\x00"), text="x"),
        pb.RememberRequest(scope=pb.Scope(session_id="1"), text="x"),
        pb.RememberRequest(scope=ANN),
        pb.RememberRequest(scope=ANN, text=" "),
        pb.RememberRequest(scope=ANN, text="a\x00b"),
        pb.RememberRequest(scope=ANN, text="x" * 16_385),
        pb.RememberRequest(scope=ANN, text="x", importance=float("nan")),
        pb.RememberRequest(scope=ANN, text="x", importance=2),
        pb.RememberRequest(scope=ANN, text="x", ttl_ms=-1),
        pb.RememberRequest(scope=ANN, text="x", ttl_ms=2**63 - 1),
        pb.RememberRequest(scope=ANN, text="x", source_session_id="nonsense"),
        pb.RememberRequest(scope=ANN, text="x", request_id="x" * 201),
        pb.ForgetRequest(),
        pb.ForgetRequest(memory_id="nonsense"),
        pb.ForgetRequest(memory_id=str(uuid4()), scope=ANN),
        pb.ForgetRequest(scope=pb.Scope()),
        pb.ListMemoriesRequest(),
        pb.ListMemoriesRequest(scope=ANN, page_size=501),
        pb.GetPreferencesRequest(),
        pb.GetPreferencesRequest(user="\x00"),
        pb.SetPreferencesRequest(user="ann"),
        pb.SetPreferencesRequest(user="ann", preferences={"": "x"}),
        pb.SetPreferencesRequest(user="ann", preferences={"a": "\x00"}),
        pb.SetPreferencesRequest(user="ann", preferences={"a": "x" * 1025}),
        pb.SetPreferencesRequest(user="ann", preferences={str(n): "x" for n in range(65)}),
    ],
)
async def test_a_wrong_request_is_told(stub: MemoryServiceStub, request_: Any) -> None:
    method = getattr(stub, type(request_).__name__.removesuffix("Request"))
    assert await reason(method(request_, metadata=on_behalf())) == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"scope": ANN},
        {"scope": ANN, "query": "x", "limit": 101},
        {"scope": ANN, "query": "x", "limit": -1},
        {"scope": ANN, "query": "x", "min_score": float("nan")},
        {"scope": ANN, "query": "x" * 1_048_577},
    ],
)
async def test_a_wrong_search_is_told(stub: MemoryServiceStub, more: dict[str, Any]) -> None:
    assert await reason(recall(stub, **more)) == "INVALID_ARGUMENT"


async def test_a_huge_query_counts_by_its_beginning(stub: MemoryServiceStub) -> None:
    await stub.Remember(pb.RememberRequest(scope=ANN, text="My dog."), metadata=on_behalf())
    assert len(await recall(stub, scope=ANN, query="dog " * 262_144)) == 1


async def test_a_key_names_the_tenant(stub: MemoryServiceStub) -> None:
    request = pb.ListMemoriesRequest(scope=ANN)
    good = (("authorization", "Bearer hm_good"),)
    await stub.Remember(pb.RememberRequest(scope=ANN, text="x"), metadata=good)
    assert len((await stub.ListMemories(request, metadata=good)).memories) == 1
    assert await reason(stub.ListMemories(request)) == "API_KEY_MISSING"
    bad = (("authorization", "Bearer hm_bad"),)
    assert await reason(stub.ListMemories(request, metadata=bad)) == "API_KEY_INVALID"
    assert await reason(stub.ListMemories(request, metadata=mesh_metadata(SETTINGS))) != ""
