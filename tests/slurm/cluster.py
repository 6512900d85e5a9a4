"""A real SLURM on one machine: slurmctld, and a slurmd for each node in namespaces of its own.

A node has its own host name, address, /dev/shm and processes; killing its first process is a crash of a machine.
Needs root and Debian's slurm-wlm, munge and iproute2. GPUs, InfiniBand and a parallel file system are make-believe.
"""

import os
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path

PROGRAMS = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "srun": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
}
DISK_MB = 300
SETTINGS = """\
ClusterName=virtual
SlurmctldHost=localhost({net}.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again, 120 s by default.
AuthInfo=socket={root}/munge/sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
# No control groups: the nodes' processors and memory are make-believe.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
# What a node does before its first step of a job: nothing, or as long as the file says.
Prolog={root}/prolog.sh
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.txt
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=10
UnkillableStepTimeout=60
MessageTimeout=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
"""
NODE = """\
set -e; export PATH=$PATH:/usr/sbin:/sbin
hostname "$2"; mount --make-rprivate /; mount -t proc proc /proc
# Names come from this file alone: torch also looks up ::ffff:ADDRESS, and each miss in a dead DNS takes 10 s.
for name in hosts nsswitch.conf resolv.conf; do [ ! -e /etc/$name ] || mount --bind "$1/etc/$name" /etc/$name; done
mount -t tmpfs -o mode=1777 shm /dev/shm
ip link set lo up
while ! grep -q eth0 /proc/net/dev; do sleep 0.01; done
ip addr add "$3/16" dev eth0; ip link set eth0 up; ip route add default via "$4"
while :; do slurmd -D -f "$1/slurm.conf" -N "$2" </dev/null >/dev/null 2>>"$1/log/slurmd-$2.err" || sleep 0.2; done
"""


def missing() -> str | None:
    """Return what this machine lacks for a virtual cluster, as a command that mends it; None if it lacks nothing."""
    packages = {package for program, package in PROGRAMS.items() if _which(program) is None}
    if packages:
        return f"apt-get install --no-install-recommends {' '.join(sorted(packages))}"
    if os.geteuid() != 0:
        return "run as root: the nodes are namespaces"
    return None


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


