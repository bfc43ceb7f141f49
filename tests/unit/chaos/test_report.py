"""The figures of small histories whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.chaos.model.history import Recorder
from tests.chaos.report.__main__ import main
from tests.chaos.report.episodes import Verdict, verdicts
from tests.chaos.report.figures import Figures, bound, percentile
from tests.chaos.report.mutations import hunts
from tests.chaos.report.render import into, markdown, show
from tests.chaos.report.takeovers import Takeover, Takeovers
from tests.chaos.validate import Facts
from tests.unit.chaos.support import assert_clean, drop, of
from tests.unit.chaos.world import Run, World

BEGIN, END = "<!-- report -->", "<!-- /report -->"
VIOLATION = {"invariant": 3, "text": "a stale write", "records": []}


def said(seed: int = 7, *, violations: int = 0, mutation: str = "", seconds: float = 10.0) -> Verdict:
    return Verdict(Path(f"build/{seed}"), seed, seconds, [VIOLATION] * violations, mutation)


def figures(world: World) -> Figures:
    found = Figures()
    found.add(said(), world.history())
    return found


def takeovers(world: World) -> list[Takeover]:
    return Takeovers(Facts(world.history())).all()


def watched() -> tuple[World, Run]:
    """A run of agent-1's with a client that has all there is so far."""
    world = World()
    run = world.submit(world.session())
    world.claim(run, "agent-1")
    stream = world.open(run)
    world.append(run, "step.started", "text.delta")
    world.receive(stream)
    return world, run


def taken_over(world: World, run: Run, owner: str = "agent-2", *, after: float = 0.5) -> None:
    """Another owner goes on, and the client gets its first event so many seconds after the last record."""
    began = world.now
    world.claim(run, owner)
    world.now = began + after - 0.25
    stream = next(record for record in world.records if record["kind"] == "open")
    entry = run.log[-1]
    world.note(
        "event",
        client=stream["client"],
        stream=stream["stream"],
        run=run.name,
        seq=entry["seq"],
        type=entry["type"],
        digest=entry["digest"],
    )


# messages, runs, calls


def small() -> World:
    """Three runs, four calls, one of which was run again on a person's word."""
    world = World()
    session = world.session()
    run = world.submit(session)
    world.again(run)
    world.claim(run)
    for effect in ("pure", "idempotent", "non_idempotent"):
        world.tool(run, effect)
    call = world.call(run)
    world.begin(call)
    world.act(call)
    world.fault()
    world.claim(run, "agent-2")
    world.park(run)
    world.resolve(call, "retry")
    world.claim(run, "agent-2")
    world.begin(call)
    world.act(call)
    world.complete(call)
    world.finish(run)
    cancelled = world.submit(session, answered=False)
    world.claim(cancelled)
    world.cancel(cancelled)
    waiting = world.submit(session)
    world.claim(waiting)
    world.begin(world.call(waiting))
    world.park(waiting)
    world.refuse(session)
    world.watch(run)
    world.live(run, 2)
    assert_clean(world)
    return world


def test_what_is_counted_of_a_clean_history() -> None:
    world = small()
    found = figures(world)
    assert (found.acknowledged, found.lost, found.duplicated) == (2, 0, 0)
    assert found.runs == {"completed": 1, "cancelled": 1, "waiting for a person": 1}
    assert (found.calls, found.acts, found.repeated) == (5, 5, 0)
    assert found.effects == {1: 1, 2: 1, 3: 3}
    assert found.stale == 0
    assert found.entries == sum(run.last_seq for run in world.runs)
    assert found.live == world.runs[0].last_seq - 1
    assert found.refusals == {"SERVICE_UNAVAILABLE": 1}
    assert found.broken == {"kill agent": 1}
    assert found.seconds == {(7, "build/7"): 10.0}
    assert not found.failed


def test_a_second_acknowledgement_of_a_key_is_the_same_message() -> None:
    world = small()
    assert len(of(world, "accepted")) == 3
    assert figures(world).acknowledged == 2


@pytest.mark.parametrize("kind", ["run_row", "log", "message"])
def test_a_lost_message(kind: str) -> None:
    world = small()
    drop(world, *of(world, kind, run=world.runs[0].name))
    assert (figures(world).lost, figures(world).duplicated) == (1, 0)


def test_a_message_in_the_place_of_which_is_another_is_lost() -> None:
    world = small()
    of(world, "message", role="user")[0]["digest"] = "0" * 16
    assert figures(world).lost == 1


def test_what_nobody_acknowledged_is_not_lost() -> None:
    world = small()
    drop(world, *of(world, "run_row", run=world.runs[1].name))
    assert figures(world).lost == 0


