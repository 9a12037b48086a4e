"""Ends a process whose world stands still, and names the rank that holds it up.

A rank that hangs or died leaves the others waiting in a collective, possibly for ever. Each rank
therefore notes where it is, a thread writes that to `heartbeats/` in the run folder, and when no
rank has moved for the deadline each dumps its stacks and ends. A rank that an error ended leaves
its last words in one more file there, and the others end with its exit code within seconds: where
NCCL waits, nothing else would tell them.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.process.errors import FAILED, PEER_LOST, PeerLostError, exit_code
from trainer.process.world import World

BUILDING, LOADING, COMPUTING = "building the engine", "loading data", "computing"
EVALUATING, SAVING = "evaluating", "saving"
PHASES = (BUILDING, LOADING, COMPUTING, EVALUATING, SAVING)
"""In the order in which a step goes through them, so that the rank behind can be told."""

FIRST_STEP = 3
"""Times the deadline until the first step of a start is done: kernels compile, caches fill."""

MOURNING = 5.0
"""Seconds in which a rank may still come to the error of another by itself, as when all meet it."""


@dataclass(frozen=True)
class Beat:
    """Where a rank is."""

    rank: int
    host: str
    pid: int
    beats: int
    """Counts up as long as the process lives at all."""
    moves: int
    """Counts up whenever its main thread gets on."""
    step: int
    phase: str
    ended: str = ""
    """The error that ended it there, if one did, and the exit code that it stands for."""
    code: int | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Sorts ranks by how far they are."""
        return self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        place = f"rank {self.rank} (host {self.host}, pid {self.pid}), step {self.step}"
        return f"{place}, {self.phase}" + (f": {self.ended}" if self.ended else "")


