"""Which addresses may be fetched: those of the public internet, checked after the name is resolved.

The check and the connection use the same address (`GuardedBackend` in `client.py`), so a name that resolves
to something else a moment later gains nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from meshkit.errors import StartupError
from meshkit.settings import parse_address

Address = IPv4Address | IPv6Address

# Written out although the ipaddress module knows most of them: what it counts as global has changed between
# versions of Python, and this list must not.
_REFUSED_V4: tuple[IPv4Network, ...] = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, where clouds keep their metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# The public internet is 2000::/3; the rest is refused, and so are these parts of it.
_GLOBAL_V6 = IPv6Network("2000::/3")
_REFUSED_V6: tuple[IPv6Network, ...] = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments, Teredo and ORCHID among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which carries any IPv4 address inside
        "3fff::/20",  # documentation
    )
)


def is_public(address: Address) -> bool:
    """Returns True for an address of the public internet.

    An IPv6 address that stands for an IPv4 one (mapped, or behind NAT64) is judged by that one.
    """
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _REFUSED_V4)
    inner = _embedded(address)
    if inner is not None:
        return is_public(inner)
    return address in _GLOBAL_V6 and not any(address in network for network in _REFUSED_V6)


_NAT64 = ip_network("64:ff9b::/96")


def _embedded(address: IPv6Address) -> IPv4Address | None:
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return None


def parse_ip(text: str) -> Address:
    """Reads an address as getaddrinfo returns it; a zone (`fe80::1%eth0`) is dropped.

    Raises:
        ValueError: It is not an address.
    """
    return ip_address(text.partition("%")[0])


class Allowed:
    """The places that may be fetched although their addresses are private: `host:port` as in the URL."""

    def __init__(self, places: Iterable[str] = ()) -> None:
        """Reads the list.

        Raises:
            StartupError: An entry is not host:port.
        """
        self._places: set[tuple[str, int]] = set()
        for place in places:
            try:
                host, port = parse_address(place)
            except ValueError as error:
                raise StartupError(f"HERMESH_TOOL_FETCH_ALLOW: {place!r} {error}") from error
            self._places.add((host.lower(), port))

    def __contains__(self, place: object) -> bool:
        return place in self._places
