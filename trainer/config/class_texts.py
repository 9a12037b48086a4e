"""What text encoders read: class names in words, and the templates that make sentences of them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from trainer.config.repeated_keys import repeated_key
from trainer.process.errors import ConfigError

FOLDER = Path(__file__).resolve().parent
PHOTO = "photo"
"""The usual single template."""


def known_words(dataset: str) -> dict[str, str]:
    """Words of the classes whose folder names mislead (`class_names.yaml`)."""
    content = yaml.safe_load((FOLDER / "class_names.yaml").read_text(encoding="utf-8"))
    return dict(content.get(dataset, {}))


def in_words(name: str) -> str:
    """A folder's name as words: separators become spaces, a leading number or article goes.

    `003.backpack` -> `backpack`, `Alarm_Clock` -> `alarm clock`, `The_Big_Ben` -> `big ben`.
    """
    words = re.sub(r"^\d+[._\- ]+", "", name.strip())
    words = " ".join(re.sub(r"[_\s]+", " ", words).split()).lower()
    return words.removeprefix("the ") or name


def spoken_names(
    classes: Sequence[str], dataset: str, replaced: Mapping[str, str] | None = None
) -> list[str]:
    """Words for every class of a dataset, given by its folder's name in label order.

    Raises `ConfigError`: `replaced` names no class, or two classes would read the same.
    """
    known = known_words(dataset) | dict(replaced or {})
    if unknown := sorted(set(replaced or {}) - set(classes)):
        raise ConfigError(f"model.class_names: {unknown[0]!r} is no class of the data")
    names = [known.get(name) or in_words(name) for name in classes]
    for place, name in enumerate(names):
        if (first := names.index(name)) != place:
            raise ConfigError(
                f"model.class_names: {classes[first]!r} and {classes[place]!r} would both be "
                f"called {name!r}; tell them apart in a YAML file given as --model.class_names"
            )
    return names


def read_class_names(path: str | None) -> dict[str, str]:
    """A YAML file of `class: words`; empty without one.

    Raises `ConfigError`: it cannot be read, or holds something else.
    """
    if path is None:
        return {}
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"model.class_names: {path!r} cannot be read ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise ConfigError(f"model.class_names: {path!r} must hold lines of `class: words`")
    if problem := repeated_key(text):
        raise ConfigError(f"model.class_names: {path!r}: {problem}")
    return {str(name): words for name, words in content.items()}


def shipped() -> list[str]:
    """Names that need no file of the user's."""
    return [PHOTO, *sorted(path.stem for path in FOLDER.glob("templates/*.txt"))]


def is_template(line: str) -> bool:
    """Whether it has one `{}`, for the class name, and nothing else that would be filled in."""
    return line.count("{}") == line.count("{") == line.count("}") == 1


def read_templates(prompts: str) -> tuple[str, ...]:
    """The templates of `model.prompts`: a template itself, a shipped name, or a file's lines.

    In a file, empty lines and lines that begin with # do not count.

    Raises `ConfigError`: there is no such file, or a template does not have one `{}`.
    """
    if "{" in prompts:
        lines = [prompts]
    elif prompts == PHOTO:
        lines = ["a photo of a {}."]
    else:
        file = FOLDER / f"templates/{prompts}.txt" if prompts in shipped() else Path(prompts)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"model.prompts: {prompts!r} cannot be read; legal are {', '.join(shipped())}, a "
                "file with one template a line, or a template such as 'a photo of a {}.'"
            ) from error
        lines = [line for line in map(str.strip, text.splitlines()) if line and line[0] != "#"]
    for line in lines:
        if not is_template(line):
            raise ConfigError(f"model.prompts: {line!r} must hold {{}} once, for the class name")
    if not lines:
        raise ConfigError(f"model.prompts: {prompts!r} holds no template")
    return tuple(lines)
