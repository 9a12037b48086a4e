"""What an evaluation shows besides accuracy: who routes what where, and which classes are confused.

Every rank takes part. What is counted is summed over the ranks in one collective; the few fixed
images are seen by every rank in the same batches, so that whatever holds the weights (ZeRO-3,
expert parallelism) finds all ranks at the same place. Only the main rank looks at the result.

Letters: L layers that route, D domains, C classes, E experts, N images, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

import moa
from moa.layers.layer import moa_layers
from moa.layers.router import TokenRouter
from moa.model.injection import classifier
from trainer.evaluate.evaluator import Evaluator, evaluating
from trainer.evaluate.fixed_images import FixedImages, fixed_images

MAPPED = 8
"""Images on the routing maps, at least one of each domain."""
PROJECTED = 600
"""Points of the embedding projector, evenly over the domains; at most as many as its sprite holds
comfortably."""


@dataclass
class Seen:
    """What one evaluation showed.

    Attributes:
        withheld: numbers of the domains that are not trained on, the target first.
        layers: paths of the layers that route.
        counts: float64 [L, D, C, E] tokens by expert; a token that several experts share counts
            with its gates' shares.
        confusion: int64 [C, C] images of the target domain, true class first.
        maps: layer path -> int64 [N, T] strongest expert of each token of the mapped images.
        features: float32 [N, F], what the classifier gets to see of the projected images; None if
            they were not looked at.
        routes: what the forward just done left.
        evaluator: what it evaluates is counted here.
    """

    evaluator: Evaluator
    withheld: Sequence[int]
    layers: list[str]
    counts: Tensor
    confusion: Tensor
    maps: dict[str, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    routes: dict[str, Tensor] = field(default_factory=dict)

    def note(self, env: int, labels: Tensor, scores: Tensor) -> None:
        """Counts a batch that the model has just seen; see `Evaluator.note`."""
        if env == self.withheld[0]:
            places = labels * self.confusion.shape[1] + scores.argmax(1)
            self.confusion.view(-1).index_add_(0, places, torch.ones_like(places))
        for layer, counts in zip(self.layers, self.counts, strict=True):
            gates = self.routes[layer].flatten(1, -2)  # [b, T, E]
            shares = (gates / gates.sum(-1, keepdim=True)).sum(1)  # each token counts as one
            counts[env].index_add_(0, labels, shares.to(counts.dtype))


class Insight:
    """Looks over an evaluator's shoulder.

    Args:
        model: the model itself, not an engine's wrapper.
        withheld: numbers of the domains that are not trained on, the target first.
        last: the last step, after which the features are looked at as well.
    """

    def __init__(
        self, evaluator: Evaluator, model: nn.Module, withheld: Sequence[int], last: int
    ) -> None:
        self.evaluator, self.model = evaluator, model
        self.withheld, self.last = withheld, last

    @contextmanager
    def watching(self, forward: nn.Module, step: int) -> Iterator[Seen]:
        """Within the block, what `Seen.evaluator` evaluates is counted; a collective at its end.

        An error leaves the block without that collective, so it must meet all ranks. `forward`
        calls the model: an engine's wrapper, or the model itself.
        """
        seen = self._unseen()
        with moa.recorded_routes(self.model) as seen.routes:
            seen.evaluator = replace(self.evaluator, note=seen.note)
            yield seen
            counts, confusion = seen.counts, seen.confusion
            both = torch.cat([counts.flatten(), confusion.flatten().to(counts.dtype)])
            total = self.evaluator.sum_over_ranks(both)
            seen.counts = total[: counts.numel()].view_as(counts)
            seen.confusion = total[counts.numel() :].view_as(confusion).to(confusion.dtype)
            with evaluating(forward):
                self._look(forward, seen, step == self.last)
        seen.routes = {}

    def _unseen(self) -> Seen:
        found = moa_layers(self.model)
        routed = {n: layer for n, layer in found if isinstance(layer.router, TokenRouter)}
        experts = max((len(layer.ranks) for layer in routed.values()), default=0)
        domains, classes = len(self.evaluator.index.domains), len(self.evaluator.index.classes)
        with self.evaluator.device:
            counts = torch.zeros(len(routed), domains, classes, experts, dtype=torch.float64)
            confusion = torch.zeros(classes, classes, dtype=torch.int64)
        return Seen(self.evaluator, self.withheld, list(routed), counts, confusion)

    def _look(self, forward: nn.Module, seen: Seen, features: bool) -> None:
        """Has the model see the fixed images."""
        if seen.layers:
            maps: dict[str, list[Tensor]] = {layer: [] for layer in seen.layers}
            for _ in self._forward(forward, self.mapped):
                for layer, found in maps.items():
                    found.append(seen.routes[layer].argmax(-1).cpu())
            seen.maps = {layer: torch.cat(found) for layer, found in maps.items()}
        if not features:
            return
        inputs: list[Tensor] = []

        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs.append(arguments[0].float().cpu())

        head = classifier(self.model)
        head = head[0] if isinstance(head, nn.ModuleList) else head  # a distilled model has two
        handle = head.register_forward_pre_hook(keep)
        try:
            list(self._forward(forward, self.projected))
        finally:
            handle.remove()
        seen.features = torch.cat(inputs)

    def _forward(self, forward: nn.Module, fixed: FixedImages) -> Iterator[None]:
        for start in range(0, len(fixed.images), self.evaluator.batch_size):
            images = fixed.images[start : start + self.evaluator.batch_size]
            forward(images.to(self.evaluator.device, self.evaluator.dtype))
            yield

    @cached_property
    def mapped(self) -> FixedImages:
        """The images of the routing maps."""
        return self._fixed(MAPPED)

    @cached_property
    def projected(self) -> FixedImages:
        """The images of the embedding projector."""
        return self._fixed(PROJECTED)

    def _fixed(self, most: int) -> FixedImages:
        """Some images of each domain's `out` split, evenly over it and so over the classes."""
        evaluator, places = self.evaluator, []
        domains = len(evaluator.index.domains)
        for env in range(domains):
            ranks = np.sort(evaluator.ranks(env, "out"))
            number = min(max(1, most // domains), len(ranks))
            # Other classes from domain to domain, where there are few images of each.
            evenly = (np.arange(number) + (env + 0.5) / domains) * len(ranks) / number
            places += [(env, int(rank)) for rank in ranks[evenly.astype(int)]]
        return fixed_images(evaluator.index, places, evaluator.data_config, evaluator.decoder)
