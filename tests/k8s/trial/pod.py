"""A pod on this machine: its own network, processes and files; user 1000, nothing else allowed.

Its root is this machine's, read-only; /tmp and /dev/shm can be written, as the manifest has it.
Memory and cores are not limited. Probes are asked as the kubelet would.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.k8s.overlays import ROOT, Doc, quantity
from tests.k8s.trial.kuberay import environment, start_command

BRIDGE = "rmk0"
NETWORK = "10.79.0"
_USER = "setpriv --reuid 1000 --regid 1000 --clear-groups"
_LOCKED = f"{_USER} --no-new-privs --inh-caps=-all --bounding-set=-all"


def run(*command: str, check: bool = True) -> str:
    """A command's output; raises with what it said when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip()}")
    return done.stdout + done.stderr


def answer(url: str, timeout_s: float) -> int | str:
    """The status, or what went wrong."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answered:
            return int(answered.status)
    except urllib.error.HTTPError as e:
        return e.code
    except OSError as e:
        return type(e).__name__


class Pod:
    """Runs from the start; `ready` follows its readiness probe."""

    def __init__(
        self, cluster: str, name: str, number: int, group: Doc, head: str | None, redis: Doc
    ) -> None:
        """`number` ends its address; `head` is the head pod's address, None for that itself;
        `redis` the cluster's gcsFaultToleranceOptions, if it has any."""
        self.name, self.ip = f"{cluster}-{name}", f"{NETWORK}.{number}"
        spec = group["template"]["spec"]
        container = spec["containers"][0]
        self._ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        self._readiness, self._liveness = container["readinessProbe"], container["livenessProbe"]
        self.serves = "serve" in self._ports and head is not None
        self.ready = self.terminating = False
        self._network = f"rmk-{self.name}"
        self._folder = Path(tempfile.mkdtemp(prefix=f"pod-{self.name}-"))
        self._join_network()
        variables = environment(group, cluster, self.name, head, redis)
        variables |= {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"}
        variables |= {"HOME": "/tmp", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        script = self._folder / "start.sh"
        script.write_text(self._script(spec, start_command(group, head, redis), variables))
        self._log = self._folder / "log"
        alone = ["unshare", "--mount", "--pid", "--fork", "--propagation", "private"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self._network}", *alone, "bash", str(script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        threading.Thread(target=self._kubelet, daemon=True).start()

    def _join_network(self) -> None:
        near = f"rmk{self.ip.rpartition('.')[2]}"
        inside = ("ip", "-n", self._network)
        run("ip", "netns", "add", self._network)
        run("ip", "link", "add", near, "type", "veth", "peer", "eth0", "netns", self._network)
        run("ip", "link", "set", near, "master", BRIDGE, "up")
        run(*inside, "address", "add", f"{self.ip}/24", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "route", "add", "default", "via", f"{NETWORK}.1")

    def _script(self, spec: Doc, command: str, variables: dict[str, str]) -> str:
        base, root = self._folder / "disk", self._folder / "disk/root"
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        shm = int(quantity(volumes["shm"]["emptyDir"]["sizeLimit"]))
        listed = " ".join(shlex.quote(f"{k}={v}") for k, v in variables.items())
        # what the user of the pod must be able to walk through, /root for one
        ways = {str(p) for at in (sys.base_prefix, ROOT) for p in Path(at).resolve().parents}
        empty = "mode=2777,gid=1000"  # an emptyDir under fsGroup 1000
        return f"""set -e
mkdir {base} && mount -t tmpfs tmpfs {base} && mkdir {base}/upper {base}/work {root}
mount -t overlay overlay -o lowerdir=/,upperdir={base}/upper,workdir={base}/work {root}
for way in {" ".join(sorted(ways))}; do chmod o+x {root}$way; done
mkdir -p {root}/models {root}/weights {root}/etc/raymoe
mount -t tmpfs tmpfs -o size=4g,{empty} {root}/tmp
mount --rbind /dev {root}/dev
mount -t tmpfs tmpfs -o size={shm},{empty} {root}/dev/shm
mount -t proc proc {root}/proc
mount -t tmpfs tmpfs -o size=1g,{empty} {root}/models
mount --bind {ROOT}/models {root}/weights
chroot {root} {_USER} cp -R /weights/. /models/
mount -o remount,ro {root}/models
mount -t tmpfs tmpfs -o size=1m {root}/etc/raymoe
printf 0123456789abcdef0123456789abcdef > {root}/etc/raymoe/deployment_secret
printf abcdef0123456789 > {root}/etc/raymoe/admin_token
chown 0:1000 {root}/etc/raymoe/* && chmod 0440 {root}/etc/raymoe/*
mount -o remount,ro {root}
exec chroot {root} {_LOCKED} env -i {listed} bash -c 'cd /tmp; exec /bin/bash -c -- "$0"' \\
  {shlex.quote(command)}
"""

    def _url(self, probe: Doc) -> str:
        asked = probe["httpGet"]
        return f"http://{self.ip}:{self._ports.get(asked['port'], asked['port'])}{asked['path']}"

    def _kubelet(self) -> None:
        missed = 0
        while self._process.poll() is None:
            got = answer(self._url(self._readiness), self._readiness["timeoutSeconds"])
            missed = 0 if got == 200 else missed + 1
            if got == 200 or missed >= self._readiness["failureThreshold"]:
                self.ready = got == 200
            time.sleep(self._readiness["periodSeconds"])
        self.ready = False

    def alive(self) -> int | str:
        """What its liveness probe gets."""
        return answer(self._url(self._liveness), self._liveness["timeoutSeconds"])

    def first_process(self) -> int:
        """Process 1 of the pod, by its number here."""
        children = f"/proc/{self._process.pid}/task/{self._process.pid}/children"
        return int(Path(children).read_text().split()[0])

    def inside(self, command: str) -> str:
        """Output of a shell command that the pod's user runs in the pod."""
        enter = ["nsenter", "-t", str(self.first_process()), "-m", "-p", "-n", "--root"]
        return run(*enter, *_USER.split(), "bash", "-c", command, check=False).strip()

    def terminate(self) -> None:
        """SIGTERM to its first process, as at the end of every pod."""
        self.terminating = True
        os.kill(self.first_process(), signal.SIGTERM)

    def told(self) -> str:
        """The end of what it wrote."""
        text = self._log.read_text() if self._log.exists() else "(removed)"
        return f"---- {self.name}, exit status {self.status}\n{text[-2000:]}"

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    def remove(self) -> None:
        """Nothing of it is left, whatever state it is in."""
        self.terminating = True
        if self._process.poll() is None:
            try:
                os.kill(self.first_process(), signal.SIGKILL)
            except IndexError:  # it has not begun
                self._process.kill()
            self._process.wait(20)
        run("ip", "netns", "delete", self._network, check=False)
        shutil.rmtree(self._folder, ignore_errors=True)  # its disk was mounted for it alone
