"""`python -m trainer.bench`: what the parts of the trainer cost, as ratios measured in one run.

Variants take turns, so that whatever else the machine does meets all of them. A ratio holds for one
kind of machine; no time here holds for another.
"""

import argparse
import importlib
import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.command_line import CommandParser
from trainer.process.ending import conclude, leave
from trainer.process.errors import ConfigError, OutputError
from trainer.process.tables import Table, output_console
from trainer.process.world import ALONE

if TYPE_CHECKING:
    from trainer.bench.step import Setting
    from trainer.bench.timing import Comparison

PARTS = ("layer", "step", "engine", "checkpoint", "data", "train", "report")
BY_DEFAULT = ("layer", "step", "checkpoint", "data")
WITH_PEFT = {"step", "train", "report"}
LARGE = ("vit_large_patch14_clip_224", "vit_gigantic_patch14_clip_224")


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    args = parser().parse_args(argv)
    return conclude(lambda: bench_command(args), ALONE)


def bench_command(args: argparse.Namespace) -> None:
    """Measures part by part, and shows and writes every table once it is there.

    Raises:
        ConfigError: an argument that cannot work, before anything is measured.
        OutputError: the file for the figures cannot be written.
    """
    parts = args.part or (("step", "engine") if args.device == "cuda" else BY_DEFAULT)
    _check(args, parts)
    measured: dict[str, Comparison] = {}
    for part in parts:
        for found in _measure(part, args):
            measured |= found
            _show(found)
            if args.json:
                _write(args.json, measured)


def _check(args: argparse.Namespace, parts: Sequence[str]) -> None:
    """Finds what would end the benchmark after minutes of measuring."""
    import torch

    from trainer.config.model import ModelConfig
    from trainer.prepare.backbone import check_backbone

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: 'cuda', but torch finds no GPU; use --device cpu")
    if args.graph and (args.device == "cpu" or args.checkpointing):
        other = "--checkpointing" if args.checkpointing else "--device cpu"
        raise ConfigError(f"--graph: no CUDA graph can be with {other}; leave one of them out")
    if compared := sorted(WITH_PEFT.intersection(parts)):
        if importlib.util.find_spec("peft") is None:
            others = " ".join(part for part in PARTS if part not in WITH_PEFT)
            raise ConfigError(
                f"--part: {compared[0]!r} compares with PEFT, which is not installed; pip install "
                f"'moa-trainer[test]', or leave it out: --part {others}"
            )
        for backbone in args.backbones or ():
            try:
                check_backbone(ModelConfig(backbone=backbone, weights="random"))
            except ConfigError as error:
                reason = str(error).removeprefix("model.backbone: ")
                raise ConfigError(f"--backbones: {reason}") from error
    if args.json:
        if Path(args.json).suffix == ".md":
            raise ConfigError(f"--json: {args.json}; the tables get that ending, give another")
        _write(args.json, None)


