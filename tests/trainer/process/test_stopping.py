"""How a run ends before its time: signals, the clock, losses that are not finite, lost ranks."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from shards import DataConfig, DomainStream, open_shards
from tests.support.trainer_fixtures import (
    ROOT,
    RUN,
    arguments,
    environment,
    launch,
    rows,
    under_deepspeed,
)
from tests.support.warm import Started, ranks
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.run_config import TrainConfig
from trainer.process.ending import conclude
from trainer.process.errors import (
    DAMAGED_DATA,
    FAILED,
    PEER_LOST,
    RESUBMIT,
    TRAINING_INVALID,
    ConfigError,
    DamagedDataError,
    PeerLostError,
    exit_code,
)
from trainer.process.stopping import SIGNALS, EvaluationBrokenOff, Stopping, seconds_of, shielded
from trainer.process.watchdog import COMPUTING, LOADING, Watchdog
from trainer.process.world import World

WORKER = str(ROOT / "tests" / "support" / "stopping_worker.py")
LONG = {"train__steps": "25", "train__eval_every": "24", "train__batch_per_domain": "2"}
PATIENCE = 500.0  # seconds after which a test gives up; a busy machine is nowhere near it


def wait_until(condition: Callable[[], object], *processes: Started) -> None:
    """Polls until the condition holds; fails if a process ends before."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        assert all(p.poll() is None for p in processes), "a process ended too early"
        time.sleep(0.02)


class Ranks:
    """Two processes of one run, started as `srun` would, so that each can be treated alone."""

    def __init__(self, output: Path, *command: str) -> None:
        self.logs = [output.with_suffix(f".{rank}.txt") for rank in range(2)]
        self.processes = [
            Started(command, log, log, environment(**world))
            for log, world in zip(self.logs, ranks(2), strict=True)
        ]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait(PATIENCE)

    def wait(self) -> list[int]:
        return [process.wait(PATIENCE) for process in self.processes]

    def text(self) -> str:
        return "".join(log.read_text() for log in self.logs)


def finished(output: Path, *command: str) -> tuple[list[int], str]:
    with Ranks(output, *command) as both:
        return both.wait(), both.text()


def steps_done(output: Path) -> int:
    file = output / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def newest_state(output: Path) -> dict[str, Any]:
    newest = (output / "checkpoints" / "latest").read_text().strip()
    return json.loads((output / "checkpoints" / newest / "state.json").read_text())  # type: ignore[no-any-return]


def accuracies(output: Path) -> list[dict[str, object]]:
    found = rows(output / "results.jsonl")
    return [{k: v for k, v in row.items() if k.endswith("_acc") or k == "step"} for row in found]


