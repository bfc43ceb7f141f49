"""Bugs that the suite must find: each breaks one rule of the code, and names what is done to bring it out.

A mutation replaces a text that stands exactly once in a file. What it is caught by is not said here: the
checker has to find it as it would find a bug that nobody thought of.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.chaos.faults import faults, mesh_faults, store_faults
from tests.chaos.faults.cluster import ROOT
from tests.chaos.faults.faults import Stage
from tests.chaos.faults.plan import Planned

_COPIED = ("meshkit", "services", "gateway", "launcher", "bench", "gen", "deploy", "tests", "pyproject.toml")
_LOG = "services/session/store/sql/log.sql"
_FUNCTIONS = "services/session/store/migrations/0003_pre_functions.sql"
_CLAIM = "services/session/store/migrations/0005_pre_context_pages.sql"
_ENDS = "services/session/store/migrations/0006_pre_ends.sql"
_BEGIN = "services/session/store/migrations/0009_pre_tries.sql"


@dataclass(frozen=True, slots=True)
class Mutation:
    """One bug.

    Attributes:
        name: short.
        what: the rule that no longer holds, in words.
        file: where.
        old: the text that stands there once.
        new: what stands there instead.
        faults: what brings it out, again and again; empty draws from `theme`.
        theme: of the plan.
        prefill: whether the model continues what was cut off.
        megabytes: of results in each run of one more client.
        tries: with how many seeds it is looked for.
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    faults: Sequence[Planned] = ()
    theme: str = "mixed"
    prefill: bool = True
    tries: int = 4
    megabytes: float = 0.0

    def apply(self, tree: Path) -> None:
        """Breaks a copy of the code.

        Raises:
            ValueError: The text is not there exactly once: the code went on, and the mutation has to follow.
        """
        path = tree / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: its text stands {text.count(self.old)} times in {self.file}")
        path.write_text(text.replace(self.old, self.new))


def copy_tree(target: Path) -> Path:
    """Copies the code that a mesh runs, to be broken."""
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    return target


def _points(*plan: tuple[float, str, str]) -> list[Planned]:
    """Crashes at named points: (when, point, action)."""

    def at(name: str, action: str) -> faults.Fault:
        return partial(faults.at_point, name=name, action=action)

    return [Planned(when, at(name, action)) for when, name, action in plan]


async def _supervisor_alone(stage: Stage) -> None:
    await mesh_faults.supervisor_lost(stage, alone=True)


_AGENTS_DIE = [Planned(when, faults.kill_agent) for when in (1.5, 3.5, 5.5)]

