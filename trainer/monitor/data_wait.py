"""Notices when training waits for its data most of the time."""

from collections import deque

from trainer.config.run_config import RunConfig

WINDOW = 20
"""Steps that a share is taken over."""
DOMINATES, RECOVERED = 0.5, 0.25
"""Shares of the step time at which the hint is given, and below which it may be given again."""


class Stall:
    """Share of the step time that went into waiting for data, over the last steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._told = False

    @property
    def share(self) -> float:
        """In [0, 1]; 0 before the first step."""
        took = sum(took for _, took in self._steps)
        return sum(waited for waited, _ in self._steps) / took if took else 0.0

    def note(self, waited: float, took: float) -> bool:
        """Takes in one step; whether it is time for the hint."""
        self._steps.append((waited, took))
        share = self.share
        if share < RECOVERED:
            self._told = False
        if self._told or share < DOMINATES or len(self._steps) < WINDOW:
            return False
        self._told = True
        return True


def hint(share: float, config: RunConfig, cores: int) -> str:
    """What the user may do about it.

    Args:
        share: of the step time, in [0, 1].
        config: the run.
        cores: CPU cores that this process may use.
    """
    data = config.data
    remedies = [f"raise --data.workers (now {data.workers} per process, on {cores} CPU cores)"]
    if data.augment_on != "device":
        remedies.append("move the colour augmentation with --data.augment_on device")
    remedies.append("bring the shards to a faster disk")
    return f"data waiting takes {100 * share:.0f} % of the step time: " + ", or ".join(remedies)
