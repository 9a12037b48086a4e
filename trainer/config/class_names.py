"""Class names in words, as one would write them in a caption: `hot_air_balloon`, `Postit_Notes`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from trainer.process.errors import ConfigError

# Where the folder's name is not what the pictures show, or not a word. Everything else follows
# from `in_words`.
SPOKEN: dict[str, dict[str, str]] = {
    "digits": dict(
        zip(
            "0123456789",
            ("digit zero", "digit one", "digit two", "digit three", "digit four",
             "digit five", "digit six", "digit seven", "digit eight", "digit nine"),
            strict=True,
        )
    ),
    "pacs": {},
    "vlcs": {},
    "officehome": {
        "Bike": "bicycle",
        "Clipboards": "clipboard",
        "Drill": "power drill",
        "Exit_Sign": "exit sign",
        "Fan": "electric fan",
        "Flipflops": "flip-flops",
        "Folder": "folder for papers",
        "Glasses": "eyeglasses",
        "Keyboard": "computer keyboard",
        "Marker": "marker pen",
        "Monitor": "computer monitor",
        "Mouse": "computer mouse",
        "Pan": "frying pan",
        "Postit_Notes": "sticky notes",
        "Soda": "can of soda",
        "Speaker": "loudspeaker",
        "TV": "television",
    },
    "terraincognita": {"empty": "natural scene without animals"},
    "domainnet": {
        "The_Eiffel_Tower": "Eiffel Tower",
        "The_Great_Wall_of_China": "Great Wall of China",
        "The_Mona_Lisa": "Mona Lisa",
        "bottlecap": "bottle cap",
        "bowtie": "bow tie",
        "firetruck": "fire truck",
        "flip_flops": "flip-flops",
        "house_plant": "houseplant",
        "rollerskates": "roller skates",
        "see_saw": "seesaw",
        "t-shirt": "T-shirt",
        "teddy-bear": "teddy bear",
        "waterslide": "water slide",
    },
}  # fmt: skip
"""Dataset -> class -> words."""


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
    """Words for every class of a dataset.

    Args:
        classes: folder names in label order.
        dataset: the dataset's name.
        replaced: words of one's own for some classes.

    Raises:
        ConfigError: `replaced` names no class, or two classes would read the same.
    """
    known = SPOKEN.get(dataset, {}) | dict(replaced or {})
    unknown = sorted(set(replaced or {}) - set(classes))
    if unknown:
        raise ConfigError(f"model.class_names: {unknown[0]!r} is no class of the data")
    names = [known.get(name) or in_words(name) for name in classes]
    for place, name in enumerate(names):
        first = names.index(name)
        if first != place:
            raise ConfigError(
                f"model.class_names: {classes[first]!r} and {classes[place]!r} would both be "
                f"called {name!r}; tell them apart in a YAML file given as --model.class_names"
            )
    return names


def read_class_names(path: str | None) -> dict[str, str]:
    """A YAML file of `class: words`; empty without one.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"model.class_names: {path!r} cannot be read ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise ConfigError(f"model.class_names: {path!r} must hold lines of `class: words`")
    return {str(name): words for name, words in content.items()}
