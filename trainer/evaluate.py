"""`python -m trainer.evaluate --adapter FOLDER`: accuracy of a saved adapter on every domain.

The adapter is loaded into a freshly created backbone; nothing of the training run is needed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shards.config import DataConfig
from trainer.config import ModelConfig
from trainer.session import conclude
from trainer.world import World

ALONE = World(rank=0, size=1, local_rank=0, local_size=1)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=__doc__)
    data = DataConfig()
    result.add_argument("--adapter", type=Path, required=True, help="folder of a saved adapter")
    result.add_argument("--data.dataset", dest="dataset", default=data.dataset, help="%(default)s")
    result.add_argument("--data.root", dest="root", help="shard set; default: the embedded data")
    for name in ("exclude_list", "include_list"):
        result.add_argument(
            f"--data.{name}", dest=name, metavar="FILE",
            help="samples to leave out, or to keep; the rest gets a column of its own",
        )  # fmt: skip
    result.add_argument(
        "--data.holdout_fraction", dest="holdout_fraction", type=float,
        default=data.holdout_fraction, help="share of the out split (%(default)s)",
    )  # fmt: skip
    result.add_argument(
        "--train.trial_seed", dest="trial_seed", type=int, default=0, help="split (%(default)s)"
    )
    result.add_argument(
        "--model.weights", dest="weights", default="pretrained",
        help="pretrained, or a safetensors file of the base (%(default)s)",
    )  # fmt: skip
    result.add_argument("--batch", type=int, default=128, help="images a batch (%(default)s)")
    result.add_argument("--json", action="store_true", help="print one JSON line, no table")
    return result


def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """`env{i}_{in,out}_acc` of the adapter in `args.adapter`, and prints them."""
    import torch

    import moa
    from moa.state import read_adapter
    from shards import open_shards
    from trainer.checkpoint import MANIFEST_FILE, verify
    from trainer.errors import ConfigError
    from trainer.evaluation import LEFT_OUT, SPLITS, Evaluator, accuracies
    from trainer.model import create_backbone

    if not args.adapter.is_dir():
        raise ConfigError(f"--adapter: no folder {args.adapter}; give the folder of an adapter")
    if (args.adapter / MANIFEST_FILE).exists():  # a checkpoint is an adapter's folder, too
        verify(args.adapter)
    info, _ = read_adapter(args.adapter)
    data = DataConfig(
        dataset=args.dataset,
        root=args.root,
        holdout_fraction=args.holdout_fraction,
        exclude_list=args.exclude_list,
        include_list=args.include_list,
    )
    if problems := data.problems():
        raise ConfigError("\n".join(problems))
    index = open_shards(data)
    if tuple(index.classes) != tuple(info.classes):
        raise ConfigError(
            f"--adapter: {args.adapter} knows the classes {', '.join(info.classes[:5])} ... "
            f"({len(info.classes)}), {index.root} has {', '.join(index.classes[:5])} ... "
            f"({len(index.classes)}); evaluate it on data with the same classes"
        )
    base = ModelConfig(backbone=info.base_model, weights=args.weights)
    model = create_backbone(base, len(info.classes), seed=0).model
    moa.load_adapter(model, args.adapter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluator = Evaluator(
        index=index,
        data_config=info.data_config,
        trial_seed=args.trial_seed,
        holdout_fraction=args.holdout_fraction,
        batch_size=args.batch,
        workers=0,
        world=ALONE,
        device=device,
        dtype=torch.float32,
        sum_over_ranks=lambda value: value,
    )
    result = accuracies(evaluator(model.to(device)))
    console = Console()
    if args.json:
        console.print(json.dumps(result), soft_wrap=True, highlight=False)
        return result
    table = Table("domain", "in accuracy %", "out accuracy %", title=escape(str(args.adapter)))
    if index.subset is not None:
        table.add_column("left out accuracy %")
    for env, name in enumerate(index.domains):
        keys = [f"env{env}_{split}_acc" for split in SPLITS]
        if index.subset is not None:
            keys.append(f"moa/env{env}_{LEFT_OUT}_acc")
        table.add_row(escape(name), *(f"{100 * result[key]:.1f}" for key in keys))
    console.print(table)
    return result


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    args = parser().parse_args(argv)
    return conclude(lambda: evaluate(args), ALONE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
