"""A SLURM of our own: munge, slurmctld and several slurmd on this host, in a temporary folder.

Runs as the current user, on free ports; nothing in /etc is read or written. Nodes have more cores
and GPUs on paper than the host has in truth, so that the shipped templates fit as they are.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from getpass import getuser
from pathlib import Path

import psutil

from tests.support.trainer_fixtures import ROOT

PATIENCE = 240.0
"""Seconds without a sign of progress before a test gives up; how long all takes is not asserted."""

LOOK = 5.0
"""Seconds between two looks for such signs."""

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
GresTypes=gpu
JobRequeue=1
MinJobAge=36000
KillWait=60
ReturnToService=2
FirstJobId={first_job}
{nodes}
PartitionName=main Nodes={main} Default=YES MaxTime=INFINITE State=UP
PartitionName=doomed Nodes={doomed} MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=128 Gres=gpu:8"


def missing() -> list[str]:
    """The programs of SLURM that this machine lacks."""
    return [name for name in DAEMONS if shutil.which(name, path=PATH) is None]


def wait_until(
    holds: Callable[[], bool], what: Callable[[], str], signs: Callable[[], object]
) -> None:
    """Polls until `holds`; fails with `what` once all `signs` have stayed the same for long."""
    found, changed = signs(), time.monotonic()
    looked = changed
    while not holds():
        time.sleep(0.2)  # only between two looks
        if (now := time.monotonic()) - looked > LOOK:
            before, found, looked = found, signs(), now
            changed = changed if found == before else now
            assert now - changed < PATIENCE, f"nothing moves, waiting for: {what()}"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Cluster:
    """Daemons in `folder`, from `start` to `stop`.

    Args:
        folder: an empty folder with a short path (it holds a socket).
        main: how many nodes of the default partition, named n0, n1 ...
        doomed: how many of partition `doomed`, named d0, d1 ..., that tests may lose.
    """

    def __init__(self, folder: Path, main: int = 4, doomed: int = 3) -> None:
        self.folder = folder
        self.nodes = [*(f"n{i}" for i in range(main)), *(f"d{i}" for i in range(doomed))]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        controller, *ports = _free_ports(1 + len(self.nodes))
        host = socket.gethostname()
        lines = [
            NODE.format(name=name, host=host, port=port)
            for name, port in zip(self.nodes, ports, strict=True)
        ]
        text = CONFIG.format(
            host=host, controller=controller, user=getuser(), folder=folder,
            first_job=1 + os.getpid() % 19000, nodes="\n".join(lines),
            main=",".join(self.nodes[:main]), doomed=",".join(self.nodes[main:]),
        )  # fmt: skip
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(text)
        for number in range(8):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-7]\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": PATH,
        }

    def __enter__(self) -> "Cluster":
        """Starts all daemons and waits until every node is idle."""
        try:
            self._start()
        except BaseException:
            self._end_daemons()
            raise
        return self

    def _start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._spawn(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed",
        )  # fmt: skip
        self.wait_until((self.folder / "munge.socket").exists, lambda: "the socket of munged")
        self._spawn("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self._spawn(node, "slurmd", "-D", "-N", node)
        self.wait_until(self.is_idle, lambda: f"idle nodes; see the logs in {self.folder}")

    def wait_until(self, holds: Callable[[], bool], what: Callable[[], str]) -> None:
        """Polls until `holds`; fails with `what` once nothing has moved in the cluster for long."""
        wait_until(holds, what, self._signs)

    def _signs(self) -> object:
        """What changes while anything goes on: the queue, the logs, what jobs have computed."""
        queue = self.run("squeue", "--noheader", "--format=%i %T %r %N", check=False).stdout
        logs = sum(path.stat().st_size for path in self.folder.glob("*.log"))
        seconds = 0
        for process in self._job_processes():
            with suppress(psutil.Error):
                seconds += int(sum(process.cpu_times()[:2]))
        return queue, logs, seconds

    def _job_processes(self, node: str | None = None) -> Iterator[psutil.Process]:
        """What jobs have started, on all nodes or one."""
        mine = str(self.folder / "slurm.conf")
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                where = environment.get("SLURMD_NODENAME")
                if environment.get("SLURM_CONF") == mine and where and node in (where, None):
                    yield process

    def is_idle(self) -> bool:
        """Whether all nodes are there and nothing runs on any, nor still ends."""
        for name, process in self._daemons.items():
            assert process.poll() is None, f"{name} ended; see the logs in {self.folder}"
        return self._states() == ["idle"] * len(self.nodes)

    def is_left(self, number: str) -> bool:
        """Whether anything of a job still runs or ends on any node."""
        titles = (" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))
        return any(title.startswith(f"slurmstepd: [{number}.") for title in titles)

    def _states(self, *words: str) -> list[str]:
        command = ("sinfo", "--noheader", "--Node", "--format=%t", *words)
        return self.run(*command, check=False).stdout.split()

    def _spawn(self, name: str, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log
            )

    def __exit__(self, *_: object) -> None:
        """Cancels all jobs, waits for their processes to go, and ends the daemons."""
        try:
            self.run("scancel", "--quiet", f"--user={getuser()}", check=False)
            shown = ["squeue", "--noheader"]
            self.wait_until(
                lambda: not self.run(*shown, check=False).stdout.strip(), lambda: "an empty queue"
            )
        finally:
            self._end_daemons()

    def _end_daemons(self) -> None:
        for process in reversed(self._daemons.values()):
            process.terminate()
        for process in self._daemons.values():
            process.wait(PATIENCE)
        for node in self.nodes:  # what a test that failed may have left
            self._kill_processes_on(node)

    def lose(self, node: str) -> None:
        """What a power cut does to a node: all its processes are gone at once, then SLURM knows."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        self._kill_processes_on(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def lose_slurmd(self, node: str) -> None:
        """SLURM loses a node whose jobs go on: their processes are those of others."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def _kill_processes_on(self, node: str) -> None:
        for number in (signal.SIGSTOP, signal.SIGKILL):  # at once: none may see another go
            for pid in self.processes_on(node):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def repair(self, node: str) -> None:
        """Brings a lost node back, and waits until SLURM has heard of it."""
        self._spawn(node, "slurmd", "-D", "-N", node)
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        there = ("idle", "mix", "alloc")
        self.wait_until(
            lambda: set(self._states(f"--nodes={node}")) <= set(there), lambda: f"{node} back"
        )

    def processes_on(self, node: str) -> list[int]:
        """What runs for jobs on a node: SLURM's own process of each step, then the step's."""
        return [process.pid for process in (*self._step_daemons(node), *self._job_processes(node))]

    def _step_daemons(self, node: str) -> list[psutil.Process]:
        """The slurmstepd of a node; each has its own name for a title, and the node's log open."""
        log, found = str(self.folder / f"slurmd-{node}.log"), []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.name() == "slurmstepd" and log in (f.path for f in process.open_files()):
                    found.append(process)
        return found

    def run(
        self, *command: str, check: bool = True, cwd: Path = ROOT, **extra: str
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a command of SLURM's against this cluster."""
        result = subprocess.run(
            command,
            env=self.environment | extra,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result

    def facts(self, job: str) -> Mapping[str, str]:
        """What `scontrol show job` says of a job, by key."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(part.split("=", 1) for part in text.split() if "=" in part)
