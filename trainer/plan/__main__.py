"""`python -m trainer.plan`: what a run will train, need and compute, before it is submitted.

Takes the flags of `trainer/run.py` and a few of its own; needs no GPU, no weights and no data.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from trainer.config.command_line import OwnFlags, build_parser, parse_without_data
from trainer.config.run_config import RunConfig
from trainer.plan.data import Request
from trainer.process.ending import conclude
from trainer.process.errors import ConfigError, noted
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
    with noted(problems):
        config = parse_without_data(rest)
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
    # Heavy imports come after the command line has proved legal. They make objects by the hundred
    # thousand and no garbage: a collector that looks for some takes a fifth of their time.
    gc.disable()
    from trainer.plan.planning import make_plan
    from trainer.plan.table import show

    gc.freeze()
    gc.enable()
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
