"""What a page tells of a run beside its results: command, curves, confusion, routing map.

Run folders come from anybody: only regular files within them are read, each once and up to a size,
and what is not as a trainer writes it is left out.
"""

import io
import json
import math
import shlex
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from moa.files.markdown import visible
from shards.addresses import without_secrets
from trainer.evaluate.selection import validation_accuracy
from trainer.report.runs import Run

POINTS = 80
"""Most points of a curve."""
LINE = 2**20
"""Longest line, in bytes, that is read of a JSON-lines file."""
MOST_BYTES = 32 * 2**20
MOST_PIXELS = 40_000_000
MOST_CLASSES = 1000
WIDTH = 520
"""Pixels of a routing map on the page."""
BAD = (OSError, ValueError, TypeError, KeyError, LookupError, AttributeError, OverflowError,
       RecursionError, ZeroDivisionError)  # fmt: skip
"""What files written by something else can raise."""

Curve = list[tuple[int, float]]
"""(step, value) in order."""


@dataclass(frozen=True)
class Confusion:
    """Of a run's held-out domain: int64 [C, C], true class by row, and the C classes' names."""

    counts: npt.NDArray[np.int64]
    classes: tuple[str, ...]


def own_file(folder: Path, name: str) -> Path | None:
    """A regular file that lies in the folder itself, no link to elsewhere; None without one."""
    try:
        path = (folder / name).resolve()
        inside = path.is_file() and path.is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link that leads to itself
        return None
    return path if inside else None


def _content(folder: Path, name: str) -> bytes | None:
    path = own_file(folder, name)
    if path is None or path.stat().st_size > MOST_BYTES:
        return None
    return path.read_bytes()


def environment(folder: Path) -> tuple[str, str]:
    """The command that made a run, without secrets, and the commit of its code; "" if unknown."""
    try:
        content = json.loads(_content(folder, "environment.json") or b"{}")
        command, commit = content.get("command", []), content.get("git_commit", "")
        words = [without_secrets(str(word)) for word in command]
        return shlex.join(["python", *words]) if words else "", str(commit)
    except BAD:
        return "", ""


def curve(path: Path | None, value: Callable[[Mapping[str, Any]], float]) -> Curve:
    """Finite values of some rows of a JSON-lines file, evenly spread over its bytes."""
    found: dict[int, float] = {}
    if path is None:
        return []
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            for place in range(POINTS):
                at = size * place // POINTS
                file.seek(max(0, at - 1))
                if at:
                    file.readline(LINE)
                _add(found, file.readline(LINE), value)
    except OSError:
        return []
    return sorted(found.items())


def _add(found: dict[int, float], line: bytes, value: Callable[[Mapping[str, Any]], float]) -> None:
    try:
        row = json.loads(line)
        step, number = int(row["step"]), float(value(row))
    except BAD:
        return
    if math.isfinite(number):
        found[step] = number


def loss(run: Run) -> Curve:
    """The training loss."""
    return curve(own_file(run.folder, "metrics.jsonl"), lambda row: row["loss"])


def validation(run: Run) -> Curve:
    """Mean `out` accuracy of the sources: of all evaluations, or those that are complete."""
    every = own_file(run.folder, "evaluations.jsonl")
    found = curve(every, lambda row: validation_accuracy(row, run.held_out))
    if found:
        return found
    rows = run.rows[:: -(-len(run.rows) // POINTS)]
    return [(int(row["step"]), validation_accuracy(row, run.held_out)) for row in rows]


def confusion(run: Run) -> Confusion | None:
    """Of the last result in `evaluation.json` of the folder or of one below; None without one."""
    try:
        below = sorted(path.name for path in run.folder.iterdir() if path.is_dir())
        for name in ("evaluation.json", *(f"{inner}/evaluation.json" for inner in below)):
            if (text := _content(run.folder, name)) is not None:
                return _of_held_out(json.loads(text), run.domains[run.held_out[0]])
    except BAD:
        pass
    return None


def _of_held_out(content: Any, domain: str) -> Confusion | None:
    classes = tuple(map(str, content["classes"]))
    by_domain = list(content["results"].values())[-1]
    splits = {visible(name): splits for name, splits in by_domain.items()}[domain]
    parts = [np.asarray(splits[s]["confusion"]) for s in ("in", "out", "all") if s in splits]
    side = len(classes)
    for part in parts:
        if part.shape != (side, side) or part.dtype.kind != "i" or part.min() < 0:
            return None
    if not parts or side > MOST_CLASSES:
        return None
    return Confusion(np.sum(parts, axis=0), classes)


def routing(run: Run) -> bytes | None:
    """The routing map as a small PNG, drawn anew from its pixels; None without one."""
    try:
        content = _content(run.folder, "routing.png")
        if content is None:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
                if math.prod(picture.size) > MOST_PIXELS:
                    return None
                small = picture.convert("RGB")
        small.thumbnail((WIDTH, 4 * WIDTH))
        file = io.BytesIO()
        small.quantize(128).save(file, "PNG", optimize=True)
        return file.getvalue()
    except (*BAD, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None  # of a damaged PNG, PIL raises a SyntaxError
