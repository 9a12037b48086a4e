"""What an evaluation leaves: tables, JSON lines, a folder of files, a saved soup."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.checkpoint.atomic_file import replace_text
from trainer.evaluate.job import Evaluation
from trainer.evaluate.members import SOUP, not_trained_on, write_member
from trainer.evaluate.predictions import Figures
from trainer.prepare.provenance import shareable, shown_command
from trainer.process.errors import cannot_write
from trainer.process.tables import Table, output_console

FORMAT_VERSION = 1


def report(found: Evaluation, args: argparse.Namespace) -> None:
    """Prints, and writes what was asked for; `OutputError` if a folder cannot be written."""
    sys.stderr.writelines(f"warning: {line}\n" for line in found.warnings)
    console = output_console()
    if args.json:
        for label in found.results:
            console.out(json.dumps({"moa/result": label, **row(found, label)}))
    else:
        for table in tables(found):
            table.show(console)
        if found.alphas:
            share = 100 * found.validation(found.asked)
            console.out(
                f"chosen by validation: {found.asked}, {share:.1f} % on the sources' out splits"
            )
        console.out(_cost(found))
    if args.output is not None:
        _write_folder(found, args.output)
    if args.save is not None:
        made = [*found.members, *([found.soup] if found.soup else [])]
        label = found.asked if found.alphas else SOUP
        accuracies = {k: v for k, v in row(found, label).items() if k.endswith("_acc")}
        member = next(member for member in made if member.label == label)
        info = replace(member.info, results=accuracies)
        write_member("--save", replace(member, info=info), args.save)


def row(found: Evaluation, label: str) -> dict[str, float]:
    """One result as DomainBed's rows name it; what they do not know stands under `moa/`."""
    flat: dict[str, float] = {}
    for (env, split), figures in found.results[label].items():
        domainbed = "" if split in ("in", "out") else "moa/"
        flat[f"{domainbed}env{env}_{split}_acc"] = figures.accuracy
        for name in ("class_mean", "ece", "nll", "samples"):
            flat[f"moa/env{env}_{split}_{name}"] = getattr(figures, name)
        if figures.unusable:
            flat[f"moa/unusable/env{env}_{split}"] = figures.unusable
    if found.alphas:
        flat["moa/validation"] = found.validation(label)
    return flat


def domain_title(found: Evaluation, env: int) -> str:
    """A domain's name, marked if it was held out in training, or came later."""
    name = found.data.index.domains[env]
    by = not_trained_on(found.members, name)
    if not by:
        return name
    is_held_out = all(m.info.origin and name in m.info.origin.withheld for m in by)
    mark = "held out" if is_held_out else "not trained on"
    if len(by) == len(found.members):
        return f"{name} ({mark})"
    return f"{name} ({mark} by {', '.join(member.label for member in by)})"


def tables(found: Evaluation) -> list[Table]:
    """A comparison of all results if there are several, then the details of the one asked for."""
    envs, splits, result = found.data.envs, found.splits, []
    titles = [domain_title(found, env) for env in envs]
    for split in splits if len(found.results) > 1 else ():
        rows = []
        for label, cells in found.results.items():
            here = [cells[env, split] for env in envs]
            rows.append([label, *(_percent(f, "accuracy") for f in here), _mean_ece(here)])
        title = found.titled(f"accuracy %, {split.replace('_', ' ')} split")
        result.append(Table(["adapter", *titles, "mean ECE %"], rows, title, align="lr"))
    label, cells = found.asked, found.results[found.asked]
    shown = {"acc %": "accuracy", "class mean %": "class_mean", "ECE %": "ece"}
    columns = [f"{split.replace('_', ' ')} {what}" for split in splits for what in shown]
    rows = [
        [title, *(_percent(cells[env, split], name) for split in splits for name in shown.values())]
        for env, title in zip(envs, titles, strict=True)
    ]
    return [*result, Table(["domain", *columns], rows, found.titled(label), align="lr")]


def _percent(figures: Figures, name: str) -> str:
    return f"{100 * getattr(figures, name):.1f}" if figures.samples else "-"


def _mean_ece(cells: Sequence[Figures]) -> str:
    """Over the cells that have samples."""
    found = [cell.ece for cell in cells if cell.samples]
    return f"{100 * sum(found) / len(found):.1f}" if found else "-"


def _cost(found: Evaluation) -> str:
    images, passes, seconds, backbone, adapters = found.cost.values()
    rate = images / seconds if seconds else 0.0
    return (
        f"{images:,} images, {passes} forward pass{'es' * (passes > 1)} each, "
        f"{rate:.0f} images/s; in memory one backbone of {backbone / 2**20:.1f} MiB "
        f"and {adapters / 2**20:.1f} MiB of adapters"
    )


def document(found: Evaluation) -> dict[str, Any]:
    """Everything, for `evaluation.json`."""
    domains, classes = found.data.index.domains, found.data.index.classes
    results = {
        label: {
            domains[env]: {s: cells[env, s].plain(classes) for s in found.splits}
            for env in found.data.envs
        }
        for label, cells in found.results.items()
    }
    return {
        "format_version": FORMAT_VERSION, "command": shown_command(sys.argv),
        "base_model": found.backbone.name, "base_sha256": found.backbone.sha256,
        "dataset": found.data.index.dataset, "dataset_name": found.data.index.name,
        "domains": domains, "classes": classes,
        "trial_seed": found.data.trial_seed,
        "holdout_fraction": found.data.config.holdout_fraction,
        "average": found.average, "warnings": found.warnings, "asked": found.asked,
        "adapters": [
            {
                "label": m.label, "source": m.source, "method": m.info.moa.method,
                "origin": m.info.origin and shareable(m.info.origin).plain(),
            }
            for m in found.members
        ],
        "cost": found.cost, "results": results,
    }  # fmt: skip


def _write_folder(found: Evaluation, folder: Path) -> None:
    from trainer.evaluate.plots import save_pictures

    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "evaluation.json", json.dumps(document(found)) + "\n")
        texts = [table.markdown() + "\n" for table in tables(found)]
        replace_text(folder / "tables.md", "\n".join(texts))
        save_pictures(found, {env: domain_title(found, env) for env in found.data.envs}, folder)
    except OSError as error:
        raise cannot_write("--output", folder, error) from error
