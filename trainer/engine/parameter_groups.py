"""Which trainables share a learning rate and a weight decay."""

from collections.abc import Mapping
from itertools import product
from typing import Any

from deepspeed.moe.utils import configure_moe_param_groups
from torch import nn

from moa.model.injection import classifier
from trainer.config.optim import OptimConfig

FACTOR = "lr_factor"
"""A group's key: what the run's learning rate is multiplied by."""


def parameter_groups(
    model: nn.Module, trainables: Mapping[str, nn.Parameter], config: OptimConfig, ep_size: int
) -> list[dict[str, Any]]:
    """As few groups as the settings need, alike on all ranks; experts apart if they are spread.

    Experts are summed over other ranks than the rest.
    """
    whole = config.weight_decay == 0  # then it is all the same who decays
    head = {id(parameter) for parameter in classifier(model).parameters()}
    spared: set[str] = getattr(model, "no_weight_decay", set)()  # timm's: embeddings
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {
        kind: [] for kind in product((True, False), (False, True))
    }
    for name, parameter in trainables.items():
        is_head = config.head_lr != 1 and id(parameter) in head
        decays = whole or (name not in spared and _decays(name, parameter))
        kinds[decays, is_head].append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": members,
            "name": f"trainables-{number}",  # DeepSpeed asks for one
            "weight_decay": config.weight_decay if decays else 0.0,
            FACTOR: config.head_lr if is_head else 1.0,
        }
        for number, ((decays, is_head), members) in enumerate(kinds.items())
        if members
    ]
    if ep_size > 1:
        groups = configure_moe_param_groups(groups)
    return [group for group in groups if group["params"]]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay makes sense: not of offsets, scales and what all layers share."""
    if ".experts." in name or getattr(parameter, "group_name", None):  # an idle rank's number, too
        return True
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1 and not name.startswith("kron_rule.")
