"""`python -m trainer.reference`: the pages of the documentation that are made from the code.

`flags` is every flag of every command, from the dataclasses and parsers; `modules` is every source
file with the first line of its docstring. A test compares the committed pages with these.
"""

import argparse
import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from docstring_parser import parse_from_object

from trainer.config.command_line import describe_type
from trainer.config.run_config import ROOT, RunConfig

FLAGS = """# Flags

Made from the code by `make reference`. Every setting of a run is a flag
`--section.field value` and may stand in a YAML recipe as `section:` with `field: value` under it;
what the command line says comes last. `--recipe NAME_OR_FILE` picks the recipe (default:
`embedded`). That one also lies under every command that names no other: 201 steps of 8 images per
domain, learning rate 0.002, an evaluation and a checkpoint every 50 steps. For work of your own
start from a recipe ([recipes.md](recipes.md)) or give these. `python -m trainer.plan` takes all of
these flags, too.
"""

MODULES = """# Modules

Made from the code by `make reference`: every source file and what it is for. How they work together
is told in [architecture.md](architecture.md).
"""

COMMANDS = (
    "trainer.plan",
    "trainer.evaluate",
    "trainer.report",
    "trainer.export",
    "trainer.flatness",
    "trainer.sweep",
    "trainer.sweep.slurm_array",
    "trainer.bench",
    "shards.writer",
)
"""Modules with a function `parser`, beside `trainer/run.py`."""


def command_module(name: str) -> ModuleType:
    """What `python -m name` runs: a module, or the `__main__` of a package."""
    spec = find_spec(name)
    is_package = spec is not None and spec.submodule_search_locations is not None
    return import_module(f"{name}.__main__" if is_package else name)


def modules_page() -> str:
    """The files of the three packages."""
    parts = [MODULES]
    for package in ("moa", "shards", "trainer"):
        folders = sorted({path.parent for path in (ROOT / package).glob("**/*.py")})
        for folder in folders:
            rows = [
                (f"`{path.name}`", _first_line(path))
                for path in sorted(folder.glob("*.py"))
                if path.name != "__init__.py"
            ]
            title = f"## `{folder.relative_to(ROOT)}/`\n\n{_first_line(folder / '__init__.py')}\n"
            parts.append(f"{title}\n{table(('file', 'what it is for'), rows)}")
    return "\n".join(parts)


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0]


def flags_page() -> str:
    """The flags of all commands."""
    parts = [FLAGS, *_sections(RunConfig, "")]
    for module in COMMANDS:
        parts.append(f"## `python -m {module}`\n")
        command: argparse.ArgumentParser = command_module(module).parser()
        rows = list(_options(command, own=module == "trainer.plan"))
        parts.append(table(("flag", "meaning"), rows))
    return "\n".join(parts)


def _sections(kind: Any, prefix: str) -> Iterator[str]:
    """A table of the plain fields of a dataclass, then one for each section below it."""
    meanings = {p.arg_name: p.description or "" for p in parse_from_object(kind).params}
    plain = [entry for entry in fields(kind) if not is_dataclass(entry.type)]
    title = f"`--{prefix}*`: {first_sentence(kind)}" if prefix else "`deepspeed trainer/run.py`"
    yield f"## {title}\n"
    yield table(
        ("flag", "default", "legal", "meaning"),
        [
            (
                f"`--{prefix}{entry.name}`",
                shown(entry.default),
                describe_type(entry.type),
                meanings.get(entry.name, ""),
            )
            for entry in plain
        ],
    )
    for entry in fields(kind):
        if is_dataclass(entry.type):
            yield from _sections(entry.type, f"{prefix}{entry.name}.")


def first_sentence(kind: type) -> str:
    """What a dataclass is, from its docstring."""
    return (parse_from_object(kind).short_description or "").removesuffix(".")


def _options(parser: argparse.ArgumentParser, own: bool) -> Iterator[tuple[str, str]]:
    """Flag and meaning of each argument, of those that are no settings of a run if `own`."""
    settings = {"recipe", *(entry.name for entry in fields(RunConfig))}
    for action in parser._actions:
        mine = own and action.dest.partition(".")[0] in settings
        if action.dest == "help" or action.help == argparse.SUPPRESS or mine:
            continue
        names = action.option_strings or [action.dest]
        text = (action.help or "") % {**vars(action), "prog": parser.prog}
        if action.choices is not None:
            text = f"{', '.join(map(str, action.choices))}: {text}"
        yield ", ".join(f"`{name}`" for name in names), text


def shown(value: Any) -> str:
    """A default as a user would write it; empty for none."""
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars and line ends within cells are taken care of."""
    lines = [titles, ["---"] * len(titles), *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m trainer.reference", description=__doc__)
    result.add_argument("page", choices=list(PAGES), help="which page to print")
    return result


PAGES = {"flags": flags_page, "modules": modules_page}


def main(argv: Sequence[str]) -> int:
    """Prints a page; returns the exit code."""
    sys.stdout.write(PAGES[parser().parse_args(argv).page]())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