def test_a_message_that_made_two_runs_is_duplicated() -> None:
    world = small()
    of(world, "key_row", run=world.runs[1].name)[0]["key"] = world.runs[0].key
    assert (figures(world).lost, figures(world).duplicated) == (0, 1)


def test_a_message_that_is_in_the_conversation_twice_is_duplicated() -> None:
    world = small()
    world.records.append(dict(of(world, "message", role="user")[0]))
    assert figures(world).duplicated == 1


def test_a_repeated_side_effect() -> None:
    world = small()
    acts = of(world, "act", effect="non_idempotent")
    world.records += [dict(acts[0]), dict(acts[0]), dict(of(world, "act", effect="idempotent")[0])]
    found = figures(world)
    assert (found.acts, found.repeated) == (8, 2)


def test_a_stale_write_in_either_store() -> None:
    world = small()
    of(world, "log", run=world.runs[0].name)[-1]["fence"] = 1
    of(world, "live")[0]["digest"] = "0" * 16
    assert figures(world).stale == 2


def test_a_stuck_run() -> None:
    world = small()
    of(world, "run_row")[0]["status"] = 1
    assert figures(world).runs["stuck"] == 1


def test_why_runs_failed() -> None:
    world = World()
    session = world.session()
    for _ in range(2):
        run = world.submit(session)
        world.claim(run)
        world.finish(run, "run.failed")
    of(world, "log", type="run.failed")[0]["reason"] = "MODEL_UNAVAILABLE"
    assert figures(world).reasons == {"MODEL_UNAVAILABLE": 1, "not recorded": 1}


def test_streams() -> None:
    world = World()
    run = world.whole(world.submit(world.session()))
    first = world.open(run)
    world.receive(first, 3)
    world.close(first, "cut")
    second = world.open(run)
    world.receive(second)
    world.close(second)
    world.watch(run, "bob")
    found = figures(world)
    assert (found.streams, found.reconnects) == (3, 1)
    assert found.events == 2 * run.last_seq
    assert found.closed == {"cut": 1, "terminal": 2}


def test_drains() -> None:
    world = World()
    with world.drain():
        world.whole(world.submit(world.session()))
    world.now += 100
    world.fault()
    with world.drain():
        pass
    assert figures(world).drains == {"undisturbed": 1, "disturbed": 1}


def test_figures_of_several_episodes_add_up() -> None:
    found = Figures()
    for seed in (1, 2):
        found.add(said(seed, violations=seed - 1), small().history())
    assert found.acknowledged == 4
    assert [seed for seed, _ in found.failed] == [2]
    assert found.odds()[0] == ("acknowledged message lost or duplicated", 4, 0)


# takeovers


def test_the_time_of_a_takeover_is_from_the_kill_to_the_new_owners_first_event() -> None:
    world, run = watched()
    world.fault("kill", "agent-1")
    taken_over(world, run, after=0.75)
    assert takeovers(world) == [Takeover(run.name, "kill agent", pytest.approx(0.75))]


def test_what_the_former_owner_had_written_does_not_count() -> None:
    world, run = watched()
    world.append(run, "text.delta")
    world.fault("kill", "agent-1")
    late = world.open(run)
    world.receive(late, 1)
    taken_over(world, run, after=2.0)
    (takeover,) = takeovers(world)
    assert takeover.seconds == pytest.approx(2.5)


def test_re_attachments_and_first_claims_are_no_takeovers() -> None:
    world, run = watched()
    world.fault("kill", "session-1")
    world.reattach(run)
    assert takeovers(world) == []


def test_a_run_that_waited_for_a_person_was_not_taken_over() -> None:
    world = small()
    assert [takeover.cause for takeover in takeovers(world)] == ["kill agent"]


def test_a_run_whose_agent_died_after_a_person_had_spoken_was() -> None:
    world, run = watched()
    call = world.call(run)
    world.begin(call)
    world.park(run)
    world.resolve(call, "completed")
    world.claim(run, "agent-2")
    world.append(run, "step.started")
    world.fault("kill", "agent-2")
    taken_over(world, run, "agent-3")
    assert [takeover.cause for takeover in takeovers(world)] == ["kill agent"]


def test_the_fault_that_names_the_owner_is_the_cause_though_another_came_later() -> None:
    world, run = watched()
    world.fault("freeze", "agent-1")
    world.fault("kill", "gateway-1")
    world.fault("kill", "agent-12")
    taken_over(world, run, after=10.0)
    assert takeovers(world) == [Takeover(run.name, "freeze agent", pytest.approx(10.5))]


