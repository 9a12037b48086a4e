"""Dropout before a classifier, of numbers that do not depend on the world size.

Letters: N images, D width of the features.
"""

from torch import Tensor, nn

from moa.layers.noise import fresh_key, uniform


class FeatureDropout(nn.Module):
    """`nn.Dropout` for features [N, ..., D].

    Which numbers are left out is a function of a noise key and an image's place in the global
    batch. A key comes from `moa.set_routing_position`; without one torch's generator draws it.
    """

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance
        self.noise_key: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        """In training those that are left, longer by 1 / (1 - chance); else all as they are."""
        if not self.training:
            return features
        key = fresh_key(features.device) if self.noise_key is None else self.noise_key
        images, width = features.shape[0], features.shape[-1]
        drawn = uniform(key, images, features[0].numel() // width, width)  # in (0, 1]
        return features * (drawn.view_as(features) > self.chance) / (1 - self.chance)


def dropouts(model: nn.Module) -> list[FeatureDropout]:
    """Those of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, FeatureDropout)]


def apply_first(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """A hook that gives a classifier what its own `dropout` leaves of the features."""
    left: Tensor = module.get_submodule("dropout")(inputs[0])
    return left


def drop_features(head: nn.Module, chance: float) -> None:
    """Has a classifier, or each of a list, drop features before it computes."""
    for each in head if isinstance(head, nn.ModuleList) else [head]:
        each.dropout = FeatureDropout(chance)
        each.register_forward_pre_hook(apply_first)