class Cluster:
    """A cluster of `nodes` nodes under the folder `root`; use as a context."""

    def __init__(self, root: Path, nodes: int, *, gpus: int = 8) -> None:
        self.root, self.gpus = root, gpus
        self.prolog = root / "prolog_seconds"
        """Holds how long nodes take to begin with a job; without it they begin at once."""
        self.disk = root / "disk"
        """A small disk of its own, which all nodes share."""
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        number = 100 + int(secrets.token_hex(2), 16) % 100
        self._net, self._bridge = f"10.{number}", f"vslurm{number}"
        self._daemons: dict[str, subprocess.Popen] = {}
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
        }

    def __enter__(self) -> "Cluster":
        self._write_configuration()
        try:
            self.disk.mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "disk", str(self.disk)]  # before nodes are made
            subprocess.run(mount, env=self.environment, check=True)
            self._start_daemons()
            for name in self.names:
                self.start_node(name)
            self.wait_until(lambda: self._ready() == len(self.names), 90, "the nodes are not ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        for name in ("slurmctld", "munged"):
            pid = self.root / "run" / f"{name}.pid"
            if pid.exists():
                _end(int(pid.read_text()), str(self.root))
        subprocess.run(["ip", "link", "del", self._bridge], env=self.environment, check=False)
        subprocess.run(["umount", "--lazy", str(self.disk)], env=self.environment, check=False)

    def run(self, *command: str, check: bool = True) -> str:
        """Return what a command of SLURM prints."""
        ended = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert not check or ended.returncode == 0, f"{' '.join(command)}: {ended.stderr}"
        return ended.stdout.strip()

    def submit(self, folder: Path, *command: str, **environment: str) -> str:
        """Submit a batch script from `folder` and return the job's id."""
        ended = subprocess.run(
            ["sbatch", "--parsable", *command],
            cwd=folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    def state(self, job: str) -> str:
        """Return the state of a job in SLURM's word, such as RUNNING or COMPLETED."""
        described = self.run("scontrol", "show", "job", job, "-o", check=False)
        return next((word[9:] for word in described.split() if word.startswith("JobState=")), "GONE")

    def wait_for(self, job: str, *states: str, seconds: float) -> None:
        """Wait until a job is in one of `states`."""
        self.wait_until(lambda: self.state(job) in states, seconds, f"job {job} is not {states}")

    def wait_until(self, condition, seconds: float, complaint: str) -> None:
        """Wait until `condition()` holds; fail with `complaint` after `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (
                f"{complaint}\n{self.run('squeue', check=False)}\n{self.run('sinfo', '-N')}"
            )
            time.sleep(0.1)

    def crash_node(self, name: str) -> None:
        """Let a machine die: its slurmd and everything that runs on it, at once."""
        self._daemons[name].kill()
        self._daemons[name].wait()
        subprocess.run(["ip", "link", "del", f"{self._bridge}{name[4:]}"], env=self.environment, check=False)

    def inside(self, name: str, *command: str) -> subprocess.CompletedProcess:
        """Run a command on a node."""
        enter = ["nsenter", "--target", str(self._init(name)), "--mount", "--net", "--uts", "--pid"]
        return subprocess.run([*enter, *command], env=self.environment, capture_output=True, text=True, check=False)

    def start_node(self, name: str) -> None:
        """Start a node, or start it again."""
        number = int(name[4:])
        address = f"{self._net}.1.{number}"
        (self.root / "spool" / name).mkdir(parents=True, exist_ok=True)
        script = self.root / "node.sh"
        namespaces = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
        arguments = ["bash", str(script), str(self.root), name, address, f"{self._net}.0.1"]
        with (self.root / "log" / f"init-{name}.log").open("a") as log:
            node = subprocess.Popen(
                [*namespaces, *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, start_new_session=True,
            )  # fmt: skip
        self._daemons[name] = node
        own = os.readlink("/proc/self/ns/net")
        self.wait_until(lambda: os.readlink(f"/proc/{node.pid}/ns/net") != own, 10, f"{name} has no namespace")
        cable = f"{self._bridge}{number}"
        link = ["ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(node.pid)]
        subprocess.run(link, env=self.environment, check=True)
        subprocess.run(["ip", "link", "set", cable, "master", self._bridge, "up"], env=self.environment, check=True)

    def _init(self, name: str) -> int:
        children = Path(f"/proc/{self._daemons[name].pid}/task/{self._daemons[name].pid}/children")
        return int(children.read_text().split()[0])

    def _ready(self) -> int:
        lines = self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %t", check=False).splitlines()
        return sum(line.split()[1] in ("idle", "mix", "alloc") for line in lines)

    def _write_configuration(self) -> None:
        for folder in ("state", "spool", "log", "run", "munge", "dev", "etc"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / "munge").chmod(0o711)
        key = self.root / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        for number in range(self.gpus):  # SLURM wants device files for its GPUs
            (self.root / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        lines = [SETTINGS.format(root=self.root, net=self._net)]
        hosts = ["127.0.0.1 localhost", f"{self._net}.0.1 {os.uname().nodename} controller"]
        for number, name in enumerate(self.names, 1):
            address = f"{self._net}.1.{number}"
            hosts.append(f"{address} {name}")
            lines.append(
                f"NodeName={name} NodeHostname={name} NodeAddr={address} Port=6818 CPUs=128 RealMemory=2000000 "
                f"Gres=gpu:{self.gpus} State=UNKNOWN\n"
            )
        lines.append("PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1\n")
        lines.append("PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2\n")
        (self.root / "slurm.conf").write_text("".join(lines))
        devices = f"{self.root}/dev/nvidia[0-{self.gpus - 1}]"
        (self.root / "gres.conf").write_text(f"NodeName=node[1-{len(self.names)}] Name=gpu File={devices}\n")
        (self.root / "etc" / "hosts").write_text("\n".join(hosts) + "\n")
        (self.root / "etc" / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (self.root / "etc" / "resolv.conf").write_text("")
        (self.root / "node.sh").write_text(NODE)
        (self.root / "prolog.sh").write_text(f"#!/bin/sh\n[ ! -e {self.prolog} ] || sleep $(cat {self.prolog})\n")
        (self.root / "prolog.sh").chmod(0o755)

    def _start_daemons(self) -> None:
        munge = self.root / "munge"
        subprocess.run(
            [
                *("munged", "--force", f"--socket={munge}/sock", f"--key-file={munge}/key", "--num-threads=4"),
                *(f"--pid-file={self.root}/run/munged.pid", f"--log-file={self.root}/log/munged.log"),
                f"--seed-file={munge}/seed",
            ],
            env=self.environment, check=True, capture_output=True,
        )  # fmt: skip
        for command in (
            ["ip", "link", "add", self._bridge, "type", "bridge"],
            ["ip", "addr", "add", f"{self._net}.0.1/16", "dev", self._bridge],
            ["ip", "link", "set", self._bridge, "up"],
        ):
            subprocess.run(command, env=self.environment, check=True)
        hosts = f'mount --bind "{self.root}/etc/hosts" /etc/hosts; exec slurmctld -f "{self.root}/slurm.conf"'
        subprocess.run(["unshare", "-m", "sh", "-c", hosts], env=self.environment, check=True)


def _end(pid: int, root: str) -> None:
    """End a daemon of ours: its command line names our folder."""
    line = Path(f"/proc/{pid}/cmdline")
    for sent in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(100):
            if not line.exists() or root not in line.read_text():
                return
            os.kill(pid, sent)
            time.sleep(0.05)
