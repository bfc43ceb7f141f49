"""Which client a request comes from, where proxies stand before the mesh.

Whoever is connected to a process of ours, Envoy or the balancer in its place, writes the address that it saw
at the end of `x-forwarded-for`. Where that is a proxy's, the address before it is that proxy's word, and it
counts only if the proxy is one of the operator's. What stands before the first word that does not count is
anybody's.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Self
from urllib.parse import unquote

MAX_PROXIES = 16
_MAX_LENGTH = 64


class Proxies:
    """The proxies whose word on a client's address counts.

    Without any it is the address that Envoy saw.
    """

    def __init__(self, hops: int = 0, networks: tuple[IPv4Network | IPv6Network, ...] = ()) -> None:
        """Trusts so many proxies, whatever their addresses, or those in these networks."""
        self._hops = hops
        self._networks = networks

    @classmethod
    def parse(cls, given: Sequence[str]) -> Self:
        """Reads a number of proxies, or their addresses and networks, a word each.

        Raises:
            ValueError: It is neither.
        """
        if len(given) == 1 and given[0].isascii() and given[0].isdigit():
            hops = int(given[0])
            if hops > MAX_PROXIES:
                raise ValueError(f"must be a number up to {MAX_PROXIES}, or addresses and networks")
            return cls(hops)
        networks = []
        for word in given:
            try:
                networks.append(ip_network(word))
            except ValueError:
                raise ValueError(
                    f"{word[:50]!r} is neither a number of proxies nor an address or a network, "
                    "such as 10.0.0.0/8"
                ) from None
        return cls(0, tuple(networks))

    def client(self, forwarded: str | None, peer: str | None) -> str:
        """Returns the address that a request came from.

        Args:
            forwarded: The header `x-forwarded-for`, several lines of it joined with commas.
            peer: Who is connected to this process, as gRPC (`ipv4:127.0.0.1:4711`, `ipv6:%5B::1%5D:4711`) or
                a server of HTTP (`127.0.0.1`) names it: for a caller without that header.

        Returns:
            The address without a port, at most 64 characters; empty if nobody knows it.
        """
        # No more of it than can count: a caller may write as much as it likes before that.
        seen = (forwarded or "").rsplit(",", MAX_PROXIES + 1)[-MAX_PROXIES - 1 :]
        addresses = [address for word in seen if (address := _without_port(word.strip()))]
        if not addresses:
            return peer_address(peer or "")[:_MAX_LENGTH]
        if not self._networks:
            return addresses[max(0, len(addresses) - 1 - self._hops)][:_MAX_LENGTH]
        while len(addresses) > 1 and self._trusts(addresses[-1]):
            addresses.pop()
        return addresses[-1][:_MAX_LENGTH]

    def _trusts(self, address: str) -> bool:
        try:
            found = ip_address(address)
        except ValueError:
            return False
        if found.version == 6 and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        return any(found in network for network in self._networks)


def _without_port(word: str) -> str:
    """Some balancers add the port: `192.0.2.1:4711`, `[2001:db8::1]:4711`."""
    if word.startswith("["):
        return word[1:].partition("]")[0]
    host, colon, _ = word.partition(":")
    return host if colon and word.count(":") == 1 and "." in host else word


def peer_address(peer: str) -> str:
    """Returns the address of whoever is connected, without a port; see `Proxies.client`."""
    kind, colon, rest = peer.partition(":")
    if colon and kind in ("ipv4", "ipv6"):
        return unquote(rest.rpartition(":")[0]).strip("[]")
    return peer
