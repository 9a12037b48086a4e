"""Debian's icon themes as a set for domain generalisation: the same things by different artists.

A theme is a domain; the beginning of an icon's name, which freedesktop.org's naming specification
gives a meaning, is its class. Writes `FOLDER/images` (64 px, on white) and `FOLDER/shards`.
"""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from drawings import Drawing, distinct, drawings, fingerprint, on_background, picture
from PIL import Image
from tabulate import tabulate

from shards import writer

THEMES = Path("/usr/share/icons")
DOMAINS = {
    "papirus": "Papirus",
    "breeze": "breeze",
    "oxygen": "oxygen",
    "elementary": "elementary-xfce",
    "mate": "mate",
    "faenza": "Faenza",
}
"""Name of the domain -> folder of the theme. Of equal pictures the first domain keeps its own."""
PACKAGES = (
    "papirus-icon-theme breeze-icon-theme oxygen-icon-theme elementary-xfce-icon-theme "
    "mate-icon-theme faenza-icon-theme"
)
CLASSES = (
    "application-x", "applications", "audio", "battery", "document", "drive", "edit", "emblem",
    "folder", "format", "go", "image", "mail", "media", "network", "system", "text", "user",
    "view", "weather",
)  # fmt: skip
"""Class and first words of its icons' names: `go` has `go` and `go-up`, not `google`."""
MOST = 60
"""Pictures of one class in one domain; papirus has 2,000 folders."""


def class_of(name: str) -> str | None:
    """The class of an icon by its name."""
    return next((c for c in CLASSES if name == c or name.startswith(f"{c}-")), None)


@dataclass
class Found:
    """Pictures by domain, class and name, and how many were left out for which reason."""

    pictures: dict[tuple[str, str, str], Image.Image] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    seen: dict[str, str] = field(default_factory=dict)
    """Hash of every picture of these names, left out or not, and its domain."""


def collect(themes: Path, domains: Mapping[str, str], most: int) -> Found:
    """The pictures of a set, each once."""
    found = Found()
    for domain, folder in domains.items():
        counts: Counter[str] = Counter()
        # Aliases last, and else in an order that takes from the whole alphabet.
        for drawing in sorted(chosen(drawings(themes / folder)), key=_shuffled):
            kind = class_of(drawing.name)
            assert kind is not None
            drawn = picture(drawing.path)
            shown = on_background(drawn) if drawn else None
            if shown is None:
                found.left_out["not readable" if drawn is None else "nothing to be seen"] += 1
                continue
            code = fingerprint(shown)
            if owner := found.seen.get(code):
                where = "the same theme" if owner == domain else "another theme"
                found.left_out[f"pixels as in {where}"] += 1
                continue
            found.seen[code] = domain
            if counts[kind] == most:
                found.left_out[f"beyond {most} of a class in a theme"] += 1
            else:
                found.pictures[domain, kind, drawing.name] = shown
                counts[kind] += 1
    return found


def chosen(found: list[Drawing]) -> list[Drawing]:
    """Drawings whose names have a class; an alias only of what has none itself."""
    return [
        drawing
        for drawing in distinct([d for d in found if class_of(d.name)])
        if drawing.name == drawing.own_name or not class_of(drawing.own_name)
    ]


def _shuffled(drawing: Drawing) -> tuple[bool, str]:
    digest = hashlib.sha256(drawing.name.encode()).hexdigest()
    return drawing.name != drawing.own_name, digest


def table(found: Found) -> str:
    """Classes x domains, with sums."""
    counts = Counter((kind, domain) for domain, kind, _ in found.pictures)
    domains = list(dict.fromkeys(domain for domain, _, _ in found.pictures))
    names = [*CLASSES, "all"]
    rows = [
        [sum(counts[k, d] for k in (CLASSES if name == "all" else [name])) for d in domains]
        for name in names
    ]
    full = [[name, *row, sum(row)] for name, row in zip(names, rows, strict=True)]
    return tabulate(full, ["class", *domains, "all"], tablefmt="github")


def check_themes(
    parser: argparse.ArgumentParser, themes: Path, needed: Iterable[str], packages: str
) -> None:
    """Ends the program with a line if themes are missing."""
    if missing := [name for name in needed if not (themes / name).is_dir()]:
        parser.error(
            f"--themes {themes}: no folder {', '.join(missing)}; "
            f"apt-get install --no-install-recommends {packages}"
        )


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of images and shards")
    parser.add_argument("--themes", type=Path, default=THEMES, help="default: %(default)s")
    parser.add_argument("--most", type=int, default=MOST, help="of a class in a theme; %(default)s")
    args = parser.parse_args(argv)
    check_themes(parser, args.themes, DOMAINS.values(), PACKAGES)
    images = args.out / "images"
    if images.exists():
        parser.error(f"--out {args.out}: {images} is there already; remove it, or name another")
    found = collect(args.themes, DOMAINS, args.most)
    for (domain, kind, name), shown in found.pictures.items():
        path = images / domain / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shown.save(path)
    sys.stdout.write(f"{table(found)}\n\nleft out: ")
    sys.stdout.write(", ".join(f"{n} ({why})" for why, n in found.left_out.items()) + "\n")
    return writer.main(
        ["--root", str(images), "--out", str(args.out / "shards"), "--name", "icons", "--verify"]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