def test_without_one_it_is_the_last() -> None:
    world, run = watched()
    world.fault("network", "mesh", "hold 2 s")
    world.fault("kill", "envoy-1")
    taken_over(world, run)
    assert [takeover.cause for takeover in takeovers(world)] == ["kill envoy"]


def test_what_was_broken_before_the_owner_had_the_run_is_not_the_cause() -> None:
    world = World()
    run = world.submit(world.session())
    world.fault("kill", "agent-1")
    world.claim(run, "agent-1")
    world.claim(run, "agent-2")
    assert takeovers(world) == [Takeover(run.name, "nothing known", None)]


def test_a_crash_at_a_point_strikes_when_it_is_healed() -> None:
    world, run = watched()
    world.fault("point", "agent.append.sent", "crash@3")
    world.now += 2
    world.healed("point", "agent.append.sent")
    taken_over(world, run, after=0.5)
    assert takeovers(world) == [Takeover(run.name, "crash in agent", pytest.approx(0.5))]


def test_what_happens_at_a_point_is_told_apart() -> None:
    world = small()
    world.fault("point", "session.append.before", "hang:1.5@2")
    world.fault("point", "tool.act.after", "crash")
    assert figures(world).broken == {"kill agent": 1, "hang in session": 1, "crash in tool": 1}


def test_a_point_that_nobody_came_by_breaks_nothing() -> None:
    world, run = watched()
    world.fault("point", "agent.append.sent", "crash@3")
    world.note("mark", text="nobody came by agent.append.sent")
    world.healed("point", "agent.append.sent")
    taken_over(world, run)
    assert takeovers(world) == [Takeover(run.name, "nothing known", None)]
    assert figures(world).broken == {}


def test_a_takeover_that_nobody_waited_for_has_no_time() -> None:
    world = World()
    run = world.submit(world.session())
    world.claim(run, "agent-1")
    world.fault("kill", "agent-1")
    world.claim(run, "agent-2")
    world.finish(run)
    world.watch(run)
    assert takeovers(world) == [Takeover(run.name, "kill agent", None)]


def test_a_client_that_left_by_itself_does_not_measure() -> None:
    world, run = watched()
    stream = first_stream(world)
    world.fault("kill", "agent-1")
    world.note("closed", client="ada", stream=stream, reason="cut")
    world.claim(run, "agent-2")
    world.now += 60
    later = world.open(run)
    world.receive(later)
    assert takeovers(world) == [Takeover(run.name, "kill agent", None)]


def test_a_client_whose_stream_broke_does() -> None:
    world, run = watched()
    stream = first_stream(world)
    world.fault("kill", "agent-1")
    world.note("closed", client="ada", stream=stream, reason="broken")
    world.claim(run, "agent-2")
    later = world.open(run)
    world.receive(later)
    (takeover,) = takeovers(world)
    assert takeover.seconds == pytest.approx(1.0)


def first_stream(world: World) -> str:
    name: str = next(record for record in world.records if record["kind"] == "open")["stream"]
    return name