def test_interrupted_twice_is_byte_for_byte_the_uninterrupted_run(
    few: dict[str, str], tmp_path: Path
) -> None:
    """Signals under the deepspeed launcher, then a stop within an evaluation, then to the end."""
    whole, output = tmp_path / "whole", tmp_path / "run"
    codes, text = finished(whole, RUN, *arguments(whole, **LONG, **few))
    assert codes == [0, 0], text
    assert not list((whole / "heartbeats").glob("*")), "cleared at the end"

    command = arguments(output, **LONG, **few, data__workers="1")
    log = tmp_path / "launcher.txt"
    launcher = Started((*under_deepspeed(2), *command), log, log, environment())
    wait_until(lambda: steps_done(output) > 3, launcher)
    pids = [
        json.loads((output / "heartbeats" / f"rank-0000{rank}.json").read_text())["pid"]
        for rank in range(2)
    ]
    other = psutil.Process(pids[1])
    for process in (other, *other.children(recursive=True)):  # loader workers get it as well
        process.send_signal(signal.SIGUSR1)
    with contextlib.suppress(ProcessLookupError):  # a second one, while the first is honoured
        os.kill(pids[0], signal.SIGTERM)
    assert launcher.wait(PATIENCE) == RESUBMIT, log.read_text()
    printed = log.read_text()
    state = newest_state(output)
    assert steps_done(output) == state["step"] <= 25, "not one step is lost"
    line = next(line for line in printed.splitlines() if line.startswith("stopped by"))
    assert "SIGUSR1" in line or "SIGTERM" in line
    assert f"after step {state['step'] - 1}, checkpoint {output}" in line
    assert "the same command continues" in line
    assert line in (output / "log.txt").read_text()
    assert "Traceback" not in printed
    assert "FutureWarning" not in printed

    codes, text = finished(output, WORKER, "evaluation", *command)
    assert codes == [RESUBMIT, RESUBMIT], text
    assert text.count("leaves the group, with nothing of 3 left") == 2
    state = newest_state(output)
    assert state["evaluation_due"] is True
    assert state["step"] - 1 not in [row["step"] for row in rows(output / "results.jsonl")]

    codes, text = finished(output, WORKER, "none", *command)
    assert codes == [0, 0], text
    assert text.count("leaves the group, with nothing of 3 left") == 4, "at both ends"
    assert (output / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert accuracies(output) == accuracies(whole)


def test_time_limit_that_is_over_at_once_still_lets_one_step_through(
    few: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    result = launch(*arguments(output, **LONG, **few, train__time_limit="1s"))
    assert result.returncode == RESUBMIT, result.stderr
    assert "stopped by the time limit after step 0" in result.stdout
    assert newest_state(output)["step"] == 1
    assert not (output / "results.jsonl").exists(), "the evaluation waits for the next start"


def test_steps_that_are_not_finite_leave_no_trace_and_then_end_the_run(
    few: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = arguments(output, **LONG, **few, train__skip_nonfinite="1")
    codes, text = finished(output, WORKER, "nonfinite", *command)
    assert codes == [TRAINING_INVALID, TRAINING_INVALID], text
    assert "leaves the group" not in text, "after an error that may wait for ever"
    for word in ("step 4: loss not finite on rank 1 (nan)", "nonfinite-step-4.json", "1 such step"):
        assert word in text
    assert "step 2: loss not finite on rank 1 (inf); left out, 1 of 1" in text
    metrics = rows(output / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert [row.get("skipped_steps", 0) for row in metrics] == [0, 0, 1, 1]
    assert metrics[2]["loss"] is None
    for rank in range(2):
        states = json.loads((output / f"states-{rank}.json").read_text())
        same = [before == after for before, after in states]
        assert same == [False, False, True, False, True, False], "step 4's end is known in step 6"
    stream = DomainStream(
        open_shards(DataConfig(root=few["data__root"])), sources=range(5), batch_per_domain=2,
        seed=3, trial_seed=0, transform=lambda x: x,  # type: ignore[arg-type, return-value]
    )  # fmt: skip
    for step in (2, 4):
        dump = json.loads((output / f"nonfinite-step-{step}.json").read_text())
        assert [rank["finite"] for rank in dump["ranks"]] == [True, False]
        assert [key for rank in dump["ranks"] for key in rank["keys"]] == stream.keys(step)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=lambda s: s.name)
def test_rank_that_hangs_or_dies_ends_the_other(
    how: signal.Signals, few: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    command = arguments(output, **LONG, **few, train__step_deadline="3")
    with Ranks(output, RUN, *command) as both:
        first, second = both.processes
        wait_until(lambda: steps_done(output) > 3, first, second)
        second.send_signal(how)
        assert first.wait(PATIENCE) == PEER_LOST, both.text()
        text = both.text()
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert (
        f"no sign of life from rank 1 (host {socket.gethostname()}, pid {second.pid}), step"
        in (lines[0])
    )
    assert "the same command resumes" in lines[0]
    if how == signal.SIGSTOP:
        assert "trainer/train/loop.py" in (output / "stacks-rank-00000.txt").read_text()


DURATIONS = {
    "3h30m": 12600, "45m": 2700, "600s": 600, "2d": 172800, "1h1m1s": 3661,
    "1-12:00:00": 129600, "2-3": 183600, "0-0:30": 1800, "12:00:00": 43200, "30:00": 1800,
}  # fmt: skip


@pytest.mark.parametrize(("text", "seconds"), DURATIONS.items())
def test_durations(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds
    assert not TrainConfig(time_limit=text).problems()


@pytest.mark.parametrize("text", ["", "90", "0s", "soon", "3h 30m", "1:2:3:4", "-5m", "1.5h"])
def test_texts_that_are_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        seconds_of(text)


def test_settings_out_of_range_are_all_named() -> None:
    wrong = TrainConfig(time_limit="90", skip_nonfinite=-1, step_deadline=-2.0)
    text = "\n".join(wrong.problems())
    for word in ("train.time_limit: '90'", "3h30m", "train.skip_nonfinite: -1",
                 "train.step_deadline: -2.0"):  # fmt: skip
        assert word in text


def test_an_abort_at_the_interpreters_end_does_not_change_the_code() -> None:
    code = (
        "import atexit, os; atexit.register(os.abort); from trainer.process.ending import leave; "
        f"print('last words', end=''); leave({RESUBMIT})"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (RESUBMIT, b"last words"), ended.stderr


def test_signal_before_training_ends_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stopping = Stopping(is_main=True)
    stopping.listen()
    try:
        code = conclude(lambda: os.kill(os.getpid(), signal.SIGTERM), World(0, 1, 0, 1), stopping)
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert code == RESUBMIT


def test_a_signal_amid_the_ending_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the second one of a launcher, which once found its pipe closed and no handler yet."""
    before = [signal.getsignal(number) for number in SIGNALS]
    real = signal.set_wakeup_fd

    def interrupted(descriptor: int, **options: bool) -> int:
        found = real(descriptor, **options)
        if descriptor == -1:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    def fail() -> None:
        raise ConfigError("wrong")

    stopping = Stopping(is_main=True)
    stopping.listen()
    monkeypatch.setattr(signal, "set_wakeup_fd", interrupted)
    try:
        assert conclude(fail, World(0, 1, 0, 1), stopping) == 2
    finally:
        stopping.release()
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


BLOCKED = """
import ctypes, sys
from trainer.process.stopping import Stopped, Stopping
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
stopping = Stopping(is_main=sys.argv[1] == "0")
stopping.listen()
try:
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)  # for ever: unlike other waits, no signal breaks it off
except Stopped:  # the signal was faster
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(("rank", "code"), [(0, RESUBMIT), (1, FAILED)])
def test_signal_reaches_a_rank_that_waits_outside_python(rank: int, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED, str(rank)], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(PATIENCE) == code


def test_time_limit_leaves_room_for_the_longest_of_all() -> None:
    now = 100.0
    stopping = Stopping(is_main=True, clock=lambda: now)
    stopping.limit = 60.0
    for part, seconds in (("step", 5.0), ("step", 2.0), ("save", 4.0), ("evaluation", 20.0)):
        with stopping.timed(part):  # type: ignore[arg-type]
            now += seconds
    now = 100 + 60 - 14 - 0.5  # two steps and a save
    stopping.decide(stopping.votes_in_step(evaluates=False))
    assert not stopping.reason
    for votes in (stopping.votes_in_step(True), stopping.votes_in_step(False, behind=1)):
        stopping.reason = ""
        stopping.decide(votes)
        assert stopping.reason == "the time limit"


def test_votes_of_one_rank_stop_all() -> None:
    ranks = [Stopping(is_main=rank == 0) for rank in range(3)]
    ranks[1]._seen.add("SIGUSR1")
    summed = [sum(votes) for votes in zip(*(r.votes_in_step(False) for r in ranks), strict=True)]
    for rank in ranks:
        rank.begin(lambda _: summed)
        with pytest.raises(EvaluationBrokenOff):
            rank.pause()
        assert rank.reason == "SIGUSR1"


def test_loader_workers_survive_signals_but_not_their_parent() -> None:
    loader: Any = DataLoader(range(64), num_workers=2, batch_size=1)  # type: ignore[arg-type]
    batches = shielded(loader)
    seen = [int(next(batches))]
    workers = psutil.Process().children()
    assert len(workers) >= 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            # From another process, as a launcher would: a worker obeys its parent alone.
            subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)
    seen += [int(batch) for batch in batches]
    assert seen == list(range(64))


def test_a_signal_ends_a_process_whose_data_does_not_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes, left = [], threading.Event()

    def leave(code: int) -> None:
        codes.append(code)
        left.set()

    class Stuck:
        def __iter__(self) -> Iterator[int]:
            yield 1
            assert left.wait(PATIENCE)

    monkeypatch.setattr("trainer.process.stopping.DATA_WAIT", 0.2)
    monkeypatch.setattr(os, "_exit", leave)
    stopping = Stopping(is_main=True)
    stopping.listen()
    try:
        stopping.begin(list)
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(shielded(Stuck())) == [1]
    finally:
        stopping.release()
    assert codes == [PEER_LOST]
    assert "error: a signal came, but no batch for 0 s, so nothing more" in capsys.readouterr().err


def test_a_killed_loader_process_is_told_where_the_next_batch_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(look, "__defaults__", (0.2,))  # seconds, for which torch has 5
    stream = DomainStream(
        open_shards(DataConfig()), sources=range(5), batch_per_domain=2, seed=3, trial_seed=0,
        transform=lambda pixels: pixels,  # type: ignore[arg-type, return-value]
    )  # fmt: skip

    def train() -> None:
        others = psutil.Process().children()
        batches = shielded(stream.loader(0, 50, workers=2))
        next(batches)
        first, *_ = (child for child in psutil.Process().children() if child not in others)
        first.kill()
        time.sleep(0.3)  # here torch would raise: in the middle of a step
        capsys.readouterr()
        list(batches)

    assert conclude(train, World(0, 1, 0, 1)) == PEER_LOST
    error = capsys.readouterr().err
    assert error.startswith("error: data.workers = 2: loader process ")
    assert "was killed by SIGKILL; a machine that runs out of memory does that" in error
    assert "Traceback" not in error


@pytest.fixture
def three(tmp_path: Path) -> tuple[list[Watchdog], list[int]]:
    """The watchdogs of three ranks without their threads, and the exit codes they chose."""
    codes: list[int] = []
    dogs = [
        Watchdog(tmp_path, World(rank, 3, rank, 3), 60.0, leave=codes.append) for rank in range(3)
    ]
    (tmp_path / "heartbeats").mkdir()
    for dog in dogs:
        dog.note(LOADING, 5)
    return dogs, codes


def test_watchdog_waits_while_any_rank_works(three: tuple[list[Watchdog], list[int]]) -> None:
    dogs, codes = three
    for _ in range(100):
        dogs[2].note(COMPUTING)
        for dog in dogs:
            dog.tick(5.0)
    assert not codes


def test_watchdog_names_the_rank_behind(
    three: tuple[list[Watchdog], list[int]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dogs, codes = three
    for dog in dogs[:2]:
        dog.note(COMPUTING)
    while not codes:
        for dog in dogs:
            dog.tick(5.0)
    assert set(codes) == {PEER_LOST}
    assert len(codes) == 3, "all end, also the one that hangs"
    error = capfd.readouterr().err
    assert error.count("error:") == 1
    assert "behind is rank 2" in error
    assert "step 5, loading data" in error
    assert len(list(tmp_path.glob("stacks-rank-*.txt"))) == 3


def test_watchdog_is_patient_with_the_first_step(tmp_path: Path) -> None:
    codes: list[int] = []
    dog = Watchdog(tmp_path, World(0, 1, 0, 1), 60.0, step=7, leave=codes.append)
    dog.note(COMPUTING, 7)
    for _ in range(30):
        dog.tick(5.0)
    assert not codes
    for _ in range(10):
        dog.tick(5.0)
    assert codes


def pair(folder: Path) -> list[Watchdog]:
    """The watchdogs of two ranks, with little patience."""
    return [Watchdog(folder, World(rank, 2, rank, 2), 6.0) for rank in range(2)]


def test_an_error_of_one_rank_is_told_and_counts_for_the_others(tmp_path: Path) -> None:
    """They only meet the collective that it broke."""
    main, other = pair(tmp_path)
    other.note(COMPUTING, 4)
    with pytest.raises(DamagedDataError), other.watching():
        raise DamagedDataError("a.tar: bad\nmore")
    with pytest.raises(PeerLostError) as caught, main.watching():
        raise RuntimeError("connection closed by peer")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert f"rank 1 (host {socket.gethostname()}, pid {os.getpid()}), step 4, comp" in lines[0]
    assert "DamagedDataError: a.tar: bad" in lines[0]
    assert exit_code(caught.value) == DAMAGED_DATA


@pytest.mark.parametrize(
    ("error", "code"),
    [(DamagedDataError("a.tar: bad"), DAMAGED_DATA), (torch.OutOfMemoryError("a GPU's"), FAILED)],
)
def test_a_rank_that_waits_for_one_that_failed_leaves_with_its_code(
    error: Exception, code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Within seconds, by the thread alone: where NCCL waits, no collective fails."""
    codes: list[int] = []
    main = Watchdog(tmp_path, World(0, 2, 0, 2), 1800.0, leave=codes.append)
    other = Watchdog(tmp_path, World(1, 2, 1, 2), 1800.0)
    main.note(COMPUTING, 4)
    main.tick(5.0)
    with pytest.raises(type(error)), other.watching():
        raise error
    main.note(LOADING)  # it comes as far as the next collective
    main.tick(5.0)
    main.tick(5.0)
    assert not codes, "it may meet the same error"
    main.tick(5.0)
    assert codes == [code]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: an error ended rank 1 (host ")
    assert str(error) in lines[0]


def test_an_error_of_ones_own_is_not_blamed_on_others(tmp_path: Path) -> None:
    main, other = pair(tmp_path)
    with other.watching(), pytest.raises(RuntimeError, match="out of memory"), main.watching():
        raise RuntimeError("out of memory")
    left = {path.name for path in (tmp_path / "heartbeats").iterdir()}
    assert left == {"rank-00000.json", "error.json"}
    with RunFolder(tmp_path).claimed():
        assert not (tmp_path / "heartbeats").exists(), "the next start begins without it"


def test_a_rank_that_died_is_named_with_its_last_step(tmp_path: Path) -> None:
    main, other = pair(tmp_path)
    other.start()
    other.note(LOADING, 7)
    other._ended.set()
    other._thread.join()
    other._beat()  # the last one
    with pytest.raises(PeerLostError, match=r"no sign .* rank 1 .* step 7") as caught, (
        main.watching()
    ):  # fmt: skip
        raise RuntimeError("connection closed by peer")
    assert exit_code(caught.value) == PEER_LOST
