"""The row that an evaluation leaves in `results.jsonl`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.build import Parts


def result_row(
    parts: Parts, folder: Path, step: int, columns: Mapping[str, float]
) -> dict[str, Any]:
    """A row that DomainBed's own `collect_results` can read.

    Args:
        parts: the run.
        folder: its run folder.
        step: after which step the evaluation was.
        columns: accuracies and whatever else it found.
    """
    config = parts.config
    return {
        "step": step,
        "epoch": max(parts.stream.epochs(step).values()),
        **columns,
        "args": {
            "dataset": config.data.dataset,
            "algorithm": config.moa.method,
            "test_envs": [parts.held_out],
            "trial_seed": config.train.trial_seed,
            "seed": config.train.seed,
            "hparams_seed": 0,
            "holdout_fraction": config.data.holdout_fraction,
            "output_dir": str(folder),
        },
        "hparams": {
            "lr": config.optim.lr,
            "batch_size": config.train.batch_per_domain,
            "weight_decay": config.optim.weight_decay,
            "backbone": parts.info.base_model,
        },
    }
