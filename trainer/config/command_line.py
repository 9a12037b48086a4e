"""From `argv` and a YAML recipe to a checked `RunConfig`; all problems are reported at once."""

import argparse
import json
import os
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from trainer.config.hparams import FACTS, drawn
from trainer.config.repeated_keys import repeated_key
from trainer.config.run_config import RENAMED, RunConfig, dotted, flat
from trainer.process.errors import ConfigError, did_you_mean

RECIPES = Path(__file__).resolve().parent / "recipes"
DEFAULT_RECIPE = "embedded"
ALIASES = {"deepspeed_config": "ds_config", **RENAMED}
"""Former and foreign names of settings, in flags and recipes alike -> today's."""

LAUNCHER_FLAGS = ("local_rank", "local-rank")
"""Appended by launchers; the rank is in the environment."""


def setting_type(key: str) -> Any:
    """The type of a setting by its dotted name."""
    kind: Any = RunConfig
    for part in key.split("."):
        kind = next(entry.type for entry in fields(kind) if entry.name == part)
    return kind


SECTIONS = {key.partition(".")[0] for key in flat(RunConfig()) if "." in key}
TEXTS = {key for key in flat(RunConfig()) if setting_type(key) in (str, str | None)}
"""Settings that are texts: taken as they stand, whatever a YAML reader would see in them."""
WORDS = {key for key in flat(RunConfig()) if get_origin(setting_type(key)) is Literal}
"""Settings of which a few words are legal; `on` and `off` are two, though YAML's truth values."""


def expanded(argv: Sequence[str]) -> Iterator[str]:
    """A command line with the user's folder for `~`, which no shell puts after a `=`."""
    for token in argv:
        key, equals, value = token.partition("=") if token.startswith("--") else ("", "", token)
        yield f"{key}{equals}{os.path.expanduser(value)}"


class CommandParser(argparse.ArgumentParser):
    """Flags of a command; `--a-flag` is taken for `--a_flag`, as flags were once spelt."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Like argparse's, with `~` expanded."""
        words = list(expanded(sys.argv[1:] if args is None else args))
        own = words.index("--") if "--" in words else len(words)
        for place, word in enumerate(words[:own]):
            old, equals, value = word.partition("=")
            if (
                flag := old.replace("-", "_").replace("__", "--", 1)
            ) in self._option_string_actions:
                words[place] = f"{flag}{equals}{value}"
        return super().parse_known_args(words, namespace)


class OwnFlags(CommandParser):
    """Flags of a command beside those of a run; a mistake is a `ConfigError`, too."""

    def error(self, message: str) -> NoReturn:
        """Raises what `trainer.process.ending.conclude` prints."""
        raise ConfigError(message)


def command_parser(
    name: str, about: str | None, kind: type[CommandParser] = CommandParser, **options: Any
) -> CommandParser:
    """The parser of `python -m name`, to be filled; its help shows `about` as it stands."""
    shape = argparse.RawDescriptionHelpFormatter
    return kind(prog=f"python -m {name}", description=about, formatter_class=shape, **options)


