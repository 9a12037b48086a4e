"""`python -m trainer.bench`: what the parts of the trainer cost, as ratios measured in one run.

Variants take turns, so that whatever else the machine does meets all of them. A ratio holds for one
kind of machine; no time here holds for another.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.bench_timing import Table

PARTS = ("layer", "step", "engine", "traffic", "checkpoint", "data")
LARGE = ("vit_large_patch14_clip_224", "vit_gigantic_patch14_clip_224")


def main(argv: Sequence[str]) -> int:
    """Command line: prints the tables, or JSON."""
    args = _parser().parse_args(argv)
    args.part = args.part or (
        ("step",) if args.device == "cuda" else ("layer", "step", "traffic", "checkpoint", "data")
    )
    measured: dict[str, Table] = {}
    for part in args.part:
        measured |= _measure(part, args)
    if args.json:
        Path(args.json).write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    _show(measured)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.bench", description=__doc__)
    parser.add_argument(
        "--part", type=_part, nargs="+", metavar="PART",
        help=f"which of {', '.join(PARTS)}; default all but engine; on a GPU step",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--backbones", nargs="+", metavar="NAME",
        help=f"for step; default vit_base_patch16_clip_224, on a GPU {' and '.join(LARGE)}",
    )  # fmt: skip
    parser.add_argument(
        "--batches", type=int, nargs="+", metavar="N", help="for step; default 4, on a GPU 64 256"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="for step; default fp32, on a GPU bf16"
    )
    parser.add_argument(
        "--compile", action="store_true", help="for step: each table also with torch.compile"
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="for step: with activation checkpointing"
    )
    parser.add_argument(
        "--alone", action="store_true", help="for step: one method after the other, as on a GPU"
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    return parser


def _part(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r}; legal are {', '.join(PARTS)}")
    return text


def _measure(part: str, args: argparse.Namespace) -> "dict[str, Table]":
    """One part's tables; imports what it needs only here, so that --help answers at once."""
    import torch

    device = torch.device(args.device)
    if part == "layer":
        from trainer import bench_layer

        return bench_layer.measure(args.rounds, device)
    if part == "engine":
        from trainer import bench_engine

        return bench_engine.measure()
    if part == "traffic":
        from trainer import bench_traffic

        return bench_traffic.measure()
    if part == "checkpoint":
        from trainer import bench_checkpoint

        return bench_checkpoint.measure()
    if part == "data":
        from trainer import bench_data

        return bench_data.measure(args.rounds)
    return _measure_steps(args)


def _measure_steps(args: argparse.Namespace) -> "dict[str, Table]":
    import torch

    from trainer import bench_step

    gpu = args.device == "cuda"
    precision = args.precision or ("bf16" if gpu else "fp32")
    tables = {}
    for backbone in args.backbones or (LARGE if gpu else ("vit_base_patch16_clip_224",)):
        for batch in args.batches or ((64, 256) if gpu else (4,)):
            for compiled in (False, True) if args.compile else (False,):
                setting = bench_step.Setting(
                    backbone=backbone,
                    batch=batch,
                    device=args.device,
                    dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
                    compiled=compiled,
                    checkpointing=args.checkpointing,
                    alone=gpu or args.alone,
                )
                tables[str(setting)] = bench_step.measure(setting, args.rounds)
    return tables


def _show(measured: "dict[str, Table]") -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for title, rows in measured.items():
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        table = RichTable("variant", title=title, title_justify="left")
        for name in columns:
            table.add_column(name, justify="right")
        for variant, row in rows.items():
            table.add_row(variant, *(_text(row.get(name, "")) for name in columns))
        console.print(table)


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
