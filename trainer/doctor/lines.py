"""A check and its lines, whatever becomes of it: an error and a hang are lines, too."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainer.config.run_config import RunConfig
from trainer.process.errors import FAILED, exit_code
from trainer.process.world import World

if TYPE_CHECKING:
    from shards import ShardIndex
    from trainer.engine.rendezvous import Board
    from trainer.plan.planning import Plan

Level = Literal["ok", "warning", "failure"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "failure")
"""Fine; a run starts, but slowly or not for long; a run ends here."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a check has found."""

    check: str
    found: str
    level: Level = "ok"
    remedy: str = ""
    """Shown unless all is well."""
    code: int = FAILED
    """Exit code that a failure stands for."""
    worse: float = 0.0
    """Orders the ranks' lines of one check and level, the worst one highest."""


@dataclass
class Subject:
    """What is looked at, and what earlier checks have made of it."""

    config: RunConfig
    world: World
    index: "ShardIndex | None" = None
    plan: "Plan | None" = None
    board: "Board | None" = None

    @property
    def images_per_second(self) -> float:
        """What this process must be given for its GPU not to wait, as planned; 0: not known."""
        import torch

        steps = self.plan.predictions if self.plan and torch.cuda.is_available() else ()
        return next((s.images / s.device for s in steps if s.world == self.world.size), 0.0)


@dataclass(frozen=True)
class Check:
    """One look at one thing."""

    name: str
    look: Callable[[Subject], Iterable[Line]]
    seconds: float
    """In which it must have ended."""
    by_main: bool = False
    """Whether only the main rank does it in a run."""

    def lines(self, subject: Subject) -> list[Line]:
        """Its lines; a thread that hangs is left behind."""
        found: list[Line] = []

        def run() -> None:
            try:
                found.extend(self.look(subject))
            except Exception as error:
                found.append(failed(self.name, error))

        thread = threading.Thread(target=run, name=self.name, daemon=True)
        thread.start()
        thread.join(self.seconds)
        if not thread.is_alive():
            return found
        late = f"no answer within {self.seconds:g} s"
        remedy = "a file system, network or device that hangs: a run would wait there, too"
        return [*found, Line(check=self.name, found=late, level="failure", remedy=remedy)]


def failed(check: str, error: Exception) -> Line:
    """The line of a check that an error has ended, which has its remedy after a semicolon."""
    text = " ".join(str(error).split())
    code = exit_code(error)
    if code is not None:
        what, _, remedy = text.partition("; ")
        return Line(check=check, found=what, level="failure", remedy=remedy, code=code)
    what = f"{type(error).__name__}: {text[:300]}"
    if isinstance(error, ImportError):
        remedy = "install it as the README says; `pip check` names what does not fit"
        return Line(check=check, found=what, level="failure", remedy=remedy)
    remedy = "not known whether a run would work; please report it if it does"
    return Line(check=check, found=what, level="warning", remedy=remedy)
