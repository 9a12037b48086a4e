"""Weights & Biases and MLflow as trackers; each is imported where it is asked for.

Neither is told the command line, which may hold secrets.
"""

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from trainer.config.run_config import dotted
from trainer.process.errors import ConfigError

ENVIRONMENT = {
    "MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true",
}  # fmt: skip
"""What the two packages are told where the user says nothing else."""


class Tracker(Protocol):
    """Where scalars go; made of a run's folder and its plain configuration."""

    def scalars(self, step: int, values: Mapping[str, float], /) -> None:
        """Takes in the points of some tags at a step."""

    def close(self, whole: bool, /) -> None:
        """Ends; `whole` if the run did so at its last step."""


class Wandb:
    """A run of Weights & Biases, whose x axis is our step.

    Args:
        project: perhaps with its entity, ENTITY/PROJECT.
        run_id: of the run to continue.

    Attributes:
        place: what tells a user where to find it.
    """

    def __init__(
        self, project: str, folder: Path, config: dict[str, Any], run_id: str | None
    ) -> None:
        import wandb

        # Otherwise a terminal is asked, while all processes wait.
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ConfigError("no API key is configured; wandb login, or WANDB_MODE=offline")
        entity, _, project = project.rpartition("/")
        self.run_id = run_id or uuid4().hex[:16]
        settings = wandb.Settings(
            console="off", disable_git=True, save_code=False, x_disable_meta=True
        )
        self.run = wandb.init(
            entity=entity or None, project=project, dir=folder, config=config, settings=settings,
            id=self.run_id, resume="allow", name=None if run_id else folder.name,
        )  # fmt: skip
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        offline = f"wandb sync {Path(self.run.dir).parent}"
        self.place = offline if self.run.offline else self.run.url

    def scalars(self, step: int, values: Mapping[str, float], /) -> None:
        """Sends them in the background."""
        self.run.log({"step": step, **values})

    def close(self, whole: bool, /) -> None:
        """Waits until all is sent."""
        self.run.finish(exit_code=0 if whole else 1)


class Mlflow:
    """A run of MLflow; see `Wandb`."""

    def __init__(
        self, experiment: str, folder: Path, config: dict[str, Any], run_id: str | None
    ) -> None:
        import mlflow

        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each of its retries
        # Files are what many runs can write at a time, on file systems of clusters, too.
        uri = None if mlflow.is_tracking_uri_set() else Path("mlruns").absolute().as_uri()
        self.client = mlflow.MlflowClient(uri)
        if run_id is not None:
            self.client.update_run(run_id, status="RUNNING")
        self.run_id = run_id or self._new(experiment, folder.name, config)
        self.place = f"run {self.run_id}"

    def _new(self, experiment: str, name: str, config: dict[str, Any]) -> str:
        from mlflow.entities import Param

        found = self.client.get_experiment_by_name(experiment)
        where = found.experiment_id if found else self.client.create_experiment(experiment)
        run: str = self.client.create_run(where, run_name=name).info.run_id
        for some in pieces([Param(key, str(value)[:500]) for key, value in dotted(config)], 100):
            self.client.log_batch(run, params=some)
        return run

    def scalars(self, step: int, values: Mapping[str, float], /) -> None:
        """Sends them at once."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        points = [
            Metric(re.sub(r"[^\w\-. :/]", "_", tag), value, now, step)
            for tag, value in values.items()
        ]
        for some in pieces(points, 1000):
            self.client.log_batch(self.run_id, metrics=some)

    def close(self, whole: bool, /) -> None:
        """Marks the run as ended."""
        self.client.set_terminated(self.run_id, "FINISHED" if whole else "KILLED")


KINDS: dict[str, type[Wandb] | type[Mlflow]] = {"wandb": Wandb, "mlflow": Mlflow}
"""By the setting, which is the package's name as well."""


def pieces(items: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    """A sequence in parts of at most so many, which MLflow takes at a time."""
    return (items[start : start + most] for start in range(0, len(items), most))
