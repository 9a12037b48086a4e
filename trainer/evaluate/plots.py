"""Pictures of an evaluation: accuracies, confusion matrices and reliability diagrams by domain."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from trainer.evaluate.drawing import confusion_figure, literally, png, printable
from trainer.evaluate.job import Evaluation
from trainer.evaluate.predictions import Figures, total


@literally
def save_pictures(found: Evaluation, titles: Mapping[int, str], folder: Path) -> None:
    """Writes `accuracy.png` of all results; `confusion.png`, `reliability.png` of that asked for.

    Of alphas `accuracy.png` is the curve. Domains are named by `titles`; the folder exists.
    """
    titles = {env: printable(title) for env, title in titles.items()}
    label = found.asked
    shown = {}
    for env, title in titles.items():
        splits = found.shown_splits(env)
        figures = total([found.results[label][env, split] for split in splits])
        shown[f"{title}, {' + '.join(splits)}: {100 * figures.accuracy:.1f} %"] = figures
    confusions = {title: figures.confusion for title, figures in shown.items()}
    classes, called = found.data.index.classes, found.titled(label)
    what = f"{called}: predicted class by true class"
    pictures = {
        "accuracy": (_curve if found.alphas else _accuracies)(found, titles),
        "confusion": confusion_figure(confusions, classes, what),
        "reliability": _reliabilities(shown, f"{called}: accuracy by confidence"),
    }
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(png(picture))


def _shown_accuracy(found: Evaluation, label: str, env: int) -> float:
    """In per cent, over the splits that pictures show of a domain."""
    cells = found.results[label]
    return 100 * total([cells[env, split] for split in found.shown_splits(env)]).accuracy


def _curve(found: Evaluation, titles: Mapping[int, str]) -> Figure:
    """A line for each domain over the alphas; the chosen one is marked."""
    figure = Figure(figsize=(6, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    points = sorted(zip(found.alphas, found.results, strict=True))
    alphas = [alpha for alpha, _ in points]
    for env, title in titles.items():
        heights = [_shown_accuracy(found, label, env) for _, label in points]
        axes.plot(alphas, heights, marker="o", label=title)
    axes.plot(
        alphas, [100 * found.validation(label) for _, label in points], color="black",
        linestyle="--", label="validation (mean of the sources' out)",
    )  # fmt: skip
    chosen = next(alpha for alpha, label in points if label == found.asked)
    axes.axvline(chosen, color="grey", linewidth=1)
    axes.set_xlabel(f"alpha ({chosen:g} is chosen by validation)")
    axes.set_ylabel("accuracy %")
    axes.set_title(found.titled(found.shown_images()), fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _accuracies(found: Evaluation, titles: Mapping[int, str]) -> Figure:
    width = 0.8 / len(found.results)
    inches = min(18, 2.5 + 0.45 * len(titles) * (len(found.results) + 1))
    figure = Figure(figsize=(inches, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, label in enumerate(found.results):
        heights = [_shown_accuracy(found, label, env) for env in titles]
        places = np.arange(len(titles)) + (number - (len(found.results) - 1) / 2) * width
        axes.bar(places, heights, width, label=label)
    names = [title.replace(" (", "\n(", 1) for title in titles.values()]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("accuracy %")
    axes.set_title(found.titled(found.shown_images()), fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=min(4, len(found.results)), fontsize=8)
    return figure


def _reliabilities(shown: Mapping[str, Figures], title: str) -> Figure:
    """A panel for each domain."""
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4 * columns, 3.9 * rows + 0.4), dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (name, figures) in zip(panels.flat, shown.items(), strict=False):
        bins = figures.reliability
        width = 1 / len(bins.samples)
        axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
        bars = axes.bar(width * np.arange(len(bins.samples)), bins.accuracy, width, align="edge")
        for bar, weight in zip(bars, bins.samples / max(1, bins.samples.max()), strict=True):
            bar.set_alpha(0.25 + 0.75 * weight)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(f"confidence (ECE {100 * figures.ece:.1f} %)", fontsize=8)
        axes.set_ylabel("accuracy", fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure
