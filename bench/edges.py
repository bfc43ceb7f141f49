"""nginx and HAProxy before a whole mesh, with the files of deploy/: processes of a bench's or a test's own.

Of the files nothing but addresses and paths is another, and what the caller says that it changes.
"""

from __future__ import annotations

import datetime
import os
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bench.facts import ROOT
from bench.fronts import binary_of, listens
from bench.mesh import Mesh, MeshError, free_ports, wait_until
from launcher.ports import port_problem

Program = Literal["nginx", "haproxy"]
# What stands behind: the mesh's Envoy, or straight the gateways.
Behind = Literal["envoy", "gateways"]
# Those of the files; a mesh has others.
GATEWAY_PORTS = (8101, 8102, 8103)
START_SECONDS = 20.0
STOP_SECONDS = 20.0
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@dataclass(frozen=True)
class Edge:
    """A balancer before a mesh.

    Attributes:
        program: which.
        folder: its files and logs.
        port: its TLS port.
        plain_port: its port without TLS.
        mesh: what is behind.
    """

    program: Program
    folder: Path
    port: int
    plain_port: int
    mesh: Mesh

    @property
    def host(self) -> str:
        """Its host and TLS port."""
        return f"localhost:{self.port}"

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"https://{self.host}"

    @property
    def authority(self) -> Path:
        """The certificate that its clients have to trust."""
        return self.folder / "tls" / "tls.crt"

    @property
    def tls(self) -> ssl.SSLContext:
        """What a client needs to speak TLS with it."""
        return ssl.create_default_context(cafile=self.authority)

    def log(self) -> str:
        """Its access log."""
        return (self.folder / "access.log").read_text()


def gateway_port(count: int = len(GATEWAY_PORTS)) -> int:
    """Returns the first of so many free ports in a row, for `HERMESH_GATEWAY_PORT`. Raises MeshError."""
    for first in free_ports(50):
        if first < 65_000 and not any(port_problem(first + more) for more in range(count)):
            return first
    raise MeshError(f"there are no {count} free ports in a row")


@contextmanager
def serving(
    program: Program,
    behind: Behind,
    mesh: Mesh,
    changes: Mapping[str, str] | None = None,
    binary: Path | None = None,
) -> Iterator[Edge]:
    """Runs a balancer before a mesh that has a `HERMESH_GATEWAY_PORT`.

    Args:
        program: which.
        behind: what it balances over.
        mesh: whose.
        changes: what is replaced in its files; each has to be there.
        binary: where the program is; None looks for it.

    Raises:
        MeshError: It is not installed, or did not come to listen.
    """
    binary = binary or binary_of(program)
    if binary is None:
        raise MeshError(f"{program} is not installed here")
    folder = Path(tempfile.mkdtemp(prefix="hm-edge-"))
    # Workers of nginx are another user.
    folder.chmod(0o755)
    port, plain_port = free_ports(2)
    edge = Edge(program, folder, port, plain_port, mesh)
    _certificate(folder / "tls")
    files = _files(edge, behind, changes or {})
    if program == "nginx":
        command = [str(binary), "-p", str(folder), "-c", str(files[0]), "-g", "daemon off;"]
    else:
        command = [str(binary), "-db", *(part for file in files for part in ("-f", str(file)))]
    out = folder / ("output.log" if program == "nginx" else "access.log")
    with out.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_until(
            lambda: process.poll() is not None or listens(port), START_SECONDS, f"{program} that listens"
        )
        if process.poll() is not None:
            raise MeshError(f"{program} ended at once: {out.read_text()}")
        yield edge
    finally:
        process.terminate()
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=STOP_SECONDS)
        shutil.rmtree(folder)


def _files(edge: Edge, behind: Behind, changes: Mapping[str, str]) -> list[Path]:
    """Copies the program's files with this place's addresses; the first is the one that names others."""
    if edge.program == "nginx":
        names = ["nginx.conf", f"upstream.{behind}.conf"]
    else:
        names = ["haproxy.cfg", "frontend.cfg", f"servers.{behind}.cfg"]
    texts = {name: (ROOT / "deploy" / edge.program / name).read_text() for name in names}
    for old, new in (*_places(edge, behind).items(), *changes.items()):
        if not any(old in text for text in texts.values()):
            raise MeshError(f"{old!r} is in none of {', '.join(names)}")
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    for name, text in texts.items():
        (edge.folder / name).write_text(text)
    return [edge.folder / name for name in names]


def _places(edge: Edge, behind: Behind) -> dict[str, str]:
    """What of the files is another one here."""
    mesh, folder = edge.mesh, edge.folder
    places = {"127.0.0.1:50051": mesh.grpc_address}
    if edge.program == "nginx":
        temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in _TEMPORARY)
        places |= {
            "/etc/nginx/tls": f"{folder}/tls",
            "/var/log/nginx": str(folder),
            "/run/nginx.pid": f"{folder}/nginx.pid",
            "listen 80;": f"listen 127.0.0.1:{edge.plain_port};",
            "listen 443 ": f"listen 127.0.0.1:{edge.port} ",
            "\nhttp {\n": f"\nhttp {{\n{temporary}",
            "include upstream.envoy.conf;": f"include upstream.{behind}.conf;",
        }
        if os.geteuid() != 0:
            places["user www-data;"] = ""
    else:
        places |= {
            "/etc/haproxy/tls.pem": f"{folder}/tls/tls.pem",
            "bind :80\n": f"bind 127.0.0.1:{edge.plain_port}\n",
            "bind :443 ": f"bind 127.0.0.1:{edge.port} ",
            "port 8080\n": f"port {mesh.http_port}\n",
        }
    if behind == "envoy":
        places["127.0.0.1:8080"] = f"127.0.0.1:{mesh.http_port}"
        return places
    first = int(mesh.settings["HERMESH_GATEWAY_PORT"])
    return places | {f"127.0.0.1:{port}": f"127.0.0.1:{first + n}" for n, port in enumerate(GATEWAY_PORTS)}


def _certificate(folder: Path) -> None:
    """Makes one for localhost that lasts as long as a test."""
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=6))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "tls.crt").write_bytes(public)
    (folder / "tls.key").write_bytes(private)
    (folder / "tls.pem").write_bytes(public + private)
