import pytest

from bench.costs import Cost, Costs, solve
from bench.measure import Part, Run
from bench.simulated_mesh import Layout, SimulatedMesh, Work
from bench.simulation import Clock, Station

KINDS = {
    "gateway": Cost(0.002, 0.0001),
    "envoy": Cost(0.001, 0.00005),
    "agent": Cost(0.004, 0.0001),
    "session": Cost(0.004, 0.0001),
    "postgresql": Cost(0.002, 0.00003),
    "valkey": Cost(0.0005, 0.00002),
}
COSTS = Costs(KINDS, {}, commits=5, commands=20, commit_rate=2000, hop=0.01)
WORK = Work(tokens=20, seconds=1.0, portions=4)


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


def test_throughput_is_bound_by_the_slots_while_nothing_else_is_full() -> None:
    seen = [SimulatedMesh(Layout(agents, 8), COSTS, WORK).steady(12 * agents, 5, 20) for agents in (1, 2, 4)]
    assert [one.rate for one in seen] == pytest.approx([8, 16, 32], rel=0.1)
    assert {one.fullest for one in seen} == {"slots"}


def test_one_gateway_becomes_the_limit_and_more_of_them_lift_it() -> None:
    each = KINDS["gateway"].of(WORK.tokens)
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
    each = sum(cost.of(WORK.tokens) for cost in KINDS.values())
    assert seen.fullest == "cores"
    assert seen.rate == pytest.approx(1 / each, rel=0.1)


def test_every_run_of_a_closed_load_ends_and_the_same_seed_says_the_same() -> None:
    def once() -> tuple[float, list[float]]:
        seen = SimulatedMesh(Layout(2, 4, machine_cores=2), COSTS, WORK, seed=7).closed(12, 3, 1.0)
        return seen.rate, seen.latencies

    assert len(once()[1]) == 36
    assert once() == once()


def test_costs_of_a_run_and_of_a_token_are_told_apart() -> None:
    def run(tokens: int) -> Run:
        replies, seconds = 10, 4.0
        cpu = replies * (0.01 + 0.002 * tokens) + 0.1 * seconds
        figures = {"tokens": replies * tokens, "replies": replies, "seconds": seconds}
        return Run("mesh", figures, {"agent": Part(cpu, 0, 0)})

    cost = solve(run(5), run(50), {"agent": 0.1})["agent"]
    assert cost.run == pytest.approx(0.01)
    assert cost.token == pytest.approx(0.002)
    with pytest.raises(ValueError, match="one length"):
        solve(run(5), run(5), {})
