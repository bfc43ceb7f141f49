from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshkit.errors import StartupError
from services.tool.builtin.fetch.address import Allowed, is_public, parse_ip

REFUSED = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "10.255.255.255",
    "100.64.0.1",
    "100.127.255.255",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.8",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0:127.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:10::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:c0a8:101::1",
    "3fff::1",
    "fc00::1",
    "fd12:3456::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
]
PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "192.167.255.255",
    "223.255.255.255",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
    "2606:4700::1111",
    "2a00:1450:4001::1",
]


@pytest.mark.parametrize("text", REFUSED)
def test_addresses_that_are_not_the_public_internet_are_refused(text: str) -> None:
    assert not is_public(parse_ip(text))


@pytest.mark.parametrize("text", PUBLIC)
def test_addresses_of_the_public_internet_may_be_fetched(text: str) -> None:
    assert is_public(parse_ip(text))


@given(st.ip_addresses())
def test_nothing_that_python_calls_local_counts_as_public(address: object) -> None:
    found = ip_address(str(address))
    if (
        found.is_private
        or found.is_loopback
        or found.is_multicast
        or found.is_link_local
        or found.is_reserved
    ):
        # NAT64 is "reserved" for Python and stands for an IPv4 address that is judged by itself.
        assert not is_public(found) or str(found).startswith(("64:ff9b::", "::ffff:"))


@given(st.ip_addresses(v=4))
def test_a_mapped_address_is_judged_as_what_it_stands_for(address: object) -> None:
    plain = parse_ip(str(address))
    assert is_public(parse_ip(f"::ffff:{address}")) == is_public(plain)
    assert is_public(parse_ip(f"64:ff9b::{address}")) == is_public(plain)


def test_exceptions_are_by_host_and_port_of_the_url() -> None:
    allowed = Allowed(["127.0.0.1:8080", "Intranet.Example:80", "[::1]:9"])
    assert ("127.0.0.1", 8080) in allowed
    assert ("intranet.example", 80) in allowed
    assert ("::1", 9) in allowed
    assert ("127.0.0.1", 80) not in allowed


@pytest.mark.parametrize("place", ["127.0.0.1", "host:", ":80", "host:99999", "http://x"])
def test_an_exception_that_is_no_place_stops_the_start(place: str) -> None:
    with pytest.raises(StartupError, match="HERMESH_TOOL_FETCH_ALLOW"):
        Allowed([place])
