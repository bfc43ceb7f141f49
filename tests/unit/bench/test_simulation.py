import pytest

from bench.calibration import Sample, calibrate
from bench.costs import Cost, Costs, Equation, fit
from bench.simulated_mesh import Layout, SimulatedMesh, Work
from bench.simulation import MOST_AT_ONCE, Clock, Flusher, Loop, Station

KINDS = {
    "gateway": Cost(0.002, 0.0, 0.0001),
    "envoy": Cost(0.001, 0.0, 0.00005),
    "agent": Cost(0.004, 0.0, 0.0001),
    "session": Cost(0.004, 0.0, 0.0001),
    "postgresql": Cost(0.002, 0.0, 0.00003),
    "valkey": Cost(0.0005, 0.0, 0.00002),
}
COSTS = Costs(KINDS, {}, run_commits=5, commit_rate=20_000, hop=0.01)
WORK = Work(tokens=20, seconds=1.0, portions=4)


def busy(kind: str) -> float:
    """Seconds of one run when nothing is spent on waking up."""
    return KINDS[kind].run + KINDS[kind].token * WORK.tokens


def test_what_is_due_at_one_moment_happens_in_the_order_it_was_asked_for() -> None:
    clock, seen = Clock(), []
    clock.after(2.0, lambda: seen.append("later"))
    for name in ("a", "b", "c"):
        clock.after(1.0, lambda name=name: seen.append(name))
    clock.run()
    assert seen == ["a", "b", "c", "later"]
    assert clock.now == 2.0


def test_a_station_works_on_as_much_as_it_has_servers() -> None:
    clock, ended = Clock(), []
    station = Station(clock, servers=2)
    for _ in range(5):
        station.visit(1.0, lambda: ended.append(clock.now))
    clock.run()
    assert ended == [1.0, 1.0, 2.0, 2.0, 3.0]
    assert station.worked == 5.0
    assert station.present == 0


def test_work_of_a_process_waits_for_a_core() -> None:
    clock, ended = Clock(), []
    cores = Station(clock, servers=1)
    for name in ("a", "b"):
        Station(clock, 1, cores).visit(1.0, lambda name=name: ended.append((name, clock.now)))
    clock.run()
    assert ended == [("a", 1.0), ("b", 2.0)]
    assert cores.worked == 2.0


def test_a_server_that_was_taken_is_for_others_once_it_is_given_back() -> None:
    clock, seen = Clock(), []
    station = Station(clock, servers=1)
    station.take(lambda: clock.after(3.0, lambda: station.give(3.0)))
    station.take(lambda: seen.append(clock.now))
    clock.run()
    assert seen == [3.0]
    assert station.worked == 3.0


def test_a_busy_loop_pays_once_for_all_that_waits() -> None:
    clock, ended = Clock(), []
    loop = Loop(clock, wake=1.0, token=0.1)
    for name in "abc":
        loop.visit(2.0, 0.5, lambda name=name: ended.append((name, round(clock.now, 6))))
    clock.run()
    # The first was alone when it came; the others waited, and were taken together.
    assert ended == [("a", 1.7), ("b", 4.1), ("c", 4.1)]
    assert loop.wakes == 2
    assert loop.tokens == 6.0
    assert loop.worked == pytest.approx(4.1)


def test_a_loop_takes_up_no_more_at_once_than_it_may() -> None:
    clock = Clock()
    loop = Loop(clock, wake=1.0, token=0.0)
    for _ in range(1 + MOST_AT_ONCE + 1):
        loop.visit(1.0, 0.0, lambda: None)
    clock.run()
    assert loop.wakes == 3


def test_a_flusher_writes_what_gathered_meanwhile() -> None:
    clock, writes = Clock(), []

    def write(tokens: float, done):  # type: ignore[no-untyped-def]
        writes.append((clock.now, tokens))
        clock.after(1.0, done)

    flusher = Flusher(clock, write)
    for at in (0.0, 0.2, 0.4, 1.5):
        clock.after(at, lambda: flusher.add(1.0, lambda: None))
    clock.run()
    assert writes == [(0.0, 1.0), (1.0, 2.0), (2.0, 1.0)]
    assert flusher.worked == 3.0


def test_throughput_is_bound_by_the_slots_while_nothing_else_is_full() -> None:
    seen = [SimulatedMesh(Layout(agents, 8), COSTS, WORK).steady(12 * agents, 5, 20) for agents in (1, 2, 4)]
    assert [one.rate for one in seen] == pytest.approx([8, 16, 32], rel=0.1)
    assert {one.fullest for one in seen} == {"slots"}


def test_one_gateway_becomes_the_limit_and_more_of_them_lift_it() -> None:
    each = busy("gateway")
    one = SimulatedMesh(Layout(100, 8, sessions=20, envoys=10, postgres=5, valkeys=5), COSTS, WORK)
    two = SimulatedMesh(
        Layout(100, 8, sessions=20, envoys=10, postgres=5, valkeys=5, gateways=2), COSTS, WORK
    )
    narrow, wide = one.steady(600, 10, 10), two.steady(600, 10, 10)
    assert narrow.fullest == "gateway"
    assert narrow.rate == pytest.approx(1 / each, rel=0.05)
    assert wide.rate == pytest.approx(2 / each, rel=0.05)


def test_cores_that_everything_shares_bound_it_too() -> None:
    layout = Layout(32, 8, machine_cores=1)
    seen = SimulatedMesh(layout, COSTS, WORK).closed(384, 3, 1.0)
    each = sum(busy(kind) for kind in KINDS)
    assert seen.fullest == "cores"
    assert seen.rate == pytest.approx(1 / each, rel=0.1)


def test_every_run_of_a_closed_load_ends_and_the_same_seed_says_the_same() -> None:
    def once() -> tuple[float, list[float]]:
        seen = SimulatedMesh(Layout(2, 4, machine_cores=2), COSTS, WORK, seed=7).closed(12, 3, 1.0)
        return seen.rate, seen.latencies

    assert len(once()[1]) == 36
    assert once() == once()


def test_commits_of_a_run_fall_when_there_is_more_to_write_at_once() -> None:
    slow = Costs(KINDS | {"postgresql": Cost(0.002, 0.005, 0.0)}, {}, 5, 20_000, 0.01)
    few = SimulatedMesh(Layout(1, 8, sessions=1), slow, WORK).closed(2, 4, 1.0)
    many = SimulatedMesh(Layout(16, 8, sessions=1), slow, WORK).closed(128, 4, 1.0)
    assert many.commits < few.commits


def test_costs_are_found_from_equations() -> None:
    true = Cost(0.01, 0.002, 0.0005)
    shapes = [(1, 8, 4), (1, 100, 60), (1, 20, 120)]
    equations = [
        Equation(run, wake, token, run * true.run + wake * true.wake + token * true.token)
        for run, wake, token in shapes
    ]
    found = fit(equations)
    assert found.run == pytest.approx(true.run, rel=0.05)
    assert found.wake == pytest.approx(true.wake, rel=0.05)
    assert found.token == pytest.approx(true.token, rel=0.05)


def test_what_costs_nothing_is_found_to_cost_nothing() -> None:
    assert fit([]) == Cost(0.0, 0.0, 0.0)
    assert fit([Equation(1, 1, 1, 0.0)]) == Cost(0.0, 0.0, 0.0)


def test_calibrated_costs_spend_what_was_measured() -> None:
    true = Costs({kind: Cost(c.run, 0.0003, c.token / 2) for kind, c in KINDS.items()}, {}, 4, 20_000, 0.01)
    samples = []
    for tokens, rate, clients in ((4, 20.0, 24), (60, 20.0, 24), (120, 120.0, 48)):
        work = Work(tokens, tokens / rate, min(tokens, 60))
        mesh = SimulatedMesh(Layout(4, 8, machine_cores=2), true, work)
        seen = mesh.closed(clients, 3, 1.0)
        cpu = {
            kind: cost.run + cost.wake * seen.wakes[kind] + cost.token * tokens
            for kind, cost in true.kinds.items()
        }
        samples.append(Sample(4, 8, clients, tokens, rate, seen.rate, cpu, seen.commits, 0.0))
    found = calibrate(samples, {}, true.commit_rate, true.hop, 2)
    for sample in samples:
        seen = SimulatedMesh(Layout(4, 8, machine_cores=2), found, sample.work).closed(sample.clients, 3, 1.0)
        for kind, cost in found.kinds.items():
            spent = cost.run + cost.wake * seen.wakes[kind] + cost.token * sample.tokens
            assert spent == pytest.approx(sample.cpu[kind], rel=0.15)
