"""Random episodes of the tiny model: whatever it does is right, so that every history it leaves is clean."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.unit.chaos.world import Run, Stream, World

EFFECTS = ("pure", "idempotent", "non_idempotent", "non_idempotent")
POLICIES = ("enqueue", "enqueue", "enqueue", "interrupt", "rollback")


class Episode:
    """Takes steps at random, then brings everything to rest."""

    def __init__(self, random: Random, steps: int, sessions: int = 3) -> None:
        self.random = random
        self.world = World()
        self.open: list[Stream] = []
        self._sessions = sessions
        # More of what moves runs along than of what ends them.
        self._steps: list[tuple[int, Callable[[], None]]] = [
            (4, self.submit),
            (1, self.unaccepted),
            (5, self.claim),
            (2, self.take_over),
            (1, self.reattach),
            (4, self.write),
            (5, self.work_on_calls),
            (3, self.park),
            (3, self.resolve),
            (2, self.finish),
            (1, self.cancel),
            (6, self.watch),
            (1, self.look_at_redis),
            (1, self.drain),
        ]
        self.submit()
        for _ in range(steps):
            (step,) = random.choices([step for _, step in self._steps], [weight for weight, _ in self._steps])
            step()
        self.rest()

    def _held(self) -> list[Run]:
        return [run for run in self.world.runs if run.status == 2]

    def _any(self, runs: list[Run]) -> Run | None:
        return self.random.choice(runs) if runs else None

    # input

    def submit(self) -> None:
        world, random = self.world, self.random
        if len(world.sessions) < self._sessions and (not world.sessions or random.random() < 0.5):
            world.session()
        run = world.submit(
            random.choice(world.sessions),
            policy=random.choice(POLICIES),
            # The very first is acknowledged: a history in which nothing is proves nothing.
            answered=not world.runs or random.random() < 0.8,
        )
        if random.random() < 0.3:
            world.again(run)
        self._let_go()

    def unaccepted(self) -> None:
        session = self.random.choice(self.world.sessions)
        # Before the first fault the mesh has no excuse.
        if not any(record["kind"] == "fault" for record in self.world.records):
            self.world.lose(session)
        else:
            self.world.refuse(session)

    # runs

    def claim(self) -> None:
        due = [session.active for session in self.world.sessions if session.active is not None]
        run = self._any([run for run in due if run.status == 1])
        if run is not None:
            self.world.claim(run, self.random.choice(("agent-1", "agent-2")))

    def take_over(self) -> None:
        run = self._any(self._held())
        if run is not None:
            self.world.fault("kill", run.session.owner or "")
            self.world.claim(run, self.random.choice(("agent-1", "agent-2")))

    def reattach(self) -> None:
        run = self._any(self._held())
        if run is not None:
            self.world.reattach(run)

    def write(self) -> None:
        run = self._any(self._held())
        if run is not None:
            self.world.append(run, *["text.delta"] * self.random.randint(1, 5))

    def work_on_calls(self) -> None:
        world, random = self.world, self.random
        run = self._any(self._held())
        if run is None:
            return
        call = next((call for call in run.calls if call.state in (1, 2) and not call.waits), None)
        if call is None:
            world.call(run, random.choice(EFFECTS), approval=random.random() < 0.2)
        elif call.state == 1:
            world.begin(call)
            if random.random() < 0.7:
                world.act(call)
        elif call.effect != "non_idempotent" and random.random() < 0.3:
            world.begin(call)
            world.act(call)
        else:
            self._complete(call.run)

    def _complete(self, run: Run) -> None:
        """Records what running calls came to; one that did not act failed."""
        for call in run.calls:
            if call.state == 2:
                begun = self.world.records[-1]
                for record in reversed(self.world.records):
                    if record.get("call") == call.name:
                        begun = record
                        break
                self.world.complete(call, 3 if begun["kind"] == "act" else 4)

    def park(self) -> None:
        run = self._any(
            [run for run in self._held() if any(call.waits or call.state == 2 for call in run.calls)]
        )
        if run is not None and not any(call.state == 1 and not call.waits for call in run.calls):
            self.world.park(run)

    def resolve(self) -> None:
        run = self._any([run for run in self.world.runs if run.status == 3])
        if run is None:
            return
        call = self.random.choice(run.waiting)
        decisions = (
            ["completed", "failed", "abandon", "retry", "retry"]
            if call.state == 5
            else ["approve", "abandon"]
        )
        self.world.resolve(call, self.random.choice(decisions), status=self.random.choice((200, 200, None)))

    def finish(self) -> None:
        run = self._any(self._held())
        if run is not None:
            if all(call.state in (3, 4) for call in run.calls):
                self.world.finish(run, self.random.choice(("run.completed", "run.completed", "run.failed")))
            elif self.random.random() < 0.2:
                self.world.finish(run, "run.failed")

    def cancel(self) -> None:
        run = self._any([run for run in self.world.runs if not run.over])
        if run is not None:
            self.world.cancel(run)
            self._let_go()

    def _let_go(self) -> None:
        """Who holds a run that is to be cancelled hears of it."""
        for run in self._held():
            if run.cancel_requested:
                self.world.finish(run, "run.cancelled")

    # clients and the outside

    def watch(self) -> None:
        world, random = self.world, self.random
        if self.open and random.random() < 0.7:
            stream = random.choice(self.open)
            world.receive(stream, random.randint(1, 6))
            if random.random() < 0.3:
                self._close(stream)
        elif (run := self._any(world.runs)) is not None:
            client = random.choice(("ada", "bob"))
            self.open.append(world.open(run, client, via=random.choice(("sse", "grpc"))))

    def _close(self, stream: Stream) -> None:
        run = stream.run
        assert run is not None
        complete = run.over and stream.cursor == run.last_seq
        self.world.close(stream, "terminal" if complete else self.random.choice(("cut", "reconnect")))
        self.open.remove(stream)

    def look_at_redis(self) -> None:
        run = self._any(self.world.runs)
        if run is not None:
            self.world.live(run, self.random.randint(1, run.last_seq))

    def drain(self) -> None:
        with self.world.drain(self.random.choice(("agent", "gateway"))):
            self.watch()

    # the end

    def rest(self) -> None:
        """Ends every run, or leaves it waiting for a person."""
        world = self.world
        for session in world.sessions:
            while (run := session.active) is not None and run.status != 3:
                if run.status == 1:
                    world.claim(run)
                for call in run.calls:
                    if call.state == 1 and not call.waits:
                        world.begin(call)
                        world.act(call)
                self._complete(run)
                if run.waiting:
                    world.park(run)
                else:
                    world.finish(run)
            for waiting in session.runs:
                # Whoever stands in line behind it is called off.
                if waiting.status == 1:
                    world.cancel(waiting)
        for stream in list(self.open):
            world.receive(stream)
            self._close(stream)
        for run in world.runs:
            if self.random.random() < 0.5:
                world.live(run)
            if run.over and self.random.random() < 0.5:
                world.watch(run, "eve")
        world.end()
