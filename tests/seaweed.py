"""SeaweedFS, a real object store with an S3 API: its own program, out of a wheel, in a folder of a test."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from obstore.store import S3Store

from launcher.ports import free_port

BUCKET = "hermesh"
KEYS = ("KEY", "a-secret")
# May read the bucket and write nothing.
READER = ("READER", "another-secret")
# May do everything, so that nothing but a bucket's absence keeps it from one.
ADMIN = ("ADMIN", "an-admins-secret")
_WEED = Path(sys.executable).with_name("weed")
_START_SECONDS = 60
_TRIES = 3
_PORTS = ("master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc", "s3", "s3_grpc", "https")


class SeaweedFS:
    """One server with a bucket, over HTTP and HTTPS, which a test may stop and start again at its place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = folder / "ca.pem"
        ports: set[int] = set()
        while len(ports) < len(_PORTS):
            ports.add(free_port())
        self._ports = dict(zip(_PORTS, ports, strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir(parents=True)
        _make_certificates(folder)
        (folder / "s3.json").write_text(json.dumps({"identities": _identities()}))

    def environment(self, keys: tuple[str, str] = KEYS, *, tls: bool = False, **more: str) -> dict[str, str]:
        """What a client of it has in its environment."""
        found = {
            "AWS_ACCESS_KEY_ID": keys[0],
            "AWS_SECRET_ACCESS_KEY": keys[1],
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.https if tls else self.http,
        }
        return found | ({"SSL_CERT_FILE": str(self.ca)} if tls else {}) | more

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def https(self) -> str:
        return f"https://localhost:{self._ports['https']}"

    @property
    def no_s3(self) -> str:
        """An HTTP server that is no S3."""
        return f"http://127.0.0.1:{self._ports['master']}"

    def bucket(self, prefix: str) -> S3Store:
        """A part of the bucket, for a look behind the mesh."""
        return S3Store(
            BUCKET,
            prefix=prefix,
            endpoint=self.http,
            region="us-east-1",
            access_key_id=KEYS[0],
            secret_access_key=KEYS[1],
            client_options={"allow_http": True},
        )

    def start(self) -> None:
        log = self.folder / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(self._command(), stdout=output, stderr=output, cwd=self.folder)
        end = time.monotonic() + _START_SECONDS
        while not self._serves():
            assert self._process.poll() is None, f"SeaweedFS ended:\n{log.read_text()[-2000:]}"
            assert time.monotonic() < end, f"SeaweedFS does not serve:\n{log.read_text()[-2000:]}"
            time.sleep(0.05)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=30)
            self._process = None

    def _serves(self) -> bool:
        # A folder of its filer's is a bucket. Volumes are handed out once all parts have found each other.
        bucket = f"http://127.0.0.1:{self._ports['filer']}/buckets/{BUCKET}/"
        return (
            _status(bucket, "POST") in (201, 409)
            and _status(f"{self.no_s3}/dir/assign") == 200
            and _status(self.http) in (200, 403)
        )

    def _command(self) -> list[str]:
        ports, folder = self._ports, self.folder
        options = {
            "dir": folder / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.port": ports["master"],
            "master.port.grpc": ports["master_grpc"],
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 64,
            "volume.port": ports["volume"],
            "volume.port.grpc": ports["volume_grpc"],
            "volume.max": 16,
            "filer": "true",
            "filer.port": ports["filer"],
            "filer.port.grpc": ports["filer_grpc"],
            "filer.localSocket": folder / "f.sock",
            "s3": "true",
            "s3.port": ports["s3"],
            "s3.port.grpc": ports["s3_grpc"],
            "s3.port.https": ports["https"],
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": folder / "s.sock",
            "s3.cert.file": folder / "server.pem",
            "s3.key.file": folder / "server.key",
            "s3.config": folder / "s3.json",
            "s3.iam": "false",
            "s3.autoCreateBucket": "false",
        }
        return [str(_WEED), "server", *(f"-{name}={value}" for name, value in options.items())]


@contextmanager
def seaweed(folder: Path) -> Iterator[SeaweedFS]:
    """Starts one for the time of the block."""
    for attempt in range(1, _TRIES + 1):
        server = SeaweedFS(folder / str(attempt))
        try:
            server.start()
            break
        except AssertionError:
            server.stop()
            # One of its many ports may have been taken since it was found free.
            if attempt == _TRIES:
                raise
    try:
        yield server
    finally:
        server.stop()


def _status(url: str, method: str = "GET") -> int:
    """What a server answers; 0 when it does not."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(url, method=method), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except (OSError, http.client.HTTPException):
        return 0


def _identities() -> list[dict[str, object]]:
    def identity(keys: tuple[str, str], *actions: str) -> dict[str, object]:
        credentials = [{"accessKey": keys[0], "secretKey": keys[1]}]
        return {"name": keys[0].lower(), "credentials": credentials, "actions": actions}

    bucket = [f"{action}:{BUCKET}" for action in ("Read", "List", "Write")]
    return [
        identity(KEYS, *bucket),
        identity(READER, *bucket[:2]),
        identity(ADMIN, "Admin", "Read", "List", "Write"),
    ]


def _make_certificates(folder: Path) -> None:
    """Writes ca.pem, and server.pem with its key, for localhost."""
    authority, authority_key = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")]), _key()
    server, server_key = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), _key()
    ca = _certificate(authority, authority, authority_key, authority_key, is_ca=True)
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.public_bytes(pem))
    found = _certificate(server, authority, server_key, authority_key, is_ca=False)
    (folder / "server.pem").write_bytes(found.public_bytes(pem))
    private = server_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.key").write_bytes(private)


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    is_ca: bool,
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    )
    return builder.sign(issuer_key, hashes.SHA256())
