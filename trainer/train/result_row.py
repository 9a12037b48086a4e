"""The row that an evaluation leaves in `results.jsonl`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.prepare.parts import Parts

DOMAINBED_NAMES = {
    "pacs": "PACS", "vlcs": "VLCS", "officehome": "OfficeHome",
    "terraincognita": "TerraIncognita", "domainnet": "DomainNet",
}  # fmt: skip
"""What DomainBed calls our datasets; its tables leave out every name it does not know."""


def result_row(
    parts: Parts, folder: Path, step: int, columns: Mapping[str, float]
) -> dict[str, Any]:
    """A row that DomainBed's own `collect_results` can read, with what an evaluation found.

    Beside its keys stand the set's name if it has one, `moa/domains` in order, hashes of the
    images, of their split and of the base weights, and the pattern that groups the images if there
    is one, by which a report tells whether two runs can be compared.
    """
    config, origin = parts.config, parts.info.origin
    assert origin is not None, "`build` gives every run one"
    dataset = config.data.dataset
    return {
        "step": step,
        "epoch": max(parts.stream.epochs(step).values()),
        **columns,
        **({"moa/dataset": origin.dataset_name} if origin.dataset_name else {}),
        "moa/domains": list(parts.index.domains),
        "moa/data_hash": origin.data_hash,
        "moa/split_hash": origin.split_hash,
        **({"moa/group_by": origin.group_by} if origin.group_by else {}),
        "moa/base_hash": parts.info.base_sha256,
        "args": {
            "dataset": DOMAINBED_NAMES.get(dataset, dataset),
            "algorithm": config.moa.method,
            "test_envs": sorted(parts.withheld),
            "trial_seed": config.train.trial_seed,
            "seed": config.train.seed,
            "hparams_seed": config.hparams_seed,
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


def card_figures(row: Mapping[str, Any], which: str = "last") -> dict[str, float]:
    """What of a row goes onto an adapter's card: step and accuracies, of an average if named."""
    kind = re.compile("((?:moa/)?env.*_acc)" if which == "last" else rf"moa/{which}/(env.*_acc)")
    found = {match[1]: row[key] for key in row if (match := kind.fullmatch(key))}
    return {"step": row["step"]} | found
