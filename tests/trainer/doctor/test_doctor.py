"""`python -m trainer.doctor`: what can be wrong is provoked, found, and gone with its remedy."""

import errno
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from tests.support import warm
from tests.support.hub_server import running_hub
from tests.support.trainer_fixtures import environment
from trainer.config.command_line import parse_without_data
from trainer.doctor import __main__ as doctor, data, machine, ranks, room, table
from trainer.doctor.lines import Check, Line, Subject
from trainer.engine.collectives import ON_CPU, OPERATORS
from trainer.process.errors import ConfigError, StorageError
from trainer.process.world import ALONE, World


@pytest.fixture(scope="module")
def subject(few: dict[str, str]) -> Callable[..., Subject]:
    """A process of a run with the flags given, and the shards and the plan of a plain one."""
    root = f"--data.root={few['data__root']}"
    plain = Subject(parse_without_data([root]), ALONE)
    assert not bad([*data.shards(plain), *data.plan(plain)])

    def made(*flags: str, world: World = ALONE) -> Subject:
        return replace(plain, config=parse_without_data([root, *flags]), world=world)

    return made


def bad(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.level != "ok"]


def look(check: Callable[[Subject], Iterator[Line]], subject: Subject) -> list[Line]:
    return Check("check", check, 60.0).lines(subject)


