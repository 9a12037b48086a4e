"""Ends a run early without losing work: signals and a time limit raise a flag, the ranks agree.

A flag is honoured only where every rank knows of it: votes travel with the sum that each step and
each few batches of an evaluation make anyway, so all ranks stop at the same boundary. Imports
neither torch nor deepspeed: it has to be in place before they are.
"""

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

from trainer.process.errors import FAILED, PEER_LOST, RESUBMIT

BLOCKED = 2.0
"""Seconds that a main thread has to notice a signal before training begins."""

DATA_WAIT = 60.0
"""Seconds that a process which got a signal in training waits for one batch, before it leaves."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REASONS = (*(number.name for number in SIGNALS), "the time limit")
"""What can stop a run; a vote has one place for each."""

Part = Literal["step", "evaluation", "save", "write"]

# Forms of a duration: groups of days, hours, minutes and seconds.
_DURATIONS = (
    r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?",
    r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?",
    r"()(?:(\d+):)?(\d+):(\d+)",
)


class Stopped(BaseException):
    """The run ends early and can be continued; the message says where it stands.

    Not an `Exception`: raised in a signal handler, it must not be swallowed by a library.
    """


class EvaluationBrokenOff(Exception):
    """All ranks leave an evaluation; it leaves no trace and is done again on resume."""


def seconds_of(text: str) -> float:
    """Seconds of a duration: `3h30m`, `45m`, `600s`, or as SLURM writes it, `1-12:00:00`.

    A bare number is refused: it would be minutes to SLURM, and seconds to most others.

    Raises `ValueError`: not a duration, or not longer than nothing.
    """
    for form in _DURATIONS:
        if match := re.fullmatch(form, text):
            days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
            if total := ((days * 24 + hours) * 60 + minutes) * 60 + seconds:
                return float(total)
    raise ValueError(f"{text!r} is not a duration")


class Stopping:
    """Listens to signals and the clock of one process, and agrees with the other ranks.

    Until `begin` nothing is lost by leaving at once, so a signal raises `Stopped`; from then on it
    only leaves a flag.

    Args:
        is_main: whether this process talks to the user.
        clock: seconds that never go back; the time limit counts from this object's creation.

    Attributes:
        reason: why all ranks stop, once they have agreed; empty before.
        limit: seconds after which the run must have ended.
    """

    def __init__(self, is_main: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_main, self.clock, self.started = is_main, clock, clock()
        self.reason, self.limit = "", float("inf")
        self.longest: dict[Part, float] = dict.fromkeys(get_args(Part), 0.0)
        self._seen: set[str] = set()
        self.begun = self._handing_over = False
        self._sum: Callable[[Sequence[float]], list[float]] = list
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Takes over the signals; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._unblock, args=(reading,), daemon=True).start()

    def hear(self) -> None:
        """From now on signals arrive, those first that came since the first line of `run.py`."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _unblock(self, reading: int) -> None:
        """Ends a process whose main thread waits for other ranks and runs no signal handler.

        In training it ends one whose data does not come, so that no boundary is ever reached.
        """
        leaving = False
        while number := os.read(reading, 1):
            if number[0] in SIGNALS and self.begun and not leaving:
                leaving = True
                threading.Thread(target=self._leave_if_data_hangs, daemon=True).start()
            elif number[0] in SIGNALS and not self.begun:
                time.sleep(BLOCKED)
                if self._before and not self.begun:
                    os._exit(RESUBMIT if self.is_main else FAILED)

    def _leave_if_data_hangs(self) -> None:
        """Ends the process once it has waited too long for a batch."""
        while not any(time.monotonic() - since > DATA_WAIT for since in _waiting_since[:]):
            time.sleep(min(1.0, DATA_WAIT / 10))
            if not self._before:
                return  # the run is over
        sys.stderr.write(
            f"error: a signal came, but no batch for {DATA_WAIT:.0f} s, so nothing more is saved; "
            "the same command resumes from the last checkpoint\n"
        )
        sys.stderr.flush()
        os._exit(PEER_LOST)

    def release(self) -> None:
        """Gives the signals back."""
        self._hand_over(self._before)

    def leave_with(self, code: int) -> None:
        """From now on a signal ends the process at once, with this exit code."""
        self._hand_over(dict.fromkeys(self._before, lambda *_: os._exit(code)))

    def _hand_over(self, handlers: Mapping[signal.Signals, Any]) -> None:
        self._handing_over = True
        if self._before:
            os.close(signal.set_wakeup_fd(-1))
        for number, handler in handlers.items():
            signal.signal(number, handler)
        self._before = {}

    def settle(self) -> None:
        """Ignores the signals: all is saved, and the exit code shall arrive.

        A launcher that sees another rank end before this one sends a SIGTERM.
        """
        self._hand_over(dict.fromkeys(self._before, signal.SIG_IGN))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._handing_over:  # half of that done, an exception would leave it so
            return
        again = bool(self._seen)
        self._seen.add(name)
        if not self.begun:
            raise Stopped(
                f"stopped by {name} before training began; nothing was changed, and the same "
                "command starts again"
            )
        if self.is_main:
            what = "still on the way to a checkpoint" if again else "saving at the next boundary"
            with suppress(OSError):  # a launcher that is gone reads no more
                os.write(2, f"{name}: {what}\n".encode())  # print is not safe in a handler

    def begin(self, sum_over_ranks: Callable[[Sequence[float]], list[float]]) -> None:
        """From now on signals only leave a flag; lists of votes are summed over the ranks."""
        self._sum, self.begun = sum_over_ranks, True

    @contextmanager
    def timed(self, part: Part) -> Iterator[None]:
        """Notes how long a step, an evaluation or a save took."""
        started = self.clock()
        yield
        self.longest[part] = max(self.longest[part], self.clock() - started)

    def votes_in_step(self, evaluates: bool, behind: int = 0) -> list[float]:
        """This rank's votes in a step, one number per reason, to be summed over the ranks.

        They are counted `behind` steps later. Up to the next ones there is the rest of this step,
        the next one, and an evaluation between them if the step `evaluates`.
        """
        between: list[Part] = ["evaluation"] if evaluates else []
        later: list[Part] = ["step"] * (1 + behind)
        return self._votes("step", *between, *later)

    def _votes(self, *parts: Part) -> list[float]:
        """The time limit leaves room for the longest of each part so far, and for a save."""
        room = sum(self.longest[part] for part in (*parts, "save", "write"))
        late = self.clock() - self.started + room >= self.limit
        return [*(float(number.name in self._seen) for number in SIGNALS), float(late)]

    def decide(self, summed: Sequence[float]) -> None:
        """Sets `reason` from all ranks' votes, and so alike on every rank."""
        asked = [name for name, votes in zip(REASONS, summed, strict=True) if votes]
        self.reason = self.reason or " and ".join(asked)

    def agree_on_signals(self) -> None:
        """Votes on signals alone, at the cost of a collective.

        The time limit has no say: a start that is late already shall at least do one step.
        """
        self.decide([*self._sum(self._votes()[:-1]), 0.0])

    def farewell(self, step: int, checkpoint: Path) -> str:
        """The line that tells where the run stands after `step` completed steps."""
        if step:
            where = f"after step {step - 1}, checkpoint {checkpoint}; the same command continues"
        else:
            where = "before step 0; the same command starts again"
        return f"stopped by {self.reason} {where}"

    def pause(self) -> None:
        """A point within an evaluation at which all ranks may leave it; a collective.

        Raises `EvaluationBrokenOff`: the ranks agreed to stop; on all of them.
        """
        self.decide(self._sum(self._votes()))
        if self.reason:
            raise EvaluationBrokenOff(self.reason)


