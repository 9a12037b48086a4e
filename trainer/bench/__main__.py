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
from typing import TYPE_CHECKING, Any

from trainer.config.command_line import CommandParser
from trainer.process.ending import conclude, leave
from trainer.process.errors import ConfigError, OutputError
from trainer.process.world import ALONE
from trainer.tables import Table, output_console

if TYPE_CHECKING:
    from trainer.bench.timing import Comparison

PARTS = ("layer", "step", "engine", "checkpoint", "data")
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
    on_cpu = tuple(part for part in PARTS if part != "engine")
    parts = args.part or (("step", "engine") if args.device == "cuda" else on_cpu)
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

    from trainer.config.run_config import ModelConfig
    from trainer.prepare.backbone import check_backbone

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: 'cuda', but torch finds no GPU; use --device cpu")
    if "step" in parts:
        if importlib.util.find_spec("peft") is None:
            others = " ".join(part for part in PARTS if part != "step")
            raise ConfigError(
                "--part: 'step' compares with PEFT, which is not installed; pip install "
                f"'moa-trainer[test]', or leave it out: --part {others}"
            )
        for backbone in args.backbones or ():
            try:
                check_backbone(ModelConfig(backbone=backbone, weights="random"))
            except ConfigError as error:
                reason = str(error).removeprefix("model.backbone: ")
                raise ConfigError(f"--backbones: {reason}") from error
    if args.json:
        _write(args.json, None)


def _write(path: str, measured: "dict[str, Comparison] | None") -> None:
    """Writes the figures; None only sees whether they could be, and leaves older ones alone."""
    try:
        with open(path, "a" if measured is None else "w", encoding="utf-8") as file:
            file.write("" if measured is None else json.dumps(measured, indent=1) + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"--json: cannot write {path} ({reason}); give another file") from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = CommandParser(prog="python -m trainer.bench", description=__doc__)
    result.add_argument(
        "--part", type=_part, nargs="+", metavar="PART",
        help=f"which of {', '.join(PARTS)}; default all but engine; on a GPU step engine",
    )  # fmt: skip
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    result.add_argument(
        "--backbones", nargs="+", metavar="NAME",
        help=f"for step; default vit_base_patch16_clip_224, on a GPU {' and '.join(LARGE)}",
    )  # fmt: skip
    result.add_argument(
        "--batches", type=_count, nargs="+", metavar="N",
        help="for step; default 4, on a GPU 64 256",
    )  # fmt: skip
    result.add_argument(
        "--precision", choices=("fp32", "bf16"), help="for step; default fp32, on a GPU bf16"
    )
    for name, what in {
        "--compile": "each table also with torch.compile",
        "--checkpointing": "with activation checkpointing",
        "--alone": "one method after the other, as on a GPU",
    }.items():
        result.add_argument(name, action="store_true", help=f"for step: {what}")
    result.add_argument("--rounds", type=_count, default=5, help="default: 5")
    result.add_argument("--json", metavar="FILE", help="also write the figures there")
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
        precision = args.precision or ("bf16" if gpu else "fp32")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        more = (args.checkpointing, gpu or args.alone)
        for backbone, batch, compiled in itertools.product(
            args.backbones or (LARGE if gpu else ("vit_base_patch16_clip_224",)),
            args.batches or ((64, 256) if gpu else (4,)),
            (False, True) if args.compile else (False,),
        ):
            setting = bench.Setting(backbone, batch, args.device, dtype, compiled, *more)
            yield {str(setting): bench.measure(setting, args.rounds)}
    elif part == "engine":
        yield from bench.measure(bench.GPU_CASES, args.rounds) if gpu else bench.measure()
    elif part == "checkpoint":
        yield bench.measure()
    else:
        yield bench.measure(args.rounds)


def _show(measured: "dict[str, Comparison]") -> None:
    for title, rows in measured.items():
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        lines = [[name, *(_text(row.get(c, "")) for c in columns)] for name, row in rows.items()]
        Table(["variant", *columns], lines, title, align="lr").show(output_console())


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
