"""Peers: how their replies are read, what is looked for in their stores, and ratios, goals and the page."""

import re
import sys

import orjson
import pytest

from bench.connection import Request
from bench.measure import Part, Run
from bench.peers import install
from bench.peers.catalog import PEERS
from bench.peers.compare import RATIOS, outcomes, wins
from bench.peers.kept import tokens_in
from bench.peers.page import section
from bench.peers.run import result_name, scenarios
from bench.peers.targets import AgnoTarget, ChatTarget, LangGraphTarget, ResponsesTarget
from bench.results import Result
from bench.target import IncompleteReply

FACTS = {
    "time": "2026-01-01T00:00:00+00:00",
    "cpu": "a CPU",
    "cores": 2,
    "memory_gib": 8.0,
    "kernel": "6.1",
    "python": "3.12.1",
    "load_average": 0.1,
    "commit": "abc",
    "packages": {"grpcio": "1.80"},
    "peer": "agno",
    "title": "Agno AgentOS",
    "versions": {"agno": "3.1"},
    "mesh_kept": {"seen": 40, "postgres": 40, "valkey": None, "after": 40},
    "kept": {"seen": 40, "postgres": 0, "valkey": 40, "after": 40},
}


def run(target, rate, cpu, ttft=10.0):
    figures = {"tokens_per_second": rate, "cpu_per_1000": cpu, "ttft_p50_ms": ttft, "others_cores": 0.1}
    return Run(target, figures, {"server": Part(1, 2**20, 0), "model": Part(1, 2**30, 0)})


def result(target, durable, *pairs, title="32 clients"):
    facts = FACTS | {"target": target, "durable": durable}
    made = Result(result_name(target, title), title, facts)
    for ours, theirs in pairs:
        made.runs += [run("hermesh", *ours), run(target, *theirs)]
    return made


def sse(*events, name=""):
    head = f"event: {name}\n".encode() if name else b""
    return b"".join(head + b"data: " + orjson.dumps(event) + b"\n\n" for event in events)


def chat_chunk(text, finish=None):
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}


BODIES = [
    (
        ChatTarget("ogx chat", "", {}, durable=False),
        sse(chat_chunk(""), chat_chunk("t0 "), chat_chunk("t1 ")),
        sse(chat_chunk(None, "stop")),
    ),
    (
        ResponsesTarget("ogx Responses", "", {}, durable=False),
        sse(
            {"type": "response.created"},
            {"type": "response.output_text.delta", "delta": "t0"},
            {"type": "response.output_text.delta", "delta": " t1 "},
        ),
        sse({"response": {"output": [{"text": "t0 t1 "}]}, "type": "response.completed"}),
    ),
    (
        AgnoTarget("Agno", "", {}, durable=True, background=True),
        sse(
            {"event": "RunContent", "content": ""},
            {"event": "RunContent", "content": "t0 "},
            {"event": "RunContent", "content": "t1 "},
            name="RunContent",
        ),
        sse({"event": "RunCompleted", "content": "t0 t1 "}, name="RunCompleted"),
    ),
    (
        LangGraphTarget("Aegra", "", {}, durable=True),
        sse({"run_id": "1"}, name="metadata")
        + sse(*([{"content": text, "type": "AIMessageChunk"}, {}] for text in ("", "t0 ", "t1 "))),
        sse([{"content": "", "type": "AIMessageChunk", "chunk_position": "last"}, {}], name="messages"),
    ),
]


@pytest.mark.parametrize(("target", "body", "end"), BODIES, ids=lambda one: getattr(one, "name", ""))
def test_each_peers_reply_is_read_whole_or_not_at_all(target, body, end):
    assert target.text(body + end) == "t0 t1 "
    with pytest.raises(IncompleteReply):
        target.text(body)
    found = target.first_token.search(body)
    assert found is not None
    assert b"t0" in body[found.start() : found.end() + 2]
    assert b"t1" not in body[: found.end() + 2]


