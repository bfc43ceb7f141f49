"""How often something may be done for one client: a token bucket for each address, in a bounded table."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

MAX_ADDRESSES = 10_000
# What one subscriber is given at the least; more than one address of it are still one client.
_IPV6_PREFIX = 64


class Throttle:
    """Lets each address do something `burst` times at once and `rate` times a second after that.

    The table holds the `max_addresses` that took a token last.
    """

    def __init__(
        self,
        rate: float,
        burst: int,
        *,
        max_addresses: int = MAX_ADDRESSES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes a throttle; see the class."""
        self._rate = rate
        self._burst = burst
        self._max_addresses = max_addresses
        self._clock = clock
        # By client: the tokens that it had, and when.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def wait(self, address: str) -> float:
        """Returns the seconds until the address has a token: 0.0 if it has one. Takes none."""
        tokens = self._tokens(client_of(address), self._clock())
        return 0.0 if tokens >= 1 else (1 - tokens) / self._rate

    def take(self, address: str) -> None:
        """Takes a token, also one that the address does not have yet: it then waits the longer."""
        client, now = client_of(address), self._clock()
        self._buckets[client] = (self._tokens(client, now) - 1, now)
        self._buckets.move_to_end(client)
        while len(self._buckets) > self._max_addresses:
            self._buckets.popitem(last=False)

    def _tokens(self, client: str, now: float) -> float:
        tokens, then = self._buckets.get(client, (float(self._burst), now))
        return min(self._burst, tokens + (now - then) * self._rate)


def client_of(address: str) -> str:
    """Returns what stands for the client behind an address: the address, or its /64 for IPv6."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return f"{IPv6Address(int(parsed) >> (128 - _IPV6_PREFIX) << (128 - _IPV6_PREFIX))}/{_IPV6_PREFIX}"
    return str(parsed)