def build_parser() -> ArgumentParser:
    """The parser whose flags, types, defaults and help come from `RunConfig`'s fields."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="deepspeed trainer/run.py",
        description="Train a Mixture-of-Adapters with one domain held out, and evaluate it.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe", type=str, default=DEFAULT_RECIPE,
        help="YAML file, or a name from trainer/config/recipes/, with settings that flags override",
    )  # fmt: skip
    parser.add_class_arguments(RunConfig)
    return parser


_parser = cache(build_parser)  # a sweep reads many command lines


def parse(argv: Sequence[str]) -> RunConfig:
    """The configuration that a command line describes; `--help` prints the help and exits.

    Raises:
        ConfigError: unknown keys, values of a wrong type or out of range; all of them, one a line.
    """
    config = _read(argv)
    config.check()
    return config


def parse_without_data(argv: Sequence[str]) -> RunConfig:
    """Like `parse`, but the folder of the data may be missing."""
    config = _read(argv)
    data = replace(config.data, root=config.data.root or "none needed")
    replace(config, data=data).check()
    return config


def _read(argv: Sequence[str]) -> RunConfig:
    """The configuration, every value of its type and not yet checked further."""
    parser = _parser()
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    given, problems = _split(list(expanded(argv)))
    recipe = next((value for key, value in reversed(given) if key == "recipe"), DEFAULT_RECIPE)
    from_recipe, recipe_problems = _read_recipe(recipe)
    problems += recipe_problems
    settings = [(key, value, f" (recipe {recipe})") for key, value in from_recipe]
    settings += [(key, value, " (drawn)") for key, value in _draws(from_recipe, given)]
    settings += [(key, value, "") for key, value in given if key != "recipe"]
    texts = {key: value for key, value, _ in settings if key in TEXTS}
    settings = [setting for setting in settings if setting[0] not in TEXTS]
    namespace = _parse_at_once(parser, [(key, value) for key, value, _ in settings])
    if namespace is None:  # jsonargparse tells the first mistake only
        problems += [line for setting in settings for line in _check(parser, *setting)]
    if problems:
        raise ConfigError("\n".join(problems))
    del namespace["recipe"]
    config = parser.instantiate_classes(namespace)
    for key, value in texts.items():
        section, _, name = key.rpartition(".")
        config[section or key] = replace(config[section], **{name: value}) if section else value
    return RunConfig(**{entry.name: config[entry.name] for entry in fields(RunConfig)})


def _draws(
    from_recipe: Sequence[tuple[str, str]], given: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """What `hparams_seed` draws; settings that stand in the same place as it, or after it, win."""
    last = dict([*from_recipe, *given])
    number = last.get("hparams_seed", "0")
    if not number.isdecimal() or not int(number):
        return []
    kept = dict(given) if "hparams_seed" in dict(given) else last
    usual = flat(RunConfig())
    draws = drawn(int(number), *(last.get(name, usual[name]) for name in FACTS))
    return [(key, json.dumps(value)) for key, value in draws.items() if key not in kept]


def _parse_at_once(parser: ArgumentParser, settings: Sequence[tuple[str, str]]) -> Any:
    if not flat(RunConfig()).keys() >= {key for key, _ in settings}:
        return None
    try:
        return parser.parse_args([f"--{key}={value}" for key, value in settings])
    except ArgumentError:
        return None


def _split(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Cuts `--key value` and `--key=value` into pairs; launcher flags are dropped."""
    pairs, problems, rest = [], [], list(argv)
    while rest:
        token = rest.pop(0)
        key, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not key:
            problems.append(f"{token}: not a setting; write --section.field value")
        elif not equals and (not rest or rest[0].startswith("--")):
            problems.append(f"--{key}: no value given")
        else:
            value = value if equals else rest.pop(0)
            if key not in LAUNCHER_FLAGS:
                pairs.append((ALIASES.get(key, key), value))
    return pairs, problems


def _read_recipe(name: str) -> tuple[list[tuple[str, str]], list[str]]:
    path = Path(name) if Path(name).is_file() else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        return [], [f"--recipe: no file or recipe {name!r}{_nearest(name, known)}"]
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) or {}
        as_written = yaml.load(text, yaml.BaseLoader)  # makes nothing but texts
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return [], [f"--recipe: {path} is not YAML: {' '.join(str(error).split())}"]
    if not isinstance(content, dict):
        return [], [f"--recipe: {path} must hold `section:` with `field: value` under it"]
    if problem := repeated_key(text, ALIASES):
        return [], [f"--recipe: {path}: {problem}"]
    return list(_texts(content, dict(dotted(as_written)))), []


def _texts(content: dict[str, Any], as_written: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Settings as a command line would give them."""
    for name, value in dotted(content):
        key = ALIASES.get(name, name)
        if value is None and key in SECTIONS | TEXTS:
            continue  # not set; so is a section whose fields are all commented out
        if key in TEXTS and isinstance(text := as_written.get(name), str):
            yield key, os.path.expanduser(text)  # a number, a date or `no` is a text here, too
            continue
        if isinstance(value, bool) and key in WORDS:
            value = as_written[name]
        text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
        yield key, text.removesuffix("...\n").strip()


def _check(parser: ArgumentParser, key: str, value: str, source: str) -> list[str]:
    known = list(flat(RunConfig()))
    if key not in known:
        return [f"--{key} = {value!r}{source}: unknown setting{_nearest(key, known)}"]
    try:
        parser.parse_args([f"--{key}={value}"])
    except ArgumentError:
        kind = setting_type(key)
        hint = did_you_mean(value, [o for o in get_args(kind) if isinstance(o, str)])
        return [f"--{key} = {value!r}{source}: legal is {describe_type(kind)}{hint}"]
    return []


def _nearest(name: str, known: Sequence[str]) -> str:
    by_field = [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]]
    if by_field:
        return f"; did you mean {by_field[0]!r}?"
    return did_you_mean(name, known, f"; legal are {', '.join(known)}", cutoff=0.5)


def describe_type(kind: Any) -> str:
    """What may stand for a value of a type, in words."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(describe_type(k) for k in get_args(kind) if k is not type(None))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list [a, b, ...] of which each is {describe_type(get_args(kind)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]


def words(text: str) -> list[str]:
    """The parts of a list with commas, each once."""
    return list(dict.fromkeys(name for name in text.split(",") if name))
