"""Run folders written by hand, as a trainer leaves them, with accuracies that a test chooses."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from trainer.config.command_line import parse
from trainer.config.run_config import RunConfig, as_plain


def evaluation(step: int, *accuracies: tuple[float, float]) -> dict[str, Any]:
    """A row with the (in, out) accuracies of each domain."""
    result: dict[str, Any] = {"step": step}
    for env, (inside, outside) in enumerate(accuracies):
        result |= {f"env{env}_in_acc": inside, f"env{env}_out_acc": outside}
    return result


@cache
def defaults() -> RunConfig:
    """The settings of a run without flags."""
    return parse([])


def write_run(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    dataset: str = "digits",
    method: str = "lora",
    held_out: Sequence[int] = (0,),
    seed: int = 0,
    trial_seed: int = 0,
    hparams_seed: int = 0,
    domains: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    done: bool = True,
    ours: bool = True,
    **extra: Any,
) -> Path:
    """Writes a run folder; `extra` goes into every row, `ours` decides on a config.yaml."""
    folder.mkdir(parents=True)
    args = {
        "dataset": dataset, "algorithm": method, "test_envs": list(held_out), "seed": seed,
        "trial_seed": trial_seed, "hparams_seed": hparams_seed, "holdout_fraction": 0.2,
        "output_dir": str(folder),
    }  # fmt: skip
    if domains:
        extra["moa/domains"] = list(domains)
    lines = [
        json.dumps({**row, "epoch": 0.0, "args": args, "hparams": {}, **extra}) for row in rows
    ]
    (folder / "results.jsonl").write_text("".join(line + "\n" for line in lines))
    if ours:
        config = as_plain(defaults())
        config["data"]["dataset"], config["moa"]["method"] = dataset, method
        config["train"] |= {"seed": seed, "trial_seed": trial_seed}
        config["output_dir"], config["hparams_seed"] = str(folder), hparams_seed
        for name, value in (settings or {}).items():
            section, _, key = name.partition(".")
            config[section][key] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if done:
        (folder / "done").write_text("done\n")
    return folder
