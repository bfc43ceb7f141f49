"""Results over several runs, their goals, and the pages made of them."""

import pytest

from bench.goals import outcomes
from bench.histogram import Times
from bench.measure import Part, Run
from bench.page import section
from bench.plots import write_plots
from bench.report import ReportError, replaced, table, write_section
from bench.results import Result, Spread, decode, encode, merge
from bench.run import compare, meshes, warm_up
from bench.scenarios import SCENARIOS, Goal, Replies, UnknownScenario, Watchers, select
from bench.tables import ordered

FACTS = {
    "time": "2026-01-01T00:00:00+00:00",
    "cpu": "a CPU",
    "cores": 2,
    "memory_gib": 8.0,
    "kernel": "6.1",
    "python": "3.11.2",
    "load_average": 0.1,
    "commit": "abc",
    "packages": {"grpcio": "1.80"},
}


def run(target, ttft, rate, cpu):
    figures = {
        "ttft_p50_ms": ttft,
        "ttft_p99_ms": ttft * 2,
        "tokens": 1000.0,
        "tokens_per_second": rate,
        "cpu_per_1000": cpu,
        "cpu_with_stores_per_1000": cpu * 2,
        "gap_p99_ms": 2.0,
        "generator_cpu_per_1000": 0.001,
        "others_cores": 0.1,
    }
    parts = {
        "agent": Part(cpu, 2**20, 2**20),
        "postgresql": Part(cpu, 2**20, 2**20),
        "model": Part(1, 0, 0),
    }
    return Run(target, figures, parts, {"ttft": Times([int(ttft * 1e6)])})


def result(name="clients_32", *costs):
    made = Result(name, "32 clients", FACTS)
    for cpu in costs or (0.04, 0.06, 0.05):
        made.runs += [run("model alone", 1.0, 50_000.0, 0.002), run("hermesh", 9.0, 10_000.0, cpu)]
    return made


def test_a_spread_has_least_median_and_most():
    assert result().spreads("hermesh")["cpu_per_1000"] == Spread(0.04, 0.05, 0.06)
    assert result().cpu_of("hermesh", "agent") == Spread(0.04, 0.05, 0.06)
    assert result().times("hermesh", "ttft").count == 3
    assert result().times("hermesh", "gap").count == 0


def test_results_survive_as_json():
    again = decode(encode([result()]))
    assert again[0].spreads("hermesh") == result().spreads("hermesh")
    assert again[0].facts == FACTS
    assert again[0].times("model alone", "ttft").count == 3
    with pytest.raises(ValueError, match="version"):
        decode(b'{"version":0}')


def test_new_results_take_the_place_of_old_ones_and_the_rest_stays(tmp_path):
    file = tmp_path / "mesh.json"
    order = ["clients_1", "clients_32"]
    file.write_bytes(encode(merge(file, [result("clients_32", 1.0)], order)))
    together = merge(file, [result("clients_1"), result("clients_32", 0.5)], order)
    assert [one.name for one in together] == order
    assert together[1].spreads("hermesh")["cpu_per_1000"].median == 0.5


def test_the_median_decides_whether_a_goal_is_met_and_a_miss_is_said():
    met = {outcome.goal.figure: outcome.word for outcome in outcomes([result()], "hermesh")}
    assert met == {"tokens_per_second": "missed", "cpu_per_1000": "met"}
    assert not Goal("x", 5, "", "").met(5.1)
    assert Goal("x", 5, "", "", at_least=True).met(5)


def test_a_run_is_compared_with_the_model_measured_beside_it():
    mesh, alone = run("hermesh", 9.0, 10_000.0, 0.05), run("model alone", 1.0, 50_000.0, 0.002)
    compare(mesh, alone)
    assert mesh.figures["ttft_added_ms"] == 8.0
    assert mesh.figures["tokens_ratio"] == 0.2


