"""Settings of where a run's curves go beside TensorBoard; imports no tracker."""

import re
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec

from trainer.process.errors import did_you_mean

PLUGINS = "trainer.monitor"
"""Group of entry points under which other packages offer trackers."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the curves go beside TensorBoard, under the same names."""

    wandb: str | None = None
    """project of Weights & Biases, or ENTITY/PROJECT; WANDB_MODE=offline does without a network"""
    mlflow: str | None = None
    """experiment of MLflow, in the store of MLFLOW_TRACKING_URI or, without that, in mlruns/"""
    csv: bool = False
    """write scalars.csv into the run folder, of step, tag and value"""
    plugins: tuple[str, ...] = ()
    """trackers that other installed packages offer as entry points `trainer.monitor`, by name"""

    @property
    def active(self) -> bool:
        """Whether curves go anywhere beside TensorBoard."""
        return self != LogConfig()

    def problems(self) -> list[str]:
        """Names that are none, and packages that are missing, one line each."""
        found = []
        if not re.fullmatch(r"([^/\\#?%:]+/)?[^/\\#?%:]{1,128}", self.wandb or "project"):
            legal = "must be PROJECT or ENTITY/PROJECT, without any of /\\#?%: in a name"
            found.append(f"log.wandb: {self.wandb!r}; {legal}")
        for name in ("wandb", "mlflow"):
            place = getattr(self, name)
            if place is not None and not place.strip():
                found.append(f"log.{name}: {place!r} is no name; leave it out")
            # A folder of that name here, as W&B makes them, is no package.
            elif place and not ((spec := find_spec(name)) and spec.origin):
                remedy = f"pip install 'moa-trainer[{name}]', or leave it out"
                found.append(f"log.{name}: {name} is not installed; {remedy}")
        if self.plugins:
            offered = sorted(entry_points(group=PLUGINS).names)
            legal = f"; installed are {', '.join(offered) or 'none'}"
            found += [
                f"log.plugins: no package offers {name!r} as {PLUGINS}"
                f"{did_you_mean(name, offered, legal)}"
                for name in self.plugins
                if name not in offered
            ]
        return found