# numbers


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1.0), (0.5, 2.0), (0.51, 3.0), (0.75, 3.0), (0.99, 4.0), (1.0, 4.0)]
)
def test_percentiles_are_values_that_were_measured(share: float, value: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == value


def test_the_bound_is_for_no_failures_only() -> None:
    assert bound(3000, 0) == pytest.approx(0.001)
    assert bound(3000, 1) is None
    assert bound(0, 0) is None


# mutations


def test_mutations_are_told_with_the_seed_that_caught_them() -> None:
    played = [
        said(1, mutation="no-fence"),
        said(2, mutation="no-fence", violations=1),
        said(3, mutation="quiet"),
        said(4, mutation="gone", violations=1),
        said(5),
        said(6, violations=1),
    ]
    found = hunts(played, {"no-fence": "Fences are not looked at.", "quiet": "Nothing.", "new": "More."})
    assert [(hunt.name, hunt.tried, hunt.seed, hunt.invariants) for hunt in found.hunts] == [
        ("no-fence", 2, 2, [3]),
        ("quiet", 1, None, []),
        ("new", 0, None, []),
        ("gone", 1, 4, [3]),
    ]
    assert [hunt.name for hunt in found.missed] == ["quiet"]
    assert (found.controls, found.unclean) == (2, 1)
    text = markdown(figures(small()), found)
    assert "| no-fence | Fences are not looked at. | 2 | 2 | 3 |" in text
    assert "| quiet | Nothing. | **missed** | 1 |  |" in text
    assert "| new | More. | not played | 0 |  |" in text
    assert "| (none) | The same faults on the code as it is. | 1 of 2 clean | 2 |  |" in text


# pages


def test_the_section_has_the_figures() -> None:
    world, run = watched()
    world.fault("kill", "agent-1")
    taken_over(world, run, after=0.75)
    world.finish(run)
    text = markdown(figures(world), None)
    assert text.startswith("Made by `make chaos-report` from 1 episodes, seeds 7 to 7.")
    assert "| **messages acknowledged** | 1 |" in text
    assert "| kill agent | 1 | 1 | 0.75 s | 0.75 s | 0.75 s |" in text
    assert "What did not hold" not in text


def test_the_section_says_what_did_not_hold() -> None:
    found = Figures()
    found.add(said(9, violations=60), small().history())
    text = markdown(found, None)
    assert "| 9 | 3 | a stale write |" in text
    assert "and 10 more" in text
    assert "- Invariant 3: nothing is written under a stale fence, in PostgreSQL or Redis." in text


def test_the_terminal_shows_the_same() -> None:
    console = Console(record=True, width=120, quiet=True)
    console.quiet = False
    with console.capture() as captured:
        show(console, figures(small()), hunts([said(3, mutation="quiet")], {}))
    shown = captured.get()
    for text in ("messages acknowledged", "repeated side effects", "SERVICE_UNAVAILABLE", "missed"):
        assert text in shown


def test_a_page_keeps_what_is_around_its_section() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert into(page, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert into(into(page, "new"), "newer") == into(page, "newer")


@pytest.mark.parametrize("page", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_its_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="must hold"):
        into(page, "new")


# the command


def episode(folder: Path, world: World, **fields: Any) -> None:
    """Writes an episode as the suite does: what the ledger saw in a file of its own."""
    folder.mkdir(parents=True)
    files = {"act": folder / "ledger.jsonl"}
    for record in world.history().records:
        path = files.get(record["kind"], folder / "history.jsonl")
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    verdict = {"seed": 1, "faults": [], "violations": [], "seconds": 9.5} | fields
    (folder / "verdict.json").write_text(json.dumps(verdict))


def test_the_command_writes_page_and_json(tmp_path: Path) -> None:
    episode(tmp_path / "chaos" / "1", small())
    episode(tmp_path / "chaos" / "2", small(), seed=2, seconds=20.5)
    episode(tmp_path / "chaos" / "3", small(), seed=3, mutation="lease-kept")
    page, everything = tmp_path / "page.md", tmp_path / "all.json"
    page.write_text(f"# Page\n{BEGIN}\n{END}\n")
    assert main([str(tmp_path / "chaos"), "--into", str(page), "--json", str(everything)]) == 0
    assert "from 2 episodes, seeds 1 to 2." in page.read_text()
    written = json.loads(everything.read_text())
    assert written["messages"] == {"acknowledged": 4, "lost": 0, "duplicated": 0}
    assert (written["acts"], written["repeated_side_effects"]) == (10, 0)
    assert written["seconds"] == [{"seed": 1, "seconds": 9.5}, {"seed": 2, "seconds": 20.5}]


def test_the_command_fails_when_an_episode_found_something(tmp_path: Path) -> None:
    episode(tmp_path / "1", small(), violations=[VIOLATION])
    assert main([str(tmp_path)]) == 1


def test_the_command_fails_when_a_mutation_was_missed(tmp_path: Path) -> None:
    episode(tmp_path / "chaos" / "1", small())
    episode(tmp_path / "mutants" / "lease-kept" / "1", small(), mutation="lease-kept")
    assert main([str(tmp_path / "chaos"), "--mutations", str(tmp_path / "mutants")]) == 1


def test_the_command_goes_on_without_mutations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episode(tmp_path / "1", small())
    assert main([str(tmp_path), "--mutations", str(tmp_path / "nowhere")]) == 0
    assert "make chaos-mutations" in capsys.readouterr().err


def test_the_command_refuses_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no episode" in capsys.readouterr().err


def test_a_file_that_is_no_verdict_is_named(tmp_path: Path) -> None:
    (tmp_path / "verdict.json").write_text("{}")
    with pytest.raises(ValueError, match=r"verdict\.json is not a verdict"):
        list(verdicts(tmp_path))


def test_a_history_that_a_crash_cut_off_can_be_read(tmp_path: Path) -> None:
    with Recorder(tmp_path / "history.jsonl") as recorder:
        recorder.write("mark", text="whole")
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"t": 1, "n": 2, "ki')
    (tmp_path / "verdict.json").write_text('{"seed": 1, "seconds": 1, "violations": []}')
    (verdict,) = verdicts(tmp_path)
    assert [record["text"] for record in verdict.history().records] == ["whole"]
