"""A small kubelet for tests: runs a chart's rendered pods on this machine, each in namespaces of its own.

What it does as Kubernetes does: a pod's own network namespace and address, its command, variables (literal,
from its own fields), user and groups without any capability, no new privileges, a read-only root with only
the volumes that it names, files of configuration and of secrets, start-up, readiness and liveness probes
with their periods and limits, restarts, names of services that resolve to the pods that are ready, and the
way to the end: out of the services, preStop, SIGTERM, grace, SIGKILL.

What it does not prove: that the image holds what the command needs (it runs this checkout's environment,
and Envoy out of its wheel), scheduling, limits of CPU and memory, network policies, kube-proxy's balancing
(a service with an address resolves to its pods here), and what an autoscaler decides.

Needs root and `ip`. Everything it makes is named after its own process, and is gone when its block ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from launcher import envoy
from tests.deploy.chart import NAMESPACE
from tools.kubectl import ROOT

T = TypeVar("T")

# The node's own address, and the network of its pods.
NODE = "10.77.0.1"
NETWORK = "10.77.0.0/16"
_PATH = f"{ROOT}/.venv/bin:{envoy.BINARY.parent}:/usr/local/bin:/usr/bin:/bin"
# What the image sets, and HOME as a runtime sets it for a user whom the image does not know.
_IMAGE = {"PATH": _PATH, "HOME": "/", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
_SHOWN = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/proc", "/dev")
_SEARCH = f"{NAMESPACE}.svc.cluster.local svc.cluster.local cluster.local"
_RESOLVER = f"nameserver {NODE}\nsearch {_SEARCH}\noptions ndots:5\n"
_ETC = ("passwd", "group", "nsswitch.conf", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ssl", "localtime")


def available() -> str:
    """Why it cannot run here; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no ip (Debian: apt-get install iproute2)"
    return ""


async def _answers(host: str, port: int, path: str | None, seconds: float) -> bool:
    """Whether a port takes a connection and, where a path is given, answers it with 200 to 399."""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                if path is None:
                    return True
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                status = (await reader.readline()).split()[1:2]
                return bool(status) and 200 <= int(status[0]) < 400
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError):
        return False


class _Names(asyncio.DatagramProtocol):
    """The cluster's name server.

    Attributes:
        addresses: of each name, with its dot at the end.
    """

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        (question,) = query.question
        answer = dns.message.make_response(query)
        found = self.addresses.get(question.name.to_text().lower())
        if found is None:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif found and question.rdtype == dns.rdatatype.A:
            answer.answer.append(dns.rrset.from_text(question.name, 5, "IN", "A", *found))
        self._transport.sendto(answer.to_wire(), address)