MUTATIONS = (
    Mutation(
        "no-fence-check",
        "An append is taken under any fence, as long as its place in the log is right.",
        _LOG,
        "WHERE l.session_id = b.session_id AND l.run_id = b.run_id AND l.fence = b.fence\n      AND l.next_seq",
        "WHERE l.session_id = b.session_id AND l.run_id = b.run_id\n      AND l.next_seq",
        faults=[Planned(1.0, faults.late_flush)],
        tries=8,
    ),
    Mutation(
        "ack-before-commit",
        "An append is acknowledged, and shown to readers, before PostgreSQL has it.",
        "services/session/flusher.py",
        "        started = time.perf_counter()\n        try:\n            async with asyncio.timeout(_WRITE_TIMEOUT):\n"
        "                results = await self._writer.append(",
        "        started = time.perf_counter()\n        for early in batch:\n            after = early.append.first_seq + "
        "len(early.append.events)\n            self._settle(early, AppendResult(early.append.run_id, "
        "early.append.first_seq, AppendOutcome.COMMITTED, after))\n        try:\n"
        "            async with asyncio.timeout(_WRITE_TIMEOUT):\n"
        "                results = await self._writer.append(",
        faults=_points((1.5, "session.append.before", "crash@3"), (4, "session.append.before", "crash@3")),
    ),
    Mutation(
        "publish-before-commit",
        "Redis has an event before PostgreSQL does.",
        "services/session/flusher.py",
        "        started = time.perf_counter()\n        try:\n            async with asyncio.timeout(_WRITE_TIMEOUT):\n"
        "                results = await self._writer.append(",
        "        started = time.perf_counter()\n        for early in batch:\n            self._on_commit(early.append)\n"
        "        await asyncio.sleep(0.02)\n        try:\n            async with asyncio.timeout(_WRITE_TIMEOUT):\n"
        "                results = await self._writer.append(",
        faults=_points((1.5, "session.append.before", "crash@3"), (4, "session.append.before", "crash@3")),
    ),
    Mutation(
        "running-call-runs-again",
        "A takeover lets a call that may have acted run again, whatever its effect.",
        _CLAIM,
        "UPDATE session.tool_call t SET state = 5\n        WHERE t.run_id = p_run AND t.state = 2 AND t.effect = 3;",
        "UPDATE session.tool_call t SET state = 1\n        WHERE t.run_id = p_run AND t.state = 2 AND t.effect = 3;",
        faults=_points(
            (1.0, "tool.act.after", "crash"),
            (3.0, "tool.complete.before", "crash"),
            (5.0, "tool.act.after", "crash"),
        )
        + [Planned(when, faults.kill_agent) for when in (1.2, 2.2, 3.2, 4.2, 5.2)],
    ),
    Mutation(
        "completed-call-runs-again",
        "The stored result of a call is not used: it begins again.",
        _BEGIN,
        "WHEN v_call.state IN (3, 4) THEN 2",
        "WHEN v_call.state IN (3, 4) THEN 1",
        faults=_points(
            (1.0, "agent.tool.after", "crash"),
            (3.0, "tool.complete.after", "crash"),
            (5.0, "agent.tool.after", "crash"),
        ),
    ),
    Mutation(
        "key-of-the-try",
        "An idempotent tool gets another key at each try.",
        "services/tool/acting.py",
        "idempotency_key=entry.idempotency_key or request.call_id,",
        'idempotency_key=f"{request.call_id}:{request.fence}",',
        faults=_points((1.0, "tool.act.after", "crash"), (3.0, "tool.act.after", "crash")) + _AGENTS_DIE,
    ),
    Mutation(
        "skipped-seq",
        "What the store writes by itself leaves a seq out.",
        _FUNCTIONS,
        "v_seq integer := session.next_seq(p_run);",
        "v_seq integer := session.next_seq(p_run) + 1;",
        theme="kills",
    ),
    Mutation(
        "reused-fence",
        "A takeover keeps the fence of the one before.",
        _CLAIM,
        "UPDATE session.lease l SET run_id = p_run, fence = l.fence + 1, attach = 0, next_seq = v_next,",
        "UPDATE session.lease l SET run_id = p_run, fence = greatest(l.fence, 1), attach = 0, next_seq = v_next,",
        faults=_AGENTS_DIE,
    ),
    Mutation(
        "cursor-ignored",
        "A watch begins at the start of the log, whatever its cursor.",
        "services/session/watch.py",
        "async with aclosing(self._follow(run, after_seq)) as batches:",
        "async with aclosing(self._follow(run, 0)) as batches:",
        faults=[Planned(2.0, faults.kill_gateway)],
    ),
    Mutation(
        "live-events-unchecked",
        "A watcher passes on what comes live without a look at what it has.",
        "services/session/watch.py",
        "batch, gap = following(live, cursor)",
        "batch, gap = live, False",
        theme="kills",
    ),
    Mutation(
        "forgotten-key",
        "An idempotency key does not keep the same input from being accepted again.",
        _FUNCTIONS,
        "IF p_request_id <> '' THEN",
        "IF p_request_id = 'never' THEN",
        faults=[
            *_points((1.0, "session.submit.after", "crash"), (3.0, "gateway.submit.after", "crash")),
            *_points((5.0, "session.submit.after", "crash")),
        ],
    ),
    Mutation(
        "next-run-forgotten",
        "The end of a run does not make the session's next one due.",
        _ENDS,
        "WHERE run_id = v_next.run_id AND status = 1 AND dispatch_after IS NULL;",
        "WHERE run_id = v_next.run_id AND status = 1 AND dispatch_after IS NULL AND false;",
        faults=[Planned(2.0, faults.kill_gateway)],
        tries=1,
    ),
    Mutation(
        "lease-kept",
        "A run that is over keeps its session's lease.",
        _ENDS,
        "UPDATE session.lease SET owner = NULL, lease_until = NULL WHERE session_id = v_session AND run_id = p_run;",
        "PERFORM 1;",
        faults=[Planned(2.0, faults.kill_gateway)],
        tries=1,
    ),
    Mutation(
        "queued-input-forgotten",
        "Input that is interrupted while it waits does not join the conversation.",
        _ENDS,
        "PERFORM session.join_input(v_ended);",
        "UPDATE session.run SET input = NULL WHERE run_id = v_ended;",
        faults=[Planned(2.0, faults.kill_gateway)],
    ),
    Mutation(
        "silent-splice",
        "A reply that is begun anew does not tell its readers to drop what they have of it.",
        "services/agent/runs/runner.py",
        "self._journal.reset(decision.from_seq, reason, self._requests + 1, self.spec.attempt)",
        "pass",
        faults=_AGENTS_DIE,
        prefill=False,
    ),
    Mutation(
        "prefix-forgotten",
        "A reply that is continued is asked for from its beginning.",
        "services/agent/runs/runner.py",
        "            prefix=decision.prefix,\n            max_tokens",
        '            prefix="",\n            max_tokens',
        faults=_AGENTS_DIE,
    ),
    Mutation(
        "endpoints-forgotten",
        "A supervisor that takes over lists only the replicas that it has come to.",
        "launcher/supervisor.py",
        "            known |= {child.address for child in self._waiting(service)}\n",
        "",
        faults=[Planned(1.0, _supervisor_alone)],
        tries=3,
    ),
    Mutation(
        "arguments-rewritten",
        "A call's arguments are read and written anew on their way to readers.",
        "services/agent/domain/restore.py",
        '{"call_id": call.call_id, "name": call.name, "arguments": orjson.Fragment(call.arguments)}',
        '{"call_id": call.call_id, "name": call.name, "arguments": orjson.loads(call.arguments)}',
        faults=[Planned(2.0, faults.kill_gateway)],
    ),
    Mutation(
        "page-forgotten",
        "A takeover goes on without the second page of what its run has.",
        "services/agent/runs/start.py",
        "messages=(*self.messages, *(one for page in pages for one in _messages(page))),",
        "messages=(*self.messages, *(one for page in pages[1:] for one in _messages(page))),",
        faults=[Planned(when, faults.kill_agent) for when in (2.0, 4.0, 6.0, 8.0)],
        megabytes=12.0,
    ),
    Mutation(
        "deleted-while-acting",
        "A session is deleted although a call of it acts.",
        "services/session/store/postgres_sessions.py",
        "                if rows:\n                    return [tool_call_of(row) for row in rows]\n",
        "",
        faults=[Planned(2.0, faults.kill_gateway)],
    ),
    Mutation(
        "locked-write-lost",
        "An append whose session somebody has locked is skipped, and acknowledged.",
        "services/session/flusher.py",
        "            elif result.outcome is AppendOutcome.RETRY and (pause := pending.pause()) is not None:\n"
        "                asyncio.get_running_loop().call_later(pause, self.submit, pending)\n"
        "                continue\n",
        "            elif result.outcome is AppendOutcome.RETRY:\n"
        "                after = pending.append.first_seq + len(pending.append.events)\n"
        "                result = AppendResult(pending.append.run_id, pending.append.first_seq, "
        "AppendOutcome.COMMITTED, after)\n",
        faults=[Planned(when, store_faults.postgres_locked) for when in (1.0, 3.0, 5.0)],
    ),
)