def _write(path: str, measured: "dict[str, Comparison] | None") -> None:
    """Writes the figures; None only sees whether they could be, and leaves older ones alone."""
    texts = {path: "", str(Path(path).with_suffix(".md")): ""}
    if measured is not None:
        tables = (_table(title, rows).markdown() for title, rows in measured.items())
        texts = dict(zip(texts, (json.dumps(measured, indent=1), "\n\n".join(tables)), strict=True))
    for name, text in texts.items():
        try:
            with open(name, "a" if measured is None else "w", encoding="utf-8") as file:
                file.write(text and text + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(
                f"--json: cannot write {name} ({reason}); give another file"
            ) from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = CommandParser(prog="python -m trainer.bench", description=__doc__)
    result.add_argument(
        "--part", type=_part, nargs="+", metavar="PART",
        help=f"which of {', '.join(PARTS)}; default {' '.join(BY_DEFAULT)}; on a GPU step engine",
    )  # fmt: skip
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    result.add_argument(
        "--backbones", nargs="+", metavar="NAME",
        help="for step and train; default vit_base_patch16_clip_224, on a GPU "
        + " and ".join(LARGE),
    )  # fmt: skip
    result.add_argument(
        "--batches", type=_count, nargs="+", metavar="N",
        help="for step and train; default 4, on a GPU 64 256 for step and 20 for train",
    )  # fmt: skip
    result.add_argument(
        "--precision", choices=("fp32", "bf16"), help="of these; default fp32, on a GPU bf16"
    )
    for name, what in {
        "--compile": "for step and train: each table also with torch.compile",
        "--graph": "for step and train, on a GPU: each table also as one CUDA graph",
        "--checkpointing": "for step and train: with activation checkpointing",
        "--alone": "for step: one method after the other, as on a GPU",
        "--digits": "for train and report: embedded digits in place of JPEGs of 400 to 600 px",
    }.items():
        result.add_argument(name, action="store_true", help=what)
    result.add_argument("--rounds", type=_count, default=5, help="default: 5")
    for name, number, what in (("--steps", 10, "of a round"), ("--workers", 1, "to load images")):
        text = f"for train and report: {what}; default: {number}"
        result.add_argument(name, type=_count, default=number, help=text)
    result.add_argument(
        "--json",
        metavar="FILE",
        help="also write the figures there, and the tables beside it (.md)",
    )
    return result


def _part(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r}; legal are {', '.join(PARTS)}")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; legal is a whole number >= 1")
    return int(text)


def _measure(part: str, args: argparse.Namespace) -> "Iterator[dict[str, Comparison]]":
    """One part's tables; imports what it needs only here, so that --help answers at once."""
    import torch

    bench: Any = importlib.import_module(f"trainer.bench.{part}")
    gpu = args.device == "cuda"
    if part == "layer":
        yield bench.measure(args.rounds, torch.device(args.device))
    elif part == "step":
        for setting in _settings(args, (64, 256)):
            yield {str(setting): bench.measure(setting, args.rounds)}
    elif part == "train":
        for setting in _settings(args, (20,)):
            for mode in bench.modes(args.device):
                if setting.in_mode(mode) == setting:
                    job = bench.Job(setting, mode, *_length(args))
                    yield {str(job): bench.measure(job)}
    elif part == "report":
        job = bench.train.Job(next(_settings(args, (20,))), "eager", *_length(args))
        yield from bench.measure(job, bench.GPU_SIZES if gpu else bench.SIZES)
    elif part == "engine":
        yield from bench.measure(bench.GPU_CASES, args.rounds) if gpu else bench.measure()
    elif part == "checkpoint":
        yield bench.measure()
    else:
        yield bench.measure(args.rounds)


def _length(args: argparse.Namespace) -> tuple[int, int, int, bool]:
    """Of a job: its rounds, steps and loader processes, and whether it reads the digits."""
    return args.rounds, args.steps, args.workers, args.digits


def _settings(args: argparse.Namespace, on_gpu: Sequence[int]) -> "Iterator[Setting]":
    """Every backbone with every batch, by default these on a GPU, in the modes asked for."""
    import torch

    from trainer.bench.step import Setting

    gpu = args.device == "cuda"
    precision = args.precision or ("bf16" if gpu else "fp32")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for backbone, batch, graphed, compiled in itertools.product(
        args.backbones or (LARGE if gpu else ("vit_base_patch16_clip_224",)),
        args.batches or (on_gpu if gpu else (4,)),
        (False, True) if args.graph else (False,),
        (False, True) if args.compile else (False,),
    ):
        more = (compiled, args.checkpointing, gpu or args.alone, graphed)
        yield Setting(backbone, batch, args.device, dtype, *more)


def _show(measured: "dict[str, Comparison]") -> None:
    for title, rows in measured.items():
        _table(title, rows).show(output_console())


def _table(title: str, rows: "dict[str, dict[str, float | str]]") -> Table:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [[name, *(_text(row.get(c, "")) for c in columns)] for name, row in rows.items()]
    return Table(["variant", *columns], lines, title, align="lr" if columns else "l")


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