class _Inside:
    """An event loop in a thread that stands in a network namespace."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="node", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # One turn for what is closed to be closed.
        self.call(lambda: self._loop.call_soon(self._loop.stop))
        self._thread.join(timeout=10)

    def _main(self) -> None:
        with open(f"/run/netns/{self._namespace}") as namespace:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")
        self._loop.run_forever()
        self._loop.close()

    def call(self, what: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(what)

    async def do(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"


class Pod:
    """One pod: its container's process, its address, and whether it is ready.

    Attributes:
        name: of the pod.
        labels: of the pod.
        address: its own, in the node's network.
        ready: whether its readiness probe says so.
        ending: whether it is on its way out.
        restarts: how often its process was started again.
        log: where its output goes.
    """

    def __init__(self, node: Node, name: str, template: Mapping[str, Any], number: int, folder: Path) -> None:
        self.name = name
        self.labels: dict[str, str] = template["metadata"]["labels"]
        self.address = f"10.77.{number // 200 + 1}.{number % 200 + 1}"
        self.ready = False
        self.ending = False
        self.restarts = 0
        self.log = folder / "log"
        self.started = asyncio.Event()
        self._node = node
        self._spec = template["spec"]
        (self._container,) = self._spec["containers"]
        self._folder = folder
        self._namespace = f"{node.prefix}p{number}"
        self._link = f"{node.prefix}v{number}"
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Of the container's process."""
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Of the container's process; None while it runs."""
        return self._process.returncode if self._process else None

    # the way in

    def prepare(self) -> None:
        """Makes its network and its files."""
        _run("ip", "netns", "add", self._namespace)
        _run("ip", "-n", self._namespace, "link", "set", "lo", "up")
        _run(
            *("ip", "-n", self._node.namespace, "link", "add", self._link, "type", "veth"),
            *("peer", "name", "eth0", "netns", self._namespace),
        )
        _run("ip", "-n", self._node.namespace, "link", "set", self._link, "master", "br0", "up")
        _run("ip", "-n", self._namespace, "addr", "add", f"{self.address}/16", "dev", "eth0")
        _run("ip", "-n", self._namespace, "link", "set", "eth0", "up")
        for volume in self._spec.get("volumes", ()):
            if "emptyDir" not in volume:
                self._write(volume)
        (self._folder / "root").mkdir()
        (self._folder / "enter").write_text(self._script())

    def _write(self, volume: Mapping[str, Any]) -> None:
        """Writes a volume's files, as they are readable in the pod."""
        target = self._folder / volume["name"]
        target.mkdir()
        if "configMap" in volume:
            files = self._node.configs[volume["configMap"]["name"]]
        else:
            held = self._node.secrets[volume["secret"]["secretName"]]
            files = {one["path"]: held[one["key"]] for one in volume["secret"]["items"]}
        (source,) = (volume[kind] for kind in ("configMap", "secret") if kind in volume)
        for file, text in files.items():
            (target / file).write_text(text)
            (target / file).chmod(source.get("defaultMode", 0o644))
            # As Kubernetes does it for fsGroup.
            os.chown(target / file, 0, self._spec["securityContext"]["fsGroup"])

    def _script(self) -> str:
        """Mounts a root for the container, enters it without privileges and becomes its command."""
        root = self._folder / "root"
        volumes = {volume["name"]: volume for volume in self._spec.get("volumes", ())}
        mounts = [f"mount -t tmpfs -o mode=755 root {root}"]
        for shown in _SHOWN:
            if os.path.islink(shown):
                mounts.append(f"ln -s {os.readlink(shown)} {root}{shown}")
            elif os.path.isdir(shown):
                mounts.append(f"mkdir -p {root}{shown}; mount --rbind {shown} {root}{shown}")
        mounts.append(f"mkdir {root}/etc")
        mounts.extend(f"cp -a /etc/{name} {root}/etc/ 2>/dev/null || true" for name in _ETC)
        mounts.append(f"echo '127.0.0.1 localhost' > {root}/etc/hosts")
        mounts.append(f"printf '%s' {shlex.quote(_RESOLVER)} > {root}/etc/resolv.conf")
        for mount in self._container.get("volumeMounts", ()):
            target = f"{root}{mount['mountPath']}"
            if "emptyDir" in volumes[mount["name"]]:
                mounts.append(f"mkdir -p {target}; mount -t tmpfs -o mode=1777 {mount['name']} {target}")
            else:
                mounts.append(
                    f"mkdir -p {target}; mount --bind {self._folder / mount['name']} {target}; "
                    f"mount -o remount,ro,bind {target}"
                )
        for code in dict.fromkeys((str(ROOT), sys.base_prefix)):
            mounts.append(f"mkdir -p {root}{code}; mount --bind {code} {root}{code}")
            mounts.append(f"mount -o remount,ro,bind {root}{code}")
        if self._container["securityContext"]["readOnlyRootFilesystem"]:
            mounts.append(f"mount -o remount,ro {root}")
        security = self._spec["securityContext"]
        enter = [
            *("chroot", str(root), "setpriv", f"--reuid={security['runAsUser']}"),
            *(f"--regid={security['runAsGroup']}", "--clear-groups", "--no-new-privs"),
            *("--bounding-set=-all", "--inh-caps=-all", "env", "-i", f"--chdir={ROOT}"),
            *(f"{name}={value}" for name, value in self._environment().items()),
        ]
        return "set -e\n" + "\n".join(mounts) + f'\nexec {shlex.join(enter)} "$@"\n'

    def _environment(self) -> dict[str, str]:
        environment = dict(_IMAGE)
        fields = {"metadata.name": self.name, "metadata.namespace": NAMESPACE, "status.podIP": self.address}
        for variable in self._container.get("env", ()):
            source = variable.get("valueFrom", {})
            if "fieldRef" in source:
                environment[variable["name"]] = fields[source["fieldRef"]["fieldPath"]]
            else:
                environment[variable["name"]] = variable.get("value", "")
        return environment

    async def _spawn(self, *command: str) -> asyncio.subprocess.Process:
        with self.log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *("ip", "netns", "exec", self._namespace, "bash", str(self._folder / "enter"), *command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    # while it lives

    async def live(self) -> None:
        """Runs the container and its probes, and starts it again when it ends, until it is told to end."""
        for tries in count():
            self.restarts = tries
            self._process = await self._spawn(*self._container["command"])
            self.started.set()
            probes = asyncio.create_task(self._probe())
            try:
                await self._process.wait()
            finally:
                probes.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await probes
                self._set_ready(False)
                # Nothing of a container outlives its first process.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            if self.ending or (
                self._process.returncode == 0 and self._spec.get("restartPolicy") == "OnFailure"
            ):
                return
            # As Kubernetes' own back-off, in tenths.
            await asyncio.sleep(min(30.0, 1.0 * 2**tries))

    async def _probe(self) -> None:
        container = self._container
        if not await self._passes_within(container.get("startupProbe")):
            os.kill(self.pid, signal.SIGKILL)
            return
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch(container.get("readinessProbe"), self._set_ready))
            group.create_task(self._watch(container.get("livenessProbe"), self._set_alive))

    async def _passes_within(self, probe: Mapping[str, Any] | None) -> bool:
        if probe is None:
            return True
        for _ in range(probe.get("failureThreshold", 3)):
            if await self._passes(probe):
                return True
            await asyncio.sleep(probe.get("periodSeconds", 10))
        return False

    async def _watch(self, probe: Mapping[str, Any] | None, tell: Callable[[bool], None]) -> None:
        failed = 0
        while probe is not None:
            failed = 0 if await self._passes(probe) else failed + 1
            if failed == 0 or failed >= probe.get("failureThreshold", 3):
                tell(failed == 0)
            await asyncio.sleep(probe.get("periodSeconds", 10))
        tell(True)

    async def _passes(self, probe: Mapping[str, Any]) -> bool:
        asked = probe.get("httpGet") or probe["tcpSocket"]
        port = next(one["containerPort"] for one in self._container["ports"] if one["name"] == asked["port"])
        seconds = probe.get("timeoutSeconds", 1)
        return await self._node.within(_answers(self.address, port, asked.get("path"), seconds))

    def _set_ready(self, ready: bool) -> None:
        if self.ready != ready:
            self.ready = ready
            self._node.publish()

    def _set_alive(self, alive: bool) -> None:
        if not alive:
            self.restarts += 1
            os.kill(self.pid, signal.SIGKILL)

    # the way out

    async def delete(self) -> float:
        """Ends it as Kubernetes does; returns the seconds from SIGTERM to its end.

        Raises:
            AssertionError: Its grace was over and it had to be killed.
        """
        self.ending = True
        self._node.publish()
        loop = asyncio.get_running_loop()
        end = loop.time() + self._spec.get("terminationGracePeriodSeconds", 30)
        before = self._container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        if before:
            hook = await self._spawn(*before)
            async with asyncio.timeout_at(end):
                assert await hook.wait() == 0, f"preStop failed; see {self.log}"
        assert self._process is not None
        began = loop.time()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout_at(end):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            raise AssertionError(f"{self.name} was not gone within its grace; see {self.log}") from None
        return loop.time() - began

    async def kill(self) -> None:
        """Ends it at once; for the end of a test."""
        self.ending = True
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def clear(self) -> None:
        """Takes its network away."""
        subprocess.run(["ip", "netns", "del", self._namespace], capture_output=True, timeout=30, check=False)


