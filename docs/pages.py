"""`python docs/pages.py`: the pages of the documentation that are made from the code.

`flags` is every flag of every command, from the dataclasses and parsers; `modules` is every source
file with the first line of its docstring. A test compares the committed pages with these.
`backbones` is what became of each model of timm, of which a test tries some.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from docstring_parser import parse_from_object

from trainer.config.command_line import describe_type
from trainer.config.run_config import ROOT, RunConfig
from trainer.process.tables import Table

FLAGS = """# Flags

Made from the code by `make reference`. Every setting of a run is a flag
`--section.field value` and may stand in a YAML recipe as `section:` with `field: value` under it;
what the command line says comes last. `--recipe NAME_OR_FILE` picks the recipe (default:
`embedded`). That one also lies under every command that names no other: 201 steps of 8 images per
domain, learning rate 0.002, an evaluation and a checkpoint every 50 steps. For work of your own
start from a recipe ([recipes.md](recipes.md)) or give these. `python -m trainer.plan` and
`python -m trainer.doctor` take all of these flags, too.
"""

MODULES = """# Modules

Made from the code by `make reference`: every source file and what it is for. How they work together
is told in [architecture.md](architecture.md).
"""

COMMANDS = (
    "trainer.plan", "trainer.evaluate", "trainer.predict", "trainer.report", "trainer.export",
    "trainer.flatness", "trainer.sweep", "trainer.sweep.slurm_array", "trainer.bench",
    "shards.writer", "shards.preview",
)  # fmt: skip
"""Modules with a function `parser`, beside `trainer/run.py`."""


def command_module(name: str) -> ModuleType:
    """What `python -m name` runs: a module, or the `__main__` of a package."""
    module = import_module(name)
    return import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


def modules_page() -> str:
    """The files of the three packages."""
    parts = [MODULES]
    for package in ("moa", "shards", "trainer"):
        for init in sorted((ROOT / package).glob("**/__init__.py")):
            files = sorted(set(init.parent.glob("*.py")) - {init})
            rows = [(f"`{path.name}`", _first_line(path)) for path in files]
            title = f"## `{init.parent.relative_to(ROOT)}/`\n\n{_first_line(init)}\n"
            parts.append(f"{title}\n{_table(('file', 'what it is for'), rows)}")
    return "\n".join(parts)


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; not filled up with spaces, so that one cell changes one line."""
    text = Table(columns, rows).markdown()
    return re.sub("-{4,}", "---", re.sub(" {2,}", " ", text)) + "\n"


def flags_page() -> str:
    """The flags of all commands."""
    parts = [FLAGS, *_sections(RunConfig, "")]
    for module in COMMANDS:
        rows = list(_options(command_module(module).parser(), own=module == "trainer.plan"))
        parts.append(f"## `python -m {module}`\n\n{_table(('flag', 'meaning'), rows)}")
    return "\n".join(parts)


def _sections(kind: Any, prefix: str) -> Iterator[str]:
    """A table of the plain fields of a dataclass, then one for each section below it."""
    about = parse_from_object(kind)
    meanings = {p.arg_name: p.description or "" for p in about.params}
    title = f"`--{prefix}*`: {about.short_description}".removesuffix(".")
    rows = [
        (
            f"`--{prefix}{entry.name}`", _shown(entry.default), describe_type(entry.type),
            meanings.get(entry.name, ""),
        )
        for entry in fields(kind)
        if not is_dataclass(entry.type)
    ]  # fmt: skip
    yield f"## {title if prefix else '`deepspeed trainer/run.py`'}\n"
    yield _table(("flag", "default", "legal", "meaning"), rows)
    for entry in fields(kind):
        if is_dataclass(entry.type):
            yield from _sections(entry.type, f"{prefix}{entry.name}.")


def _options(parser: argparse.ArgumentParser, own: bool) -> Iterator[tuple[str, str]]:
    """Flag and meaning of each argument, of those that are no settings of a run if `own`."""
    settings = {"recipe", *(entry.name for entry in fields(RunConfig))}
    for action in parser._actions:
        mine = own and action.dest.partition(".")[0] in settings
        if action.dest == "help" or action.help == argparse.SUPPRESS or mine:
            continue
        text = (action.help or "") % {**vars(action), "prog": parser.prog}
        if action.choices is not None:
            text = f"{', '.join(map(str, action.choices))}: {text}"
        yield f"`{(action.option_strings or [action.dest])[0]}`", text  # others are older


def _shown(value: Any) -> str:
    """A default as a user would write it; empty for none."""
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def backbones_page() -> str:
    """What fits which backbone; takes minutes."""
    from trainer.prepare import families  # with it comes torch

    return families.backbones_page()


PAGES = {"flags": flags_page, "modules": modules_page, "backbones": backbones_page}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python docs/pages.py", description=__doc__)
    result.add_argument("page", choices=list(PAGES), help="which page to print")
    return result


def main(argv: Sequence[str]) -> int:
    """Prints a page; returns the exit code."""
    sys.stdout.write(PAGES[parser().parse_args(argv).page]())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
