"""Bundles: a caller with many runs here gets their events in few messages.

A gateway has a stream of `Run` for each run that it began. What they cost is messages: each goes through this
process, Envoy and the gateway by itself. The streams of a bundle share one: it carries what all of them have
ready, and the others say nothing but that they live, and how they ended. When the stream that carries ends,
the next one does.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from weakref import WeakValueDictionary

from hermesh.agent.v1.agent_service_pb2 import RunResponse
from hermesh.common.v1.event_pb2 import Event, Frame, Reconnect
from services.agent.runs.subscription import Subscription

# From this size on the rest goes into the next message, characters.
MAX_CARRIED = 1024 * 1024
RECONNECT_MS = {"slow_reader": 0, "drain": 0, "moved": 100, "not_claimed": 0}


def reconnect(reason: str) -> Reconnect:
    """Return the notice that a stream ends although the log goes on."""
    return Reconnect(reason=reason, after_ms=RECONNECT_MS.get(reason, 0))


class BundledSubscription(Subscription):
    """One run's events for a caller that bundles its streams.

    Args:
        bundle: all of them.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self._bundle = bundle
        # 1 is the run's first event, which its own stream begins with.
        self.sent_seq = 1

    def responses(self) -> AsyncGenerator[RunResponse, None]:
        """Yield what goes over its stream after the run's first event, until it is closed."""
        return self._bundle.responses(self)

    def _pushed(self) -> None:
        self._bundle.ready(self)

    def take(self) -> list[Event]:
        """Return what is queued; see `Subscription.take`."""
        events = super().take()
        if events:
            self.sent_seq = events[-1].seq
        return events


class Bundle:
    """The streams that a caller has here at the same time."""

    def __init__(self) -> None:
        # In the order in which they came, and in which they become ready.
        self._members: dict[BundledSubscription, None] = {}
        self._ready: dict[BundledSubscription, None] = {}
        self._carrier: BundledSubscription | None = None
        self._carried = False

    def ready(self, member: BundledSubscription) -> None:
        """Have a member's events carried, once its own stream has begun."""
        if self._carrier is not None and member in self._members:
            self._ready[member] = None
            self._carrier.wake()

    async def responses(self, member: BundledSubscription) -> AsyncGenerator[RunResponse, None]:
        """See `BundledSubscription.responses`."""
        self._members[member] = None
        if self._carrier is None:
            self._carrier = member
        if member.queued:
            self.ready(member)
        whole = False
        try:
            while True:
                if member.closed:
                    frame = Frame(events=member.take())
                    if member.queued:
                        yield RunResponse(frame=frame)
                        continue
                    if member.reconnect:
                        frame.reconnect.CopyFrom(reconnect(member.reconnect))
                    yield RunResponse(frame=frame, last_seq=member.sent_seq)
                    whole = True
                    return
                if self._carrier is member and self._ready:
                    yield self._gather(member)
                elif member.take_beat():
                    yield RunResponse(frame=Frame())
                else:
                    await member.changed()
        finally:
            self._leave(member, whole=whole)

    def _gather(self, carrier: BundledSubscription) -> RunResponse:
        response = RunResponse()
        size = 0
        while self._ready and size < MAX_CARRIED:
            member = next(iter(self._ready))
            del self._ready[member]
            events = member.take()
            size += _size(events)
            if member.queued:
                self._ready[member] = None
            if member is carrier:
                response.frame.events.extend(events)
            elif events:
                response.others.add().events.extend(events)
                self._carried = True
        return response

    def _leave(self, member: BundledSubscription, *, whole: bool) -> None:
        """Let the next one carry; if the stream broke, nobody knows how much of it arrived."""
        del self._members[member]
        self._ready.pop(member, None)
        if self._carrier is not member:
            return
        carried, self._carried = self._carried, False
        self._carrier = next(iter(self._members), None)
        if carried and not whole:
            for other in self._members:
                other.close("moved")
        elif self._carrier is not None:
            self._carrier.wake()


class Bundles:
    """The bundles of this replica by their names; one is gone with its last subscription."""

    def __init__(self) -> None:
        self._bundles: WeakValueDictionary[str, Bundle] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._bundles)

    def bundle(self, name: str) -> Bundle:
        """Return the bundle of this name, a new one if there is none."""
        found = self._bundles.get(name)
        if found is None:
            found = self._bundles[name] = Bundle()
        return found


def _size(events: Sequence[Event]) -> int:
    return sum(len(event.data) for event in events)
