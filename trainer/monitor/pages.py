"""An evaluation's pages: routing maps, heat maps, confusions, features; on the main rank."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.checkpoint.atomic_file import replaced_file
from trainer.evaluate.drawing import confusion_figure, png, printable
from trainer.monitor.curves import Curves
from trainer.monitor.heat_maps import expert_heat_maps, mutual_information
from trainer.monitor.insight import Insight, Seen
from trainer.monitor.routing_maps import Shown, layer_title, routing_figure

CONFUSED = 15
"""Pairs on the text page of confusions."""
SPRITE = 48
"""Largest side of an image in the projector."""


@dataclass(frozen=True)
class Pages:
    """Draws what `insight` has seen.

    Attributes:
        ranks: of the experts, for the legend.
        routing_file: where the routing map of the best adapter so far is saved.
    """

    curves: Curves
    insight: Insight
    ranks: tuple[int, ...]
    routing_file: Path

    def add(self, step: int, seen: Seen, best: bool) -> None:
        """Adds the pages of the evaluation after `step`; `best` if its adapter is so far."""
        if seen.layers and float(seen.counts.sum()) > 0:
            self._routing(step, seen, best)
            self._heat_maps(step, seen)
        if int(seen.confusion.sum()):
            self._confusions(step, seen)
        if seen.features is not None:
            self._projector(step, seen.features)

    def _routing(self, step: int, seen: Seen, best: bool) -> None:
        embedding = getattr(self.insight.model, "patch_embed", None)
        height, width = getattr(embedding, "grid_size", None) or (0, 0)
        # What stands before the patches are class and register tokens.
        maps = {
            layer: experts[:, -height * width :].reshape(-1, height, width).numpy()
            for layer, experts in seen.maps.items()
            if experts.shape[1] >= height * width > 0
        }
        if not maps:
            return
        fixed, index = self.insight.mapped, self.insight.evaluator.index
        pixels = self._unit(fixed.images).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
        shown = [
            Shown(image, index.domains[env], index.classes[label], env in seen.withheld)
            for image, env, label in zip(pixels, fixed.domains, fixed.labels, strict=True)
        ]
        experts = [f"expert {e}, rank {rank}" for e, rank in enumerate(self.ranks)]
        title = f"Which expert each patch goes to, after step {step}"
        picture = png(routing_figure(shown, maps, experts, title))
        self.curves.picture("routing/maps", picture, step)
        if best:
            with replaced_file(self.routing_file) as temporary:
                temporary.write_bytes(picture)

    def _unit(self, images: Tensor) -> Tensor:
        """Images as they were before normalisation, in [0, 1]."""
        data = self.insight.evaluator.data_config
        mean, std = (torch.tensor(data[name]).view(3, 1, 1) for name in ("mean", "std"))
        return (images * std + mean).clamp(0, 1)

    def _heat_maps(self, step: int, seen: Seen) -> None:
        counts, index = seen.counts.cpu().numpy(), self.insight.evaluator.index
        titles = [" ".join(layer_title(layer)) for layer in seen.layers]
        domains = list(index.domains)
        for env in seen.withheld:
            domains[env] += " (held out)"
        for what, tables, names in (
            ("domain", counts.sum(2), domains),
            ("class", counts.sum(1), index.classes),
        ):
            picture = expert_heat_maps(tables, titles, names, f"Experts by {what}")
            self.curves.picture(f"routing/expert_by_{what}", png(picture), step)
            bits = {
                f"router/{layer}/bits_{what}": mutual_information(table)
                for layer, table in zip(seen.layers, tables, strict=True)
            }
            self.curves.scalars(bits, step)

    def _confusions(self, step: int, seen: Seen) -> None:
        confusion, index = seen.confusion.cpu().numpy(), self.insight.evaluator.index
        domain, classes = index.domains[seen.withheld[0]], index.classes
        right = 100 * confusion.trace() / confusion.sum()
        matrices = {f"{domain} (held out): {right:.1f} % right": confusion}
        title = f"Predicted class by true class, after step {step}"
        picture = png(confusion_figure(matrices, classes, title))
        self.curves.picture("confusion/held_out", picture, step)
        wrong = confusion * (1 - np.eye(len(classes), dtype=np.int64))
        rows = ["| true | predicted | images | of the class |", "|---|---|---|---|"]
        for place in np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED]:
            true, said = divmod(int(place), len(classes))
            if number := int(wrong[true, said]):
                share = 100 * number / int(confusion[true].sum())
                rows.append(f"| {classes[true]} | {classes[said]} | {number} | {share:.0f} % |")
        self.curves.writer.add_text("confusion/most_frequent", "\n".join(rows), step)

    def _projector(self, step: int, features: Tensor) -> None:
        fixed = self.insight.projected
        rows = 1 + math.isqrt(len(features) - 1)  # of the sprite, which is at most 8192 high
        side = min(SPRITE, fixed.images.shape[-1], 8192 // rows)
        sprites = F.interpolate(self._unit(fixed.images), (side, side), mode="area")
        index, withheld = self.insight.evaluator.index, self.insight.withheld
        labels = [
            [
                printable(index.domains[e]), "held out" if e in withheld else "source",
                printable(index.classes[label]),
            ]
            for e, label in zip(fixed.domains, fixed.labels, strict=True)
        ]  # fmt: skip
        self.curves.projector(features, labels, sprites, step)