class Watchdog:
    """One rank's notes and the thread that watches over them.

    Args:
        folder: the run folder, which all ranks see.
        world: this process.
        deadline: seconds without progress of any rank after which all end; 0 never ends them.
        step: the first step of this start.
        leave: what ends the process.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        deadline: float,
        step: int = 0,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.folder, self.world, self.deadline, self.leave = folder, world, deadline, leave
        # Often enough to tell a rank that is gone from one that waits, rarely enough for a shared
        # file system with hundreds of ranks.
        self.interval = min(5.0, max(0.1, deadline / 60)) if deadline else 5.0
        self.first_step, self.quiet = step, 0.0
        self._place, self._moves, self._beats, self._moves_before = (step, BUILDING), 0, 0, 0
        self._reference: dict[int, Beat] = {}
        self._mourned = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Starts watching."""
        with suppress(OSError):
            self._path(self.world.rank).parent.mkdir(parents=True, exist_ok=True)
        self._beat()
        self._thread.start()

    def stop(self, error: Exception | None = None) -> None:
        """Ends watching; clears this rank's traces, or leaves word of the error that ended it."""
        self._ended.set()
        self._thread.join()
        if error is not None:
            self._beat(error)
            return
        with suppress(OSError):
            self._path(self.world.rank).unlink()
            self._path(self.world.rank).parent.rmdir()  # the last rank finds it empty

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches over a block, and says who is gone if a collective in it fails.

        Raises `PeerLostError`: a collective failed because another rank is gone.
        """
        self.start()
        error: Exception | None = None
        try:
            yield
        except Exception as found:
            error = found
            own = "OutOfMemory" in type(found).__name__  # torch's, which is not imported here
            if exit_code(found) is None and isinstance(found, RuntimeError) and not own:
                error = self._lost() or found
            if error is found:
                raise
            raise error from found
        finally:
            self.stop(error)

    def note(self, phase: str, step: int | None = None) -> None:
        """The main thread gets on; cheap enough for every batch."""
        self._place = (self._place[0] if step is None else step, phase)
        self._moves += 1

    def _path(self, rank: int) -> Path:
        return self.folder / "heartbeats" / f"rank-{rank:05d}.json"

    @property
    def _words(self) -> Path:
        return self.folder / "heartbeats" / "error.json"

    def _beat(self, error: Exception | None = None) -> None:
        """Writes this rank's state; a file system that fails now and then does no harm."""
        self._beats += 1
        ended, code = "", None
        if error is not None and not isinstance(error, PeerLostError):
            ended = f"{type(error).__name__}: {error}".splitlines()[0]
            code = FAILED if (told := exit_code(error)) is None else told
        self._own = Beat(
            self.world.rank, socket.gethostname(), os.getpid(), self._beats, self._moves,
            *self._place, ended, code,
        )  # fmt: skip
        path = self._path(self.world.rank)
        with suppress(OSError):
            # The first error gets one file more, which is cheap to look for.
            for target in (path, self._words) if ended and not self._words.exists() else (path,):
                path.with_suffix(".tmp").write_text(json.dumps(asdict(self._own)), encoding="utf-8")
                path.with_suffix(".tmp").replace(target)

    def _all_beats(self) -> dict[int, Beat]:
        found = {}
        for rank in range(self.world.size):
            with suppress(OSError, ValueError, TypeError):
                found[rank] = Beat(**json.loads(self._path(rank).read_text(encoding="utf-8")))
        return found | {self.world.rank: self._own}

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            # A process that was itself suspended for a while has not waited for that long.
            self.tick(min(now - before, 2 * self.interval))
            before = now

    def tick(self, seconds: float) -> None:
        """One look: `seconds` have passed since the last."""
        self._beat()
        if self._moves != self._moves_before:
            self._moves_before, self.quiet, self._reference = self._moves, 0.0, {}
            self._mourned = 0.0
            return
        self.quiet += seconds
        if self._words.exists():
            self._mourn(seconds)
        warm = self._place[0] > self.first_step
        limit = self.deadline * (1 if warm else FIRST_STEP)
        if not self.deadline or self.quiet < limit / 2:
            return
        now = self._all_beats()
        known = {rank: self._reference.setdefault(rank, beat) for rank, beat in now.items()}
        if any(now[rank].moves != beat.moves for rank, beat in known.items()):
            self.quiet, self._reference = 0.0, {}  # others work: waiting for them is no hang
        elif self.quiet >= limit:
            self._give_up(limit, now)

    def _mourn(self, seconds: float) -> None:
        """Ends this process as the rank ended that left an error, unless it comes to that itself.

        Nothing is lost: without that rank there is no checkpoint any more. What the main rank is
        writing it may finish.
        """
        self._mourned += seconds
        if self._mourned <= MOURNING * (FIRST_STEP if self._place[1] == SAVING else 1):
            return
        with suppress(OSError, ValueError, TypeError):
            last = Beat(**json.loads(self._words.read_text(encoding="utf-8")))
            if self.world.is_main:
                sys.stderr.write(f"error: an error ended {last}\n")
                sys.stderr.flush()
            self.leave(FAILED if last.code is None else last.code)

    def _give_up(self, limit: float, now: dict[int, Beat]) -> None:
        """Dumps all stacks of this process, names the rank behind once for all ranks, and ends."""
        stacks = self.folder / f"stacks-rank-{self.world.rank:05d}.txt"
        with suppress(OSError), stacks.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        silent = self._silent(now)
        if self.world.rank == min(set(range(self.world.size)) - silent):
            sys.stderr.write(
                f"error: no progress for {limit:.0f} s (train.step_deadline): "
                f"{self._verdict(now, silent)}; stacks are in {self.folder}/stacks-rank-*.txt; "
                "the same command resumes\n"
            )
            sys.stderr.flush()
        self.leave(PEER_LOST)

    def _silent(self, now: dict[int, Beat]) -> set[int]:
        """The ranks of which no heart beat was seen since the reference."""
        before = self._reference
        alive = {rank for rank in now.keys() & before if now[rank].beats > before[rank].beats}
        return set(range(self.world.size)) - {self.world.rank} - alive

    def _verdict(self, now: dict[int, Beat], silent: set[int]) -> str:
        failed = [str(now[rank]) for rank in sorted(silent & now.keys()) if now[rank].ended]
        if failed:
            return "an error ended " + "; ".join(failed)
        if silent:
            last = [str(now.get(rank, f"rank {rank} (never heard of)")) for rank in sorted(silent)]
            return "no sign of life from " + "; ".join(last)
        behind = min(beat.place for beat in now.values())
        ranks = [str(beat) for beat in now.values() if beat.place == behind]
        if len(ranks) == self.world.size:
            return f"every rank hangs alike, {ranks[0]}"
        return "behind is " + "; ".join(ranks)

    def _lost(self) -> PeerLostError | None:
        """After a failed collective: who left an error behind, or gives no sign of life."""
        self._reference, now = {}, self._all_beats()
        if not any(beat.ended for beat in now.values()):
            self._reference = now
            time.sleep(3 * self.interval)
            now = self._all_beats()
        if not (silent := self._silent(now)):
            return None
        codes = [beat.code for beat in now.values() if beat.code is not None]
        if codes:  # it is that rank's error which counts, and ends this run again when repeated
            return PeerLostError(self._verdict(now, silent), codes[0])
        return PeerLostError(f"{self._verdict(now, silent)}; the same command resumes")
