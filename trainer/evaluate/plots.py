"""Pictures of an evaluation: accuracies, confusion matrices and reliability diagrams by domain."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.evaluate.figures import Figures, total
from trainer.evaluate.job import Evaluation

NAMED_CLASSES = 30
"""Up to this many classes, the axes of a confusion matrix name them."""


def save_pictures(found: Evaluation, titles: Mapping[int, str], folder: Path) -> list[Path]:
    """Writes `accuracy.png` of all results, `confusion.png` and `reliability.png` of the last.

    Args:
        found: the evaluation.
        titles: how each domain is named.
        folder: an existing folder.
    """
    import matplotlib as mpl

    mpl.use("agg")
    label = next(reversed(found.results))
    shown = {}
    for env, title in titles.items():
        splits = found.shown_splits(env)
        parts = [found.results[label][env, split] for split in splits]
        shown[f"{title}, {' + '.join(splits)}"] = total(parts)
    classes = list(found.job.data.index.classes)
    return [
        _accuracies(found, titles, folder / "accuracy.png"),
        _panels(
            shown, f"{label}: chosen class by true class, share of each row",
            folder / "confusion.png", lambda axes, figures: _confusion(axes, figures, classes),
        ),
        _panels(
            shown, f"{label}: accuracy by confidence", folder / "reliability.png", _reliability
        ),
    ]  # fmt: skip


def _accuracies(found: Evaluation, titles: Mapping[int, str], path: Path) -> Path:
    import matplotlib.pyplot as plt

    width = 0.8 / len(found.results)
    figure, axes = plt.subplots(
        figsize=(min(18, 2.5 + 0.45 * len(titles) * (len(found.results) + 1)), 4.2),
        layout="constrained",
    )
    for number, (label, cells) in enumerate(found.results.items()):
        heights = [
            100 * total([cells[env, split] for split in found.shown_splits(env)]).accuracy
            for env in titles
        ]
        places = np.arange(len(titles)) + (number - (len(found.results) - 1) / 2) * width
        axes.bar(places, heights, width, label=label)
    axes.set_xticks(range(len(titles)), [_wrapped(title) for title in titles.values()])
    axes.set_ylabel("accuracy %")
    axes.set_title(found.shown_images(), fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=min(4, len(found.results)), fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _wrapped(title: str) -> str:
    return title.replace(" (", "\n(", 1)


def _panels(
    shown: Mapping[str, Figures], title: str, path: Path, draw: Callable[[Any, Figures], None]
) -> Path:
    """One panel for each domain."""
    import matplotlib.pyplot as plt

    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4 * columns, 3.9 * rows + 0.4), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (name, figures) in zip(panels.flat, shown.items(), strict=False):
        axes.set_title(f"{name}: {100 * figures.accuracy:.1f} %", fontsize=9)
        draw(axes, figures)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _confusion(axes: Any, figures: Figures, classes: list[str]) -> None:
    share = figures.confusion / np.maximum(1, figures.confusion.sum(1, keepdims=True))
    axes.imshow(share, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    if len(classes) <= NAMED_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
        axes.set_yticks(range(len(classes)), classes, fontsize=7)
    axes.set_xlabel("chosen", fontsize=8)
    axes.set_ylabel("true", fontsize=8)


def _reliability(axes: Any, figures: Figures) -> None:
    bins = figures.reliability
    edges = np.linspace(0, 1, len(bins.samples) + 1)
    width = 1 / len(bins.samples)
    weight = bins.samples / max(1, bins.samples.max())
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    for left, height, full in zip(edges[:-1], bins.accuracy, weight, strict=True):
        axes.bar(left, height, width, align="edge", color="C0", alpha=0.25 + 0.75 * full)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel(f"confidence (ECE {100 * figures.ece:.1f} %)", fontsize=8)
    axes.set_ylabel("accuracy", fontsize=8)