def test_the_page_says_goals_processes_and_misses():
    text = section([result()], {"a plot": "../bench/results/cpu.svg"})
    assert "| Tokens a second at 32 clients | ≥ 12,000 tokens/s | 10,000 | **missed** |" in text
    assert "| CPU of the mesh with Envoy at 32 clients | ≤ 0.05 CPU s / 1,000 tokens |" in text
    assert "postgresql (store)" in text
    assert "![a plot](../bench/results/cpu.svg)" in text
    assert "2 cores of a CPU" in text


def test_plots_are_files_and_the_same_results_make_the_same_bytes(tmp_path):
    results = [result("clients_1"), result("clients_32")]
    first = write_plots(results, tmp_path / "a")
    second = write_plots(results, tmp_path / "b")
    assert len(first) == 3
    for title, path in first.items():
        assert path.read_bytes() == second[title].read_bytes()


def test_a_section_is_replaced_and_the_rest_is_left(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:x -->\nold\n<!-- /bench:x -->\nafter\n")
    write_section(page, "x", "new")
    write_section(page, "x", "newer\n")
    assert page.read_text() == "before\n<!-- bench:x -->\n\nnewer\n\n<!-- /bench:x -->\nafter\n"


def test_a_page_without_the_markers_is_an_error(tmp_path):
    with pytest.raises(ReportError, match="bench:y"):
        replaced("<!-- bench:x --><!-- /bench:x -->", "y", "new")
    with pytest.raises(ReportError, match="no page"):
        write_section(tmp_path / "none.md", "x", "new")


def test_tables_are_markdown_and_bars_in_cells_do_not_break_them():
    assert table(("a", "b"), [("x|y", "1\n2")]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 2 |"


def test_stores_come_after_services_and_the_model_last():
    assert ordered(["model", "postgresql", "agent", "valkey", "envoy"]) == [
        *("agent", "envoy", "postgresql", "valkey", "model")
    ]


def test_scenarios_have_names_of_their_own_and_goals_their_figures():
    names = [scenario.name for scenario in SCENARIOS]
    assert len(names) == len(set(names))
    assert {goal.figure for scenario in SCENARIOS for goal in scenario.goals} == {
        *("ttft_added_ms", "tokens_per_second", "cpu_per_1000", "added_p99_ms", "behind"),
        *("beside_p99_ms", "ttft_ratio", "gateway_kib_each", "gateway_percent", "event_max_ms"),
    }


def test_a_selection_is_by_name_and_quick_ones_are_short():
    assert [one.name for one in select(["tools", "clients_1"], quick=False)] == ["clients_1", "tools"]
    quick = select([], quick=True)
    assert [one.name for one in quick] == ["clients_1", "clients_32", "paced_100"]
    assert all(isinstance(one, Replies) and one.tokens <= 200 for one in quick)
    with pytest.raises(UnknownScenario, match="clients_32"):
        select(["nothing"], quick=False)


def test_watchers_have_a_mesh_of_their_own():
    groups = meshes(select(["clients_1", "tools", "watchers_1000", "watchers_5000"], quick=False))
    assert [[one.name for one in group] for group in groups] == [
        ["clients_1", "tools"],
        ["watchers_1000"],
        ["watchers_5000"],
    ]
    assert all(isinstance(group[0], Watchers) for group in groups[1:])


def test_warming_up_is_as_wide_and_short():
    warm = warm_up(Replies("x", "x", clients=32, asks=6, tokens=4_000, rate=50))
    assert (warm.clients, warm.asks, warm.tokens, warm.rate) == (32, 1, 50, 0.0)
    assert warm_up(Replies("x", "x", clients=1, asks=40)).asks == 5
    assert not warm_up(Replies("x", "x", clients=1, asks=40, memory=True)).memory


def test_a_script_s_reply_is_expected_as_it_is():
    scenario = Replies("x", "x", clients=1, asks=1, script="[[tool=a {}]]", reply="The tool said: 42")
    assert scenario.expected == "The tool said: 42"
    assert (scenario.reply_tokens, scenario.counted) == (4, False)
    paced = Replies("x", "x", clients=1, asks=1, tokens=2, rate=50)
    assert paced.prompt("7") == "[[tokens=2 rate=50 id=7]]"
    assert paced.expected == "t0 t1 "