def test_alone(
    few: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    flags = [f"--data.root={few['data__root']}", f"--data.cache_dir={tmp_path / 'scratch'}"]
    assert doctor.main(flags) == 0
    shown = capsys.readouterr().out
    for check in (
        "software", "SLURM", "GPU", "operators", "open files", "locked memory", "shards", "plan",
        "cores", "reading", "weights", "shared memory", "room: output", "room: cache",
        "room: shards", "room: temporary files", "processes",
    ):  # fmt: skip
        assert f"│ {check} " in shown
    assert ", 0 failures\n" in shown
    assert not os.listdir(tmp_path), "nothing is left"
    assert doctor.main(["--data.worker=3"]) == 2
    assert doctor.main(["--data.root=/nowhere", "--data.dataset=folder"]) == 2
    shown = capsys.readouterr().out
    assert "/nowhere" in shown
    assert "python -m shards.writer" in shown, "the remedy"
    assert "not known without the data" in shown


def test_errors_and_hangs_are_lines() -> None:
    def fails(error: Exception) -> Line:
        def look(_: Subject) -> Iterator[Line]:
            yield Line(check="begun", found="before")
            raise error

        first, line = Check("broken", look, 5.0).lines(Subject(parse_without_data([]), ALONE))
        assert first.check == "begun"
        return line

    line = fails(ConfigError("a.b: wrong; mend\nit"))
    assert (line.found, line.remedy, line.code) == ("a.b: wrong", "mend it", 2)
    assert fails(StorageError("gone")).code == 1
    assert fails(ImportError("no torch")).level == "failure"
    line = fails(ZeroDivisionError("division by zero"))
    assert (line.level, line.found) == ("warning", "ZeroDivisionError: division by zero")
    ended = threading.Event()

    def hangs(_: Subject) -> list[Line]:
        ended.wait(30)
        return []

    (line,) = Check("disk", hangs, 0.05).lines(Subject(parse_without_data([]), ALONE))
    ended.set()
    assert (line.level, line.found) == ("failure", "no answer within 0.05 s")


def test_a_small_dev_shm(subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    small = SimpleNamespace(f_bavail=1, f_bfree=1, f_blocks=1, f_frsize=2**20)
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda p: small if p == "/dev/shm" else real(p))
    (line,) = look(room.shared_memory, subject("--data.workers=2"))
    assert (line.level, line.code) == ("failure", 2)
    assert "/dev/shm, of 1 MiB with 1 MiB free, must hold" in line.found
    assert "--shm-size=8g" in line.remedy
    (line,) = look(room.shared_memory, subject("--data.workers=0"))
    assert line.level == "warning", "0 needs none, NCCL some"
    small.f_bavail = 2**13  # the remedy
    assert not bad(look(room.shared_memory, subject("--data.workers=2")))


def test_a_full_disk(
    subject: Callable[..., Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(**changes: int) -> Line:
        status = dict.fromkeys(("f_bavail", "f_files", "f_favail"), 10**6) | {"f_frsize": 4096}
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**(status | changes)))
        one = subject(f"--output_dir={tmp_path / 'not' / 'yet'}")
        return next(line for line in look(room.folders, one) if line.check == "room: output")

    assert found().level == "ok"
    assert found(f_files=0, f_favail=0).level == "ok", "btrfs has no table of files"
    for line in (found(f_bavail=10), found(f_favail=10)):
        assert (line.level, line.code) == ("failure", 73)
        assert line.remedy == "free space, or name another: --output_dir"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = found()
    assert (line.level, line.code) == ("failure", 73)
    assert line.found == f"{tmp_path} cannot be written (No space left on device)"
    (tmp_path / "not").touch()
    assert "cannot be written (Not a directory)" in found().found
    (tmp_path / "not").unlink()
    assert not os.listdir(tmp_path)


def test_no_compiler(
    subject: Callable[..., Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OPERATORS, str(tmp_path / "operators"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (line,) = look(machine.operators, subject())
    assert line.level == "failure"
    assert line.found.startswith("no c++ on the PATH")
    compiler = tmp_path / "my-c++"
    compiler.touch(0o755)
    monkeypatch.setenv("CXX", str(compiler))  # the remedy
    assert not bad(look(machine.operators, subject()))
    monkeypatch.setenv("CXX", "no-such-program")
    (tmp_path / "operators" / ON_CPU).mkdir()
    (tmp_path / "operators" / ON_CPU / "built.so").touch()
    one = subject("--model.compile=blocks")
    built, blocks = look(machine.operators, one)
    assert built.level == "ok"
    assert (blocks.level, blocks.code) == ("failure", 2)
    assert "use --model.compile off" in f"{blocks.found}; {blocks.remedy}"


def test_limits_and_cores(
    subject: Callable[..., Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, before[1]))
        files, memory = look(machine.limits, subject())
        assert files.level == "failure"
        needed = int(files.remedy.split()[2])  # ulimit -n NEEDED
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, before[1]))
        assert not bad(look(machine.limits, subject()))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "no InfiniBand" in memory.found
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(machine, "INFINIBAND", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    (line,) = bad(look(machine.limits, subject(world=World(0, 2, 0, 1))))
    assert (line.check, line.found) == ("locked memory", "64 KiB may be locked")

    (line,) = look(machine.cores, subject("--data.workers=3000"))
    assert (line.level, line.remedy[:20]) == ("warning", "--cpus-per-task=3001")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    (line,) = look(machine.cores, subject())
    assert (line.level, line.found[:5]) == ("warning", "0.5 f")
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "none")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4000")
    (line,) = look(machine.cores, subject())
    assert line.remedy.startswith("srun --cpus-per-task=4000")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    monkeypatch.setattr(Subject, "images_per_second", 1000.0)
    one = subject()
    assert one.plan is not None
    one.plan = replace(one.plan, load=replace(one.plan.load, loaders=1))
    (line,) = look(machine.cores, one)
    assert (line.level, line.remedy[:17]) == ("warning", "--data.workers 10")


def test_gpus_that_torch_does_not_see() -> None:
    def level(driver: str, **told: str) -> str:
        return machine._no_gpu("13.0", driver, told).level

    assert level("") == level("550", CUDA_VISIBLE_DEVICES="") == "ok"
    assert level("550") == "failure"
    assert level("", SLURM_GPUS_ON_NODE="4") == "warning"


@pytest.mark.parametrize(
    ("told", "level"),
    [
        ({}, "ok"),
        ({"SLURM_NTASKS": "4"}, "warning"),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, "ok"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "RANK": "0"}, "failure"),
    ],
)
def test_slurm(
    told: Mapping[str, str], level: str, subject: Callable[..., Subject],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in {"SLURM_JOB_ID": "5", **told}.items():
        monkeypatch.setenv(name, value)
    (line,) = look(machine.slurm, subject())
    assert line.level == level


def test_weights(
    subject: Callable[..., Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    one = subject("--model.backbone=vit_tiny_patch16_224.augreg_in21k")
    with running_hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        (line,) = look(data.weights, one)
        assert (line.level, line.code) == ("failure", 2)
        assert "is not in " in line.found
        assert "--model.weights FILE" in line.remedy
        server.repositories["timm/vit_tiny_patch16_224.augreg_in21k"] = {"model.safetensors": b"x"}
        assert [line.check for line in look(data.weights, one)] == ["weights", "room: weights"]
    monkeypatch.setattr(data, "is_offline_mode", lambda: True)
    (line,) = look(data.weights, one)
    assert "HF_HUB_OFFLINE forbids" in line.found
    (tmp_path / "w.safetensors").touch()
    given = replace(one.config.model, weights=str(tmp_path / "w.safetensors"))
    one.config = replace(one.config, model=given)
    assert not bad(look(data.weights, one)), "the remedy"


def test_reading_a_set_far_away(
    few: dict[str, str], subject: Callable[..., Subject], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    one = subject(f"--data.root=file://{few['data__root']}", f"--data.cache_dir={tmp_path}")
    assert not bad(look(data.shards, one))
    fetching, reading = look(data.reading, one)
    assert "MiB/s" in fetching.found
    assert "images/s" in reading.found
    again, _ = look(data.reading, one)
    assert again.found.endswith("already")
    (line,) = [line for line in look(room.folders, one) if line.check == "room: shards"]
    assert line.level == "ok"
    monkeypatch.setattr(Subject, "images_per_second", 1e9)
    (line,) = bad(look(data.reading, one))
    assert "the plan's GPU takes 1,000,000,000 images/s" in line.found
    assert "--data.workers" in line.remedy


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> str:
    """The port of the environment that a launcher leaves."""
    told = warm.ranks(2)[0]
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, told[name])
    monkeypatch.setattr(ranks, "MEETING", 0.5)
    return told["MASTER_PORT"]


def test_a_port_in_use_and_a_closed_one(launched: str, subject: Callable[..., Subject]) -> None:
    one = subject(world=World(1, 2, 0, 1))
    (line,) = look(ranks.meet, one)  # nobody listens
    assert (line.level, line.code, one.board) == ("failure", 2, None)
    assert f"rank 1 of 2 cannot meet the others at 127.0.0.1:{launched}" in line.found
    with socket.socket() as other:
        other.bind(("", int(launched)))
        other.listen()
        (line,) = look(ranks.meet, subject(world=World(0, 2, 0, 1)))
    assert f"cannot open port {launched}" in line.found
    assert "MASTER_PORT" in line.remedy


def gathered(
    subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch, world: int, here: int,
    ahead: float = 0.0,
) -> dict[str, table.Row]:  # fmt: skip
    """The rows of ranks of which rank 1 reads most slowly and has another time."""
    sums = [Line(check="all-reduce", found="1 GB/s")]
    monkeypatch.setattr(ranks, "REDUCING", Check("all-reduce", lambda _: sums, 1.0))

    def process(rank: int) -> Any:
        one = subject(world=World(rank, world, 0, 1))
        lines = look(ranks.meet, one)
        lines.append(Line(check="reading", found=f"{9 - rank} images/s", worse=rank))
        lines.append(Line(check="disk", found="full", level="failure" if rank else "ok", code=73))
        return ranks.gather(one, lines, 1.0, lambda: time.time() + rank * ahead)

    with ThreadPoolExecutor(here) as pool:
        told, *_ = pool.map(process, range(here))
    found = table.rows(told)
    shown = table.table(found, world)
    assert "worst rank" in shown.columns
    return {row.line.check: row for row in found}


def test_the_worst_rank_is_named_and_a_clock_an_hour_off(
    launched: str, subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gathered(subject, monkeypatch, 2, 2, ahead=3600.0)
    host = socket.gethostname()
    reading, clock = found["reading"], found["clock"]
    assert (reading.line.found, reading.where) == ("8 images/s", f"rank 1 ({host})")
    assert (clock.line.level, clock.where) == ("failure", f"rank 1 ({host})")
    assert clock.line.found.endswith(" s ahead of rank 0's")
    assert clock.line.worse == pytest.approx(3600.0, abs=2.0)
    assert (found["all-reduce"].where, found["disk"].where) == ("all 2", f"rank 1 ({host})")
    assert table.code(found.values()) == 73, "the disk comes first"
    assert table.verdict([clock, reading]) == "1 ok, 0 warnings, 1 failure"


def test_a_rank_that_does_not_come_is_named(
    launched: str, subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gathered(subject, monkeypatch, 3, 2)
    line = found["processes"].line
    assert (line.level, line.code) == ("failure", 69)
    assert line.found == "no word from rank 2 within 1 s"
    assert found["clock"].line.level == "ok"
    assert "all-reduce" not in found


def test_a_rank_that_cannot_tell_the_main_one_says_so_itself(
    launched: str, few: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    slept: list[float] = []
    monkeypatch.setattr(doctor.time, "sleep", slept.append)
    assert doctor.main([f"--data.root={few['data__root']}"]) == 2
    told = capsys.readouterr()
    assert f"rank 1 ({socket.gethostname()}): rendezvous: failure: MASTER_ADDR" in told.err
    assert told.out == ""
    assert slept[-1] > 100, "a launcher would end the main rank with it"


def test_two_processes(few: dict[str, str], tmp_path: Path) -> None:
    flags = [f"--data.root={few['data__root']}", f"--output_dir={tmp_path}", "--data.workers=1"]
    ran = warm.run("-m", "trainer.doctor", *flags, processes=2, env=environment(), timeout=100)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 on 1 host, all heard" in ran.stdout
    assert "gloo: " in ran.stdout
    assert "all 2" in ran.stdout
    assert ran.stdout.count("│ all-reduce ") == 1, "one table"