class Node:
    """The machine of all pods: a bridge in a network namespace of its own, and the names of services.

    Args:
        objects: the rendered chart.
        secrets: the secrets that are there, by name.
    """

    def __init__(
        self, objects: Sequence[Mapping[str, Any]], secrets: Mapping[str, Mapping[str, str]]
    ) -> None:
        self.prefix = f"h{os.getpid()}"
        self.namespace = f"{self.prefix}n"
        self.secrets = secrets
        self.objects = objects
        self.configs = {one["metadata"]["name"]: one["data"] for one in objects if one["kind"] == "ConfigMap"}
        self.pods: list[Pod] = []
        self._numbers = count(1)
        self._folder = Path()
        self._group = asyncio.TaskGroup()
        self._inside = _Inside(self.namespace)
        self._names = _Names()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Node]:
        """Makes the network; at the end nothing is left of it or of the pods."""
        with tempfile.TemporaryDirectory(prefix="hermesh-node-") as folder:
            self._folder = Path(folder)
            self._folder.chmod(0o755)
            _run("ip", "netns", "add", self.namespace)
            try:
                _run("ip", "-n", self.namespace, "link", "set", "lo", "up")
                _run("ip", "-n", self.namespace, "link", "add", "br0", "type", "bridge")
                _run("ip", "-n", self.namespace, "addr", "add", f"{NODE}/16", "dev", "br0")
                _run("ip", "-n", self.namespace, "link", "set", "br0", "up")
                with self._inside as inside:
                    server = await self.within(self._serve_names())
                    try:
                        async with asyncio.TaskGroup() as self._group:
                            try:
                                yield self
                            finally:
                                for pod in self.pods:
                                    await pod.kill()
                    finally:
                        inside.call(server.close)
            finally:
                for pod in self.pods:
                    pod.clear()
                _run("ip", "netns", "del", self.namespace)

    async def _serve_names(self) -> asyncio.BaseTransport:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: self._names, local_addr=(NODE, 53))
        return transport

    def command(self, *command: str) -> list[str]:
        """A command as it runs on the node, in the network of its pods."""
        return ["ip", "netns", "exec", self.namespace, *command]

    async def within(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits something in the network of the pods: what it connects to is there."""
        return await self._inside.do(work)

    def publish(self) -> None:
        """Sets the names of services: each resolves to its pods that are ready and not on their way out."""
        self._names.addresses = {
            f"{service['metadata']['name']}.{NAMESPACE}.svc.cluster.local.": [
                pod.address
                for pod in self.pods
                if pod.ready and not pod.ending and service["spec"]["selector"].items() <= pod.labels.items()
            ]
            for service in self.objects
            if service["kind"] == "Service"
        }

    async def start(self, workload: Mapping[str, Any]) -> Pod:
        """Starts one pod of a workload."""
        number = next(self._numbers)
        folder = self._folder / f"pod-{number}"
        folder.mkdir()
        template = workload["spec"]["template"]
        pod = Pod(self, f"{workload['metadata']['name']}-{number}", template, number, folder)
        pod.prepare()
        self.pods.append(pod)
        self._group.create_task(pod.live(), name=pod.name)
        await pod.started.wait()
        return pod

    def of(self, component: str) -> list[Pod]:
        """The pods of a component that are not on their way out."""
        return [
            pod
            for pod in self.pods
            if pod.labels["app.kubernetes.io/component"] == component and not pod.ending
        ]
