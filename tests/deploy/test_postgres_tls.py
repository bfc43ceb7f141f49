"""TLS to a real PostgreSQL: a certificate of a known authority is taken, another one is named."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import certifi
import pytest

from bench.mesh import free_ports
from meshkit.errors import StartupError, StoreAwayError
from meshkit.postgres import open_pool
from tests.deploy.certificates import Authority
from tests.deploy.postgres15 import PASSWORD, postgres15

TLS = Path(__file__).resolve().parents[1] / "integration" / "tool" / "tls"


async def reload(port: int) -> None:
    """Has a server read its certificate again."""
    connection = await asyncpg.connect(
        f"postgresql://postgres:{PASSWORD}@localhost:{port}/postgres?sslmode=require"
    )
    await connection.execute("SELECT pg_reload_conf()")
    await connection.close()


async def comes_back(url: str) -> None:
    """Waits until a server can be used; it reads its certificate again a moment after it was told to."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(StoreAwayError):
                assert await uses_tls(url)
                return
            await asyncio.sleep(0.05)


async def uses_tls(url: str) -> bool:
    async with await open_pool(url) as pool:
        found: bool = await pool.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        return found


@contextlib.contextmanager
def speaking_tls(certificate: Path, key: Path) -> Iterator[int]:
    """Runs a PostgreSQL with a certificate; yields its port on this machine."""
    [port] = free_ports(1)
    options = [f"port={port}", "listen_addresses=127.0.0.1", "ssl=on"]
    options += [f"ssl_cert_file={certificate}", f"ssl_key_file={key}"]
    with postgres15(*(word for option in options for word in ("-c", option)), port=port):
        yield port


def test_an_unknown_authority_is_one_line_that_says_what_to_name(tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        shutil.copy(TLS / name, tmp_path / name)
    (tmp_path / "key.pem").chmod(0o600)
    with speaking_tls(tmp_path / "cert.pem", tmp_path / "key.pem") as port:
        url = f"postgresql://postgres:{PASSWORD}@localhost:{port}/postgres?sslmode=verify-ca"
        with pytest.raises(StartupError, match=r"not trusted.*sslrootcert") as unknown:
            asyncio.run(uses_tls(f"{url}&sslrootcert={certifi.where()}"))
        assert not isinstance(unknown.value, StoreAwayError)
        assert PASSWORD not in str(unknown.value)
        assert asyncio.run(uses_tls(f"{url}&sslrootcert={TLS}/cert.pem"))


def test_a_certificate_that_has_run_out_is_told_as_such_and_waited_for(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    certificate, key = authority.issue("localhost", days=-1)
    key.chmod(0o600)
    with speaking_tls(certificate, key) as port:
        url = f"postgresql://postgres:{PASSWORD}@localhost:{port}/postgres?sslmode=verify-full"
        with pytest.raises(StoreAwayError, match="its certificate has expired; give the server a new one"):
            asyncio.run(uses_tls(f"{url}&sslrootcert={authority.file}"))
        # A new one, and a reload of the server, is all it takes.
        for new, old in zip(authority.issue("localhost"), (certificate, key), strict=True):
            old.write_bytes(new.read_bytes())
        asyncio.run(reload(port))
        asyncio.run(comes_back(f"{url}&sslrootcert={authority.file}"))
