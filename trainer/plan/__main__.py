"""`python -m trainer.plan`: what a run will train, need and compute, before it is submitted.

Takes the flags of `trainer/run.py` and a few of its own; needs no GPU, no weights and no data.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from trainer.config.command_line import OwnFlags, build_parser, parse_without_data, words
from trainer.config.run_config import RunConfig
from trainer.plan.data import Request
from trainer.plan.measured import read_measured
from trainer.process.ending import conclude
from trainer.process.errors import ConfigError, noted
from trainer.process.importing import many_imports
from trainer.process.world import ALONE


def _add_own(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world_size", default="1", metavar="N", help="processes (default: 1)")
    parser.add_argument(
        "--gpu_memory", metavar="GIB", help="memory of a GPU; says whether the run fits"
    )
    parser.add_argument("--num_classes", metavar="N", help="default: the dataset's, where known")
    parser.add_argument(
        "--domains", metavar="D", help="with the held-out one; default: the dataset's, where known"
    )
    parser.add_argument(
        "--measured", metavar="FILE",
        help="rates of a machine, from trainer.bench --part step --json FILE; default: assumed",
    )  # fmt: skip
    parser.add_argument(
        "--table", action="store_true",
        help="what all domains x seeds x methods cost, with 1 to 8 GPUs a run",
    )  # fmt: skip
    parser.add_argument("--methods", metavar="A,B", help="with --table; default: the recipe's")
    parser.add_argument("--seeds", metavar="0,1", help="with --table; default: 0,1,2")
    parser.add_argument("--json", action="store_true", help="print JSON, no tables")


def read_command_line(argv: Sequence[str]) -> tuple[RunConfig, Request]:
    """The run, and what is asked about it.

    Raises `ConfigError`: every problem of the command line, one a line.
    """
    own = OwnFlags(add_help=False, allow_abbrev=False)
    _add_own(own)
    given, rest = own.parse_known_args(argv)
    problems: list[str] = []
    request = Request(
        world_size=_number(given.world_size, "--world_size", int, 1, problems) or 1,
        gpu_memory=_number(given.gpu_memory, "--gpu_memory", float, 0, problems),
        num_classes=_number(given.num_classes, "--num_classes", int, 1, problems),
        domains=_number(given.domains, "--domains", int, 2, problems),
        json=given.json,
    )
    if not given.table:
        problems += [
            f"--{name}: has no effect without --table"
            for name in ("methods", "seeds") if getattr(given, name) is not None
        ]  # fmt: skip
    with noted(problems):
        config = parse_without_data(rest)
        if given.table:
            methods = tuple(words(given.methods or "")) or (config.moa.method,)
            for method in methods:
                parse_without_data([*rest, f"--moa.method={method}"])
            seeds = words(given.seeds or "0,1,2")
            if not all(map(str.isdecimal, seeds)):
                problems.append(f"--seeds = {given.seeds!r}: legal are whole numbers and commas")
            request = replace(request, methods=methods, seeds=len(seeds))
        if given.measured:
            gpu = request.gpu_memory is not None
            steps = read_measured(given.measured, config, gpu)
            request = replace(request, measured=steps)
    if problems:
        raise ConfigError("\n".join(problems))
    return config, request


def _number(text: str | None, flag: str, kind: type, least: int, problems: list[str]) -> Any:
    if text is None:
        return None
    with suppress(ValueError):
        value = kind(text)
        if least <= value < 2**63 and value > 0:
            return value
    what = "a whole number" if kind is int else "a number"
    bound = f">= {least}" if least else "> 0"
    problems.append(f"{flag} = {text!r}: legal is {what} {bound}")
    return None


def plan_command(argv: Sequence[str]) -> None:
    """Reads the command line, plans and prints."""
    config, request = read_command_line(argv)
    with many_imports():  # heavy ones, after the command line has proved legal
        from trainer.plan.planning import make_plan
        from trainer.plan.table import show, show_table
        from trainer.plan.whole_table import plan_table
    if request.methods:
        show_table(plan_table(config, request), request)
    else:
        show(make_plan(config, request), request)


def parser() -> argparse.ArgumentParser:
    """The command line, for its help."""
    result: argparse.ArgumentParser = build_parser()
    result.prog, result.description = "python -m trainer.plan", __doc__
    _add_own(result)
    return result


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        parser().print_help()
        return 0
    return conclude(lambda: plan_command(argv), ALONE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
