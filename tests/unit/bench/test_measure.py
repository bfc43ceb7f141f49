"""Sums over processes, and what a run's replies come to."""

import os

import pytest

from bench.histogram import Times
from bench.load import LoadError, Window
from bench.measure import by_kind, costs, kind_of, model_starts, read
from bench.model_server import ModelServer
from bench.process_cpu import ProcessGone, Usage, cpu_by_name, owners, usage
from bench.scenarios import Replies
from bench.target import IncompleteReply
from bench.watchers import each, idle_percent, waits
from tests.unit.bench.conftest import reply_of

MIB = 2**20


def test_every_process_counts_for_its_nearest_named_ancestor_and_once():
    parents = {1: 0, 10: 1, 11: 10, 12: 11, 13: 12, 20: 1}
    found = owners(parents, {"supervisor": 10, "postgresql-1": 12})
    assert {name: sorted(pids) for name, pids in found.items()} == {
        "supervisor": [10, 11],
        "postgresql-1": [12, 13],
    }


def test_a_process_that_ended_is_no_zero():
    with pytest.raises(ProcessGone, match="agent-1"):
        owners({1: 0}, {"agent-1": 99})


def test_this_process_uses_something():
    found = usage({"me": os.getpid()})["me"]
    assert found.cpu > 0
    assert found.rss > MIB
    assert cpu_by_name({"me": os.getpid()})["me"] >= found.cpu


@pytest.mark.parametrize(
    ("name", "kind"),
    [("agent-2", "agent"), ("envoy-1", "envoy"), ("supervisor", "supervisor"), ("a-b", "a-b"), ("-1", "-1")],
)
def test_a_kind_is_a_name_without_its_number(name, kind):
    assert kind_of(name) == kind


def test_costs_leave_out_the_model_and_tell_stores_apart():
    before = {name: Usage(1.0, 0, 0) for name in ("agent-1", "agent-2", "postgresql-1", "model")}
    after = {
        "agent-1": Usage(1.5, 10, 5),
        "agent-2": Usage(1.25, 20, 5),
        "postgresql-1": Usage(1.5, 40, 10),
        "model": Usage(9.0, 1, 1),
    }
    parts = by_kind(before, after)
    assert (parts["agent"].cpu, parts["agent"].rss, parts["agent"].pss) == (0.75, 30, 10)
    found = costs(parts, 10_000)
    assert found == {"cpu_per_1000": pytest.approx(0.075), "cpu_with_stores_per_1000": pytest.approx(0.125)}
    alone = costs({"model": parts["model"]}, 10_000, model_counts=True)
    assert alone["cpu_per_1000"] == pytest.approx(0.8)


def test_replies_become_percentiles(plain):
    scenario = Replies("x", "x", clients=2, asks=1, tokens=2)
    pieces = [(2_001_000, b"text: t0 \n"), (5_001_000, b"text: t1 \nend\n")]
    figures, times = read(plain, scenario, [reply_of(*pieces), reply_of(*pieces, client=1)])
    assert figures["ttft_p50_ms"] == pytest.approx(2.0, rel=0.01)
    assert figures["gap_max_ms"] == pytest.approx(3.0, rel=0.01)
    assert times["reply"].count == 2
    with pytest.raises(AssertionError, match="lost replies"):
        read(plain, scenario, [reply_of(*pieces)])
    with pytest.raises(IncompleteReply):
        read(plain, scenario, [reply_of(*pieces), reply_of(*pieces[:1])])


def test_histograms_survive_as_text_and_add_up():
    times = Times([0, -5, 1_000_000, 2_000_000])
    again = Times.decode(times.encode())
    assert (again.count, again.ms(0), again.ms(100)) == (4, 0.0, pytest.approx(2.0, rel=0.01))
    again.merge(Times([9_000_000]))
    assert again.count == 5
    assert again.ms(100) == pytest.approx(9.0, rel=0.01)
    assert Times().ms(50) == 0.0


def test_a_window_is_as_long_as_it_took():
    assert Window(1_000_000_000, 3_500_000_000, 0.1).seconds == 2.5


def test_memory_of_watchers_is_what_those_beyond_the_first_added():
    few = {
        "gateway-1": Usage(1.0, 100 * MIB, 0),
        "session-1": Usage(0, MIB, 0),
        "session-2": Usage(0, MIB, 0),
    }
    many = {
        "gateway-1": Usage(3.0, 110 * MIB, 0),
        "session-1": Usage(0, 2 * MIB, 0),
        "session-2": Usage(0, MIB, 0),
    }
    assert each(few, many, 1024) == {"gateway_kib_each": 10.0, "session_kib_each": 1.0}
    assert idle_percent(few, many, 20.0)["gateway_percent"] == pytest.approx(10.0)


def test_a_watcher_without_its_event_is_no_result():
    assert waits([{"due": 1_000_000, "event": 3_000_000}]).ms(100) == pytest.approx(2.0, rel=0.01)
    with pytest.raises(LoadError, match="1 of 2 watchers"):
        waits([{"due": 1, "event": 3}, {"due": 1, "event": 0}])


async def test_the_model_tells_when_it_began_each_named_reply():
    async with ModelServer() as server:
        from bench.load import load
        from bench.target import Ask

        body = {"model": "scripted", "stream": True}
        asks = [
            Ask(
                f"{server.base_url}/chat/completions",
                body | {"messages": [{"role": "user", "content": f"[[tokens=2 id={name}]]"}]},
            )
            for name in ("a", "b")
        ]
        async with load([asks]) as generator:
            window = await generator.go()
            await generator.replies()
        starts = await model_starts(server.base_url)
    assert list(starts) == ["a", "b"]
    assert window.began / 1e9 - 0.01 < starts["a"] <= starts["b"] < window.ended / 1e9