_waiting_since: list[float] = []
"""When the main thread began to wait for a batch; empty while it does not."""


def shielded(loader: Any) -> Iterator[Any]:
    """The batches of a torch loader whose worker processes outlive our signals.

    Ctrl-C, `scancel` and launchers send a signal to every process they find. Workers that died of
    it would take down the training process before it could save. They start at the first batch.

    That one has died is told where the next batch is asked for: torch's own handler would raise it
    wherever the main thread happens to be, in a save or a collective.
    """
    loader.worker_init_fn = shield_worker
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # workers inherit it from birth
    of_children = signal.getsignal(signal.SIGCHLD)
    try:
        batches = iter(loader)
        batch = _next(batches)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, of_children or signal.SIG_DFL)
    while batch is not None:
        yield batch
        batch = _next(batches)


def _next(batches: Iterator[Any]) -> Any:
    """The next batch, or None; notes meanwhile since when it is waited for."""
    _waiting_since[:] = [time.monotonic()]
    try:
        return next(batches, None)
    finally:
        _waiting_since.clear()


def shield_worker(_: int) -> None:
    """In a loader process: only the training process may end it with a signal."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    parent = multiprocessing.parent_process()  # the system's may be a server that forks for it
    obeyed = os.getppid() if parent is None else parent.pid
    while signal.sigwaitinfo(SIGNALS).si_pid != obeyed:
        pass
    os._exit(0)
