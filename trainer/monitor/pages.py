"""An evaluation's pages: routing maps, heat maps, confusions, features; on the main rank."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from shards import ShardIndex
from trainer.checkpoint.atomic_file import replaced_file
from trainer.evaluate.fixed_images import FixedImages
from trainer.monitor.curves import Curves
from trainer.monitor.insight import Insight, Seen
from trainer.monitor.pictures.drawing import Picture, layer_title
from trainer.monitor.pictures.heat_maps import confusion_picture, expert_heat_maps
from trainer.monitor.pictures.information import mutual_information
from trainer.monitor.pictures.routing_maps import Shown, routing_picture

CONFUSED = 15
"""Pairs on the text page of confusions."""
SPRITE = 48
"""Largest side of an image in the projector."""


class Pages:
    """Draws what `Insight` has seen.

    Args:
        curves: TensorBoard.
        insight: where the fixed images are from.
        ranks: of the experts, for the legend.
        routing_file: where the routing map of the best adapter so far is saved.
    """

    def __init__(
        self, curves: Curves, insight: Insight, ranks: tuple[int, ...], routing_file: Path
    ) -> None:
        self.curves, self.insight, self.ranks = curves, insight, ranks
        self.routing_file = routing_file
        self.index: ShardIndex = insight.evaluator.index

    def add(self, step: int, seen: Seen, best: bool) -> None:
        """Adds the pages of one evaluation.

        Args:
            step: the step evaluated.
            seen: what all ranks saw together.
            best: whether its adapter is the best so far.
        """
        if seen.layers and float(seen.counts.sum()) > 0:
            self._routing(step, seen, best)
            self._heat_maps(step, seen)
        if int(seen.confusion.sum()):
            self._confusions(step, seen)
        if seen.features is not None:
            self._projector(step, seen.features)

    def _routing(self, step: int, seen: Seen, best: bool) -> None:
        fixed = self.insight.mapped
        height, width = self._grid()
        # What stands before the patches are class and register tokens.
        maps = {
            layer: experts[:, -height * width :].reshape(-1, height, width).numpy()
            for layer, experts in seen.maps.items()
            if experts.shape[1] >= height * width > 0
        }
        shown = [
            Shown(pixels, self.index.domains[env], self.index.classes[label], env in seen.withheld)
            for pixels, env, label in zip(
                self._pixels(fixed), fixed.domains, fixed.labels, strict=True
            )
        ]
        if not maps:
            return
        experts = [f"expert {e}, rank {rank}" for e, rank in enumerate(self.ranks)]
        title = f"Which expert each patch goes to, after step {step}"
        picture = routing_picture(shown, maps, experts, title)
        self.curves.picture("routing/maps", picture, step)
        if best:
            save_picture(picture, self.routing_file)

    def _grid(self) -> tuple[int, int]:
        """Rows and columns of patches; (0, 0) if the backbone does not say."""
        embedding = getattr(self.insight.model, "patch_embed", None)
        height, width = getattr(embedding, "grid_size", None) or (0, 0)
        return int(height), int(width)

    def _pixels(self, fixed: FixedImages) -> list[Picture]:
        """uint8 [H, W, 3] of every image, from before it was normalised."""
        images = self._unit(fixed.images).mul(255).round().to(torch.uint8)
        return [image.permute(1, 2, 0).numpy() for image in images]

    def _unit(self, images: Tensor) -> Tensor:
        data = self.insight.evaluator.data_config
        mean, std = (torch.tensor(data[name]).view(3, 1, 1) for name in ("mean", "std"))
        return (images * std + mean).clamp(0, 1)

    def _heat_maps(self, step: int, seen: Seen) -> None:
        counts = seen.counts.cpu().numpy()
        by = {"domain": counts.sum(2), "class": counts.sum(1)}
        names = {"domain": list(self.index.domains), "class": list(self.index.classes)}
        for env in seen.withheld:
            names["domain"][env] += " (held out)"
        titles = [layer_title(layer) for layer in seen.layers]
        for what, tables in by.items():
            picture = expert_heat_maps(tables, titles, names[what], f"Experts by {what}")
            self.curves.picture(f"routing/expert_by_{what}", picture, step)
            bits = {
                f"router/{layer}/bits_{what}": mutual_information(table)
                for layer, table in zip(seen.layers, tables, strict=True)
            }
            self.curves.scalars(bits, step)

    def _confusions(self, step: int, seen: Seen) -> None:
        confusion = seen.confusion.cpu().numpy()
        domain, classes = self.index.domains[seen.withheld[0]], self.index.classes
        right = 100 * confusion.trace() / confusion.sum()
        title = f"{domain} (held out): {right:.1f} % right"
        picture = confusion_picture(confusion.astype(float), classes, title)
        self.curves.picture("confusion/held_out", picture, step)
        wrong = confusion * (1 - np.eye(len(classes), dtype=np.int64))
        rows = ["| true | predicted | images | of the class |", "|---|---|---|---|"]
        for place in np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED]:
            true, said = divmod(int(place), len(classes))
            if number := int(wrong[true, said]):
                share = 100 * number / int(confusion[true].sum())
                rows.append(f"| {classes[true]} | {classes[said]} | {number} | {share:.0f} % |")
        self.curves.text("confusion/most_frequent", "\n".join(rows), step)

    def _projector(self, step: int, features: Tensor) -> None:
        fixed = self.insight.projected
        rows = 1 + math.isqrt(len(features) - 1)  # of the sprite, which is at most 8192 high
        side = min(SPRITE, fixed.images.shape[-1], 8192 // rows)
        sprites = F.interpolate(self._unit(fixed.images), (side, side), mode="area")
        labels = [
            (
                self.index.domains[env],
                "held out" if env in self.insight.withheld else "source",
                self.index.classes[label],
            )
            for env, label in zip(fixed.domains, fixed.labels, strict=True)
        ]
        self.curves.projector(features, labels, sprites, step)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all; its few colours make a palette do."""
    with replaced_file(path) as temporary:
        picture.quantize(255).save(temporary, format="PNG", optimize=True)
