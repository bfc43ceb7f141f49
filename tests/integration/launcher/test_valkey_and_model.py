"""The embedded Valkey and the embedded language model, as the launcher starts them."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis

from launcher import model, probes
from launcher.embedded.valkey import Valkey
from services.agent.model.errors import ModelRejectedError
from services.agent.model.openai import OpenAIModel
from services.agent.model.port import ChatMessage, ModelRequest, TextDelta, Usage
from tests.conftest import ValkeyServer

KEY = "model-test-key"


def test_valkey_wants_the_password_and_listens_on_its_socket_only(valkey: ValkeyServer) -> None:
    assert valkey.process is not None
    assert asyncio.run(probes.valkey(valkey.url))
    with redis.Redis.from_url(valkey.url.replace("test-password", "wrong")) as stranger:
        with pytest.raises(redis.AuthenticationError):
            stranger.ping()
    with redis.Redis.from_url(valkey.url) as client:
        assert client.config_get("port")["port"] == "0"
        assert client.config_get("save")["save"] == ""
        assert client.config_get("appendonly")["appendonly"] == "no"
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "allkeys-lru"
    assert "test-password" not in Path(f"/proc/{valkey.process.pid}/cmdline").read_text()


def test_valkeys_configuration_is_private(tmp_path: Path) -> None:
    Valkey(tmp_path, tmp_path / "valkey.conf", "secret").command()
    assert (tmp_path / "valkey.conf").stat().st_mode & 0o777 == 0o600


@dataclass
class ModelProcess:
    url: str
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelProcess]:
    ready = tmp_path_factory.mktemp("model") / "ready.json"
    command = [sys.executable, "-m", "launcher.model", "--port", "0", "--ready-file", str(ready)]
    process = subprocess.Popen(
        command,
        env=os.environ | {"HERMESH_LLM_API_KEY": KEY},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        record = json.loads(ready.read_text())
        assert record["pid"] == process.pid
        yield ModelProcess(f"http://{record['address']}/v1", process)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0


def test_the_model_listens_on_loopback_and_wants_its_key(served: ModelProcess) -> None:
    host, _, port = served.url.removeprefix("http://").removesuffix("/v1").rpartition(":")
    assert host == "127.0.0.1"
    with socket.create_connection((host, int(port)), timeout=5):
        pass
    assert asyncio.run(probes.model(served.url, KEY))
    with httpx.Client(base_url=served.url, timeout=30) as client:
        body = {"model": model.NAME, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        assert client.post("/chat/completions", json=body).status_code == 401


def test_the_model_answers_a_question_the_same_way_each_time(served: ModelProcess) -> None:
    body = {
        "model": model.NAME,
        "messages": [
            {"role": "system", "content": model.INSTRUCTIONS},
            {"role": "user", "content": "What is the capital of France?"},
        ],
    }
    said = []
    with httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        assert model.NAME in json.dumps(client.get("/models").json())
        for _ in range(2):
            answer = client.post("/chat/completions", json=body)
            assert answer.status_code == 200
            said.append(answer.json()["choices"][0]["message"]["content"])
    assert "Paris" in said[0]
    assert said[0] == said[1]


def test_a_probe_of_what_is_not_there_is_no_error() -> None:
    assert not asyncio.run(probes.model("http://127.0.0.1:1/v1", KEY))
    assert not asyncio.run(probes.valkey("redis://127.0.0.1:1/0"))
    assert not asyncio.run(probes.postgres("postgresql://nobody@127.0.0.1:1/none"))


async def test_the_agent_knows_llama_cpp_and_continues_a_reply_of_it(served: ModelProcess) -> None:
    backend = OpenAIModel(served.url, api_key=KEY)
    question = (
        ChatMessage("system", model.INSTRUCTIONS),
        ChatMessage("user", "What is the capital of France?"),
    )

    async def reply(*messages: ChatMessage) -> tuple[str, Usage]:
        text, usage = "", Usage()
        asked = ModelRequest(model.NAME, messages, temperature=0.0, seed=1, max_tokens=32)
        async for batch in backend.stream(asked):
            text += "".join(event.text for event in batch if isinstance(event, TextDelta))
            usage = next((event for event in batch if isinstance(event, Usage)), usage)
        return text, usage

    try:
        assert model.NAME in [one.name for one in await backend.list_models()]
        assert backend.profile.name == "llama.cpp"
        text, usage = await reply(*question)
        assert "Paris" in text
        assert usage.output_tokens > 0
        rest, _ = await reply(*question, ChatMessage("assistant", text[:11]))
        assert text[:11] + rest == text
        # What is left of runs that failed: two of the user in a row, nothing of the assistant, a late rule.
        accidents = (
            question[1],
            ChatMessage("assistant", ""),
            ChatMessage("system", "Be brief."),
            question[1],
        )
        assert "Paris" in (await reply(*question[:1], *accidents))[0]
    finally:
        await backend.aclose()


async def test_an_error_of_llama_cpp_has_its_reason(served: ModelProcess) -> None:
    backend = OpenAIModel(served.url, api_key=KEY)
    try:
        asked = ModelRequest(model.NAME, [ChatMessage("user", "word " * 50_000)])
        with pytest.raises(ModelRejectedError, match="context"):
            async for _ in backend.stream(asked):
                pass
    finally:
        await backend.aclose()
