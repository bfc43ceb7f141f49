"""Which address a request comes from, whatever a client writes and however many proxies it passes."""

from __future__ import annotations

import time

import pytest

from meshkit.proxies import MAX_PROXIES, Proxies
from meshkit.settings import MeshSettings, load


@pytest.mark.parametrize(
    ("forwarded", "peer", "address"),
    [
        ("203.0.113.7", "ipv4:127.0.0.1:9", "203.0.113.7"),
        # What stands before Envoy's own word is the caller's.
        ("1.1.1.1, 203.0.113.7", "ipv4:127.0.0.1:9", "203.0.113.7"),
        ("1.1.1.1,2001:db8::1", None, "2001:db8::1"),
        (None, "ipv4:127.0.0.1:4711", "127.0.0.1"),
        (None, "ipv6:%5B::1%5D:4711", "::1"),
        (None, "ipv6:[2001:db8::1]:4711", "2001:db8::1"),
        (None, "127.0.0.1", "127.0.0.1"),
        (None, "::1", "::1"),
        ("", None, ""),
        (" , ", "127.0.0.1", "127.0.0.1"),
        ("x" * 1_000, None, "x" * 64),
    ],
)
def test_without_proxies_the_address_is_the_one_that_envoy_saw(
    forwarded: str | None, peer: str | None, address: str
) -> None:
    assert Proxies().client(forwarded, peer) == address


@pytest.mark.parametrize(
    ("trusted", "forwarded", "address"),
    [
        # Envoy saw the proxy, the proxy its client; what that client wrote before counts for nothing.
        ("1", "1.1.1.1, 203.0.113.7, 10.0.0.5", "203.0.113.7"),
        ("2", "1.1.1.1, 203.0.113.7, 198.51.100.1, 10.0.0.5", "203.0.113.7"),
        ("10.0.0.0/8", "1.1.1.1, 203.0.113.7, 10.0.0.5", "203.0.113.7"),
        ("10.0.0.5 198.51.100.0/24", "1.1.1.1, 203.0.113.7, 198.51.100.1, 10.0.0.5", "203.0.113.7"),
        ("2001:db8::/32,10.0.0.5", "2001:db9::1, 2001:db8::5", "2001:db9::1"),
        # Past the proxy: its own address is all that is known, and with networks it cannot lie.
        ("1", "203.0.113.7", "203.0.113.7"),
        ("10.0.0.0/8", "1.1.1.1, 203.0.113.7", "203.0.113.7"),
        # The proxy itself.
        ("10.0.0.0/8", "10.0.0.5", "10.0.0.5"),
        ("10.0.0.0/8", "10.0.0.7, 10.0.0.5", "10.0.0.7"),
        ("10.0.0.0/8", "203.0.113.7, ::ffff:10.0.0.5", "203.0.113.7"),
        ("10.0.0.0/8", "203.0.113.7, not an address", "not an address"),
        # With a port, as some balancers write it.
        ("1", "203.0.113.7:4711, 10.0.0.5", "203.0.113.7"),
        ("1", "[2001:db8::1]:4711, 10.0.0.5:80", "2001:db8::1"),
        ("10.0.0.0/8", "203.0.113.7:4711, 10.0.0.5:80", "203.0.113.7"),
    ],
)
def test_a_trusted_proxys_word_counts_and_no_others(trusted: str, forwarded: str, address: str) -> None:
    proxies = MeshSettings(trusted_proxies=trusted).proxies
    assert proxies.client(forwarded, "ipv4:127.0.0.1:9") == address


def test_a_client_that_writes_a_long_chain_costs_nothing() -> None:
    proxies = MeshSettings(trusted_proxies="10.0.0.0/8").proxies
    chain = "10.0.0.1," * 7_000 + "10.0.0.2"
    began = time.process_time()
    for _ in range(1_000):
        assert proxies.client(chain, None) == "10.0.0.1"
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("nginx", "'nginx' is neither a number of proxies nor an address"),
        ("10.0.0.1/8", "'10.0.0.1/8' is neither"),
        ("1 2", "'1' is neither"),
        (str(MAX_PROXIES + 1), f"a number up to {MAX_PROXIES}"),
    ],
)
def test_what_names_no_proxy_is_one_clear_line(
    value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HERMESH_TRUSTED_PROXIES", value)
    with pytest.raises(SystemExit):
        load(MeshSettings)
    line = capsys.readouterr().err
    assert line.startswith("hermesh: bad settings: HERMESH_TRUSTED_PROXIES: ")
    assert said in line
    assert line.count("\n") == 1