async def test_agno_is_asked_by_a_form_and_ogx_by_json():
    agno = AgnoTarget("Agno", "http://127.0.0.1:1", {}, durable=True, background=True)
    ask = await agno.prepare("[[tokens=2]]")
    sent = Request.render("POST", ask.url, ask.headers, dict(ask.body), form=ask.form).payload
    assert b"application/x-www-form-urlencoded" in sent
    assert sent.endswith(b"message=%5B%5Btokens%3D2%5D%5D&stream=true&background=true")
    ask = await ChatTarget("ogx", "http://127.0.0.1:1", {}, durable=False).prepare("hi")
    sent = Request.render("POST", ask.url, ask.headers, dict(ask.body), form=ask.form).payload
    assert b"application/json" in sent
    assert orjson.loads(sent.partition(b"\r\n\r\n")[2])["stream"] is True


def test_tokens_are_found_in_rows_in_json_and_in_binary_columns():
    assert tokens_in(b'(1,"t0 t1 t2 ")') == {0, 1, 2}
    assert tokens_in(b'{"content": "t3 "}') == {3}
    assert tokens_in(b"(7,\\\\x" + b"t4 t5 ".hex().encode() + b")") == {4, 5}
    assert tokens_in(b"(7,tables,start,t79 ,[[tokens=80 rate=20]])") == set()


def test_ratios_are_above_one_where_the_mesh_is_better():
    one = result("Agno background", True, ((10_000, 0.05), (1_000, 0.5)), ((9_000, 0.05), (1_000, 0.4)))
    rate, cpu = RATIOS[0].of(one), RATIOS[1].of(one)
    assert (rate.least, rate.median, rate.most) == (9, 9.5, 10)
    assert (round(cpu.least, 6), round(cpu.most, 6)) == (8, 10)
    assert RATIOS[5].of(one) is None
    assert wins(one) == []


def test_what_a_peer_is_better_at_is_said():
    one = result("ogx chat", False, ((10_000, 0.2, 9.0), (4_000, 0.1, 6.0)))
    assert wins(one) == ["CPU a token", "first token, p50"]
    page = section([one])
    assert "| ogx chat | 2.50 | **0.50** | **0.67** | CPU a token, first token, p50 |" in page
    assert "**missed**" in page


def test_goals_are_held_against_the_best_of_their_kind():
    results = [
        result("Agno background", True, ((10_000, 0.05), (1_000, 0.5))),
        result("Aegra", True, ((10_000, 0.05), (2_500, 0.8))),
        result("ogx chat", False, ((10_000, 0.05), (4_000, 0.1))),
        result("Agno stream", False, ((10_000, 0.05), (9_000, 0.01)), title="1 client"),
    ]
    found = [(one.peer, round(one.ratio.median, 6), one.met) for one in outcomes(results)]
    assert found == [("Aegra", 4, False), ("Agno background", 10, True), ("ogx chat", 2, True)]
    assert outcomes([]) == []


def test_the_page_says_what_was_not_measured_and_what_was_durable():
    broken = result("Agno background", True)
    broken.facts["failed"] = "Agno background: a reply ended early"
    page = section([broken, result("ogx chat", False, ((10_000, 0.05), (4_000, 0.1)))])
    assert "not measured: Agno background: a reply ended early" in page
    assert "| the mesh | 40 | 40 | not looked at | 40 |" in page
    assert "| Agno background | 40 | 0 | 40 | 40 |" in page


def test_every_peer_is_pinned_whole_and_is_asked_under_a_name_of_its_own():
    names = [target.name for peer in PEERS for target in peer.named()]
    assert len(set(names)) == len(names)
    for peer in PEERS:
        assert set(install.versions(peer.files, peer.packages)) == set(peer.packages)
        lines = (install.FOLDER / peer.files / "requirements.txt").read_text().splitlines()
        assert all(re.match(r"[a-z0-9._-]+(\[.+\])?==", line) for line in lines if not line.startswith("#"))


def test_a_python_for_peers_is_found_by_its_version(monkeypatch):
    monkeypatch.setattr(install, "PYTHONS", (tuple(sys.version_info[:2]),))
    monkeypatch.setenv("BENCH_PYTHON", sys.executable)
    assert install.find_python() == sys.executable
    monkeypatch.setattr(install, "PYTHONS", ((2, 0),))
    with pytest.raises(install.InstallError, match="BENCH_PYTHON"):
        install.find_python()


def test_peers_get_the_mesh_benchs_own_scenarios():
    assert [one.name for one in scenarios()] == ["clients_1", "clients_32", "paced_100"]
    assert [one.name for one in scenarios(["paced_100"])] == ["paced_100"]
    assert all(one.tokens == 200 for one in scenarios())
