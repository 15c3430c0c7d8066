"""A real Slurm cluster on this machine, for tests: munged, slurmctld and one slurmd per node, each with an address.

All of it lives in namespaces of its own (processes, network, mounts, host name) below one process that reads a pipe
from this one. Whatever ends this process, a kill included, closes the pipe; then the kernel ends every daemon and job
and takes bridge, links and mounts with them. Two clusters on a machine cannot meet, so nothing needs a name or a port
of its own. Files are in the folder given, nowhere else.

A node is a network namespace, joined to the others by a bridge: its link can be cut, and all its processes killed.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "ip", "nsenter", "unshare")
NETWORK = "10.77.0"
CONTROLLER = f"{NETWORK}.1"
START_S = 30.0
COMMAND_S = 60.0
# Times short enough for a test; a real cluster has SlurmdTimeout=300, KillWait=30 and waits 120 s before it starts a
# requeued job (cred_expire).
CONF = """\
ClusterName=test
SlurmctldHost=controller({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=100000,bf_interval=2
ReturnToService=2
JobRequeue=1
SlurmdTimeout={dead_after_s}
KillWait={kill_wait_s}
MessageTimeout={message_s}
InactiveLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool-%n
GresTypes=gpu
{nodes}
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace_s} MaxTime=UNLIMITED State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=UNLIMITED State=UP
"""
# Resources as a cluster's nodes have them; nobody looks whether they are there.
NODE = "NodeName={name} NodeAddr={address} CPUs=96 RealMemory=1000 Gres=gpu:8 State=UNKNOWN"
SET_UP = """\
set -eu
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mount --bind {folder}/hosts /etc/hosts
hostname controller
ip link set lo up
ip link add bridge type bridge
ip addr add {controller}/24 dev bridge
ip link set bridge up
munged --key-file={folder}/munge/key --socket={folder}/munge/socket --pid-file={folder}/munge/pid \
    --log-file={folder}/munge/log --seed-file={folder}/munge/seed --force
slurmctld -c
"""
SET_UP_NODE = """\
set -eu
ip netns add {name}
ip link add {name} type veth peer name eth0 netns {name}
ip link set {name} master bridge up
ip -n {name} link set lo up
ip -n {name} addr add {address}/24 dev eth0
ip -n {name} link set eth0 up
"""
# `ip netns exec` would mount another /sys, with which slurmd does not start. A host name of its own, as nodes have.
START_NODE = "nsenter --net=/run/netns/{name} unshare --uts sh -c 'hostname {name} && exec slurmd -N {name} -c'"


class ClusterError(RuntimeError):
    """The cluster did not do what it was told, with what its daemons say."""


def missing() -> list[str]:
    """What this machine lacks to bring up a cluster; [] if nothing."""
    lacking = [] if os.geteuid() == 0 else ["root's rights"]
    # Debian keeps daemons where only root looks.
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return lacking + [program for program in PROGRAMS if shutil.which(program, path=path) is None]


class Cluster:
    """Running between __enter__ and __exit__; a context manager.

    Raises: ClusterError if it does not come up.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 3,
        grace_s: int = 30,
        dead_after_s: int = 10,
        kill_wait_s: int = 15,
        message_s: int = 30,
    ) -> None:
        self.folder = folder
        self.addresses = {f"n{number}": f"{NETWORK}.{10 + number}" for number in range(1, nodes + 1)}
        self._times = {
            "grace_s": grace_s,
            "dead_after_s": dead_after_s,
            "kill_wait_s": kill_wait_s,
            "message_s": message_s,
        }
        self._keeper: subprocess.Popen[bytes] | None = None
        self._init = 0  # the first process of the namespaces

    def __enter__(self) -> Cluster:
        try:
            self._write_files()
            self._make_namespaces()
            self.shell(SET_UP.format(folder=self.folder, controller=CONTROLLER))
            for name, address in self.addresses.items():
                self.shell(SET_UP_NODE.format(name=name, address=address))
                self.start_node(name)
            self.wait_for(lambda: self._idle_nodes() == len(self.addresses), START_S, "nodes did not become idle")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Nothing; every process of the cluster is gone when it returns, and all but the folder with them."""
        if self._keeper is not None:
            assert self._keeper.stdin is not None
            self._keeper.stdin.close()
            self._keeper.wait(30)
            self._keeper = None

    def run(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Standard output of a command on the controller's host.

        Raises: ClusterError if it fails or takes longer than a minute.
        """
        try:
            done = subprocess.run(
                self._inside(*command),
                cwd=cwd or self.folder,
                env=self._environment(env),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=COMMAND_S,
                text=True,
            )
        except subprocess.TimeoutExpired:
            self._fail(f"{' '.join(command)} did not end within {COMMAND_S:.0f} s")
        if done.returncode:
            self._fail(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def shell(self, script: str) -> str:
        """Standard output of a shell script on the controller's host, as `run`."""
        return self.run("sh", "-c", script)

    def start_node(self, name: str) -> None:
        """Nothing; starts the node's slurmd, the first time or after `kill_node`."""
        self.shell(START_NODE.format(name=name))

    def kill_node(self, name: str) -> None:
        """Nothing; every process of the node is killed at once, as when its power fails."""
        while pids := self.pids(name):
            self.shell(f"kill -9 {' '.join(map(str, pids))} 2>/dev/null || true")

    def pids(self, name: str, command: str = "") -> list[int]:
        """The node's processes, those whose command line begins with `command`, as the cluster numbers them."""
        script = f"for p in $(ip netns pids {name}); do tr '\\0' ' ' < /proc/$p/cmdline | sed \"s/^/$p /\"; echo; done"
        lines = [line.split(" ", 1) for line in self.shell(script).splitlines() if " " in line]
        return [int(pid) for pid, arguments in lines if arguments.startswith(command)]

    def kill(self, pid: int, signal_name: str) -> None:
        """Nothing; sends the signal to a process by the cluster's number of it."""
        self.run("kill", "-s", signal_name, str(pid))

    def set_link(self, name: str, up: bool) -> None:
        """Nothing; plugs the node's network cable in or pulls it."""
        self.run("ip", "link", "set", name, "up" if up else "down")

    def bytes_sent(self, name: str) -> int:
        """By the node through its cable, since it was set up."""
        (link,) = json.loads(self.run("ip", "-netns", name, "-stats", "-json", "link", "show", "eth0"))
        return int(link["stats64"]["tx"]["bytes"])

    def wait_for(self, holds: Callable[[], bool], timeout_s: float, problem: str) -> None:
        """Returns as soon as the condition holds.

        Raises: ClusterError when it does not within the time.
        """
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline:
                self._fail(f"{problem} within {timeout_s:.0f} s")
            time.sleep(0.2)

    @property
    def space(self) -> str:
        """Name of the namespace that all its processes are in, as in /proc/PID/ns/pid."""
        return os.readlink(f"/proc/{self._init}/ns/pid")

    def _idle_nodes(self) -> int:
        return self.run("sinfo", "--noheader", "--Node", "--partition=normal", "--format=%t").split().count("idle")

    def _write_files(self) -> None:
        folder = self.folder
        (folder / "state").mkdir(parents=True)
        (folder / "munge").mkdir(mode=0o700)
        (folder / "munge" / "key").write_bytes(os.urandom(1024))
        (folder / "munge" / "key").chmod(0o400)
        nodes = "\n".join(NODE.format(name=name, address=address) for name, address in self.addresses.items())
        conf = CONF.format(folder=folder, controller=CONTROLLER, nodes=nodes, **self._times)
        (folder / "slurm.conf").write_text(conf)
        for number in range(8):
            os.mknod(folder / f"gpu{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))  # another /dev/null
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        hosts = {"localhost": "127.0.0.1", "controller": CONTROLLER} | self.addresses
        (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))

    def _make_namespaces(self) -> None:
        command = ("unshare", "--pid", "--fork", "--net", "--uts", "--ipc", "--mount", "--mount-proc")
        # The shell is the first process: it waits for the end of its input, and reaps what daemons leave behind.
        self._keeper = subprocess.Popen(
            [*command, "bash", "-c", "echo up; read -r"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != b"up\n":
            raise ClusterError(f"{' '.join(command)} failed: namespaces need root's rights, in a container its own")
        children = Path(f"/proc/{self._keeper.pid}/task/{self._keeper.pid}/children").read_text()
        self._init = int(children.split()[0])

    def _inside(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self._init}", "--pid", "--net", "--uts", "--ipc", "--mount", "--wd=.", *command]

    def _environment(self, more: dict[str, str] | None) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "MASTER_", "LDM_"))}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf")} | (more or {})

    def _fail(self, problem: str) -> NoReturn:
        logs = [self.folder / f"{name}.log" for name in ("slurmctld", *self.addresses)]
        ends = [f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-15:]) for log in logs if log.exists()]
        raise ClusterError("\n".join([problem, *ends]))
