"""TLS to a real PostgreSQL: a certificate of a known authority is taken, another one is named."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import certifi
import pytest

from bench.mesh import free_ports
from meshkit.errors import StartupError, StoreAwayError
from meshkit.postgres import open_pool
from tests.deploy.postgres15 import PASSWORD, postgres15

TLS = Path(__file__).resolve().parents[1] / "integration" / "tool" / "tls"


async def uses_tls(url: str) -> bool:
    async with await open_pool(url) as pool:
        found: bool = await pool.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        return found


def test_an_unknown_authority_is_one_line_that_says_what_to_name(tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        shutil.copy(TLS / name, tmp_path / name)
    (tmp_path / "key.pem").chmod(0o600)
    [port] = free_ports(1)
    options = [f"port={port}", "listen_addresses=127.0.0.1", "ssl=on"]
    options += [f"ssl_cert_file={tmp_path}/cert.pem", f"ssl_key_file={tmp_path}/key.pem"]
    with postgres15(*(word for option in options for word in ("-c", option)), port=port):
        url = f"postgresql://postgres:{PASSWORD}@localhost:{port}/postgres?sslmode=verify-ca"
        with pytest.raises(StartupError, match=r"not trusted.*sslrootcert") as unknown:
            asyncio.run(uses_tls(f"{url}&sslrootcert={certifi.where()}"))
        assert not isinstance(unknown.value, StoreAwayError)
        assert PASSWORD not in str(unknown.value)
        assert asyncio.run(uses_tls(f"{url}&sslrootcert={TLS}/cert.pem"))
