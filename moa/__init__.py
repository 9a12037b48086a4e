"""Mixture-of-Adapters for frozen vision transformers (arXiv 2310.11031): the public names.

Exports are resolved on first use, so that reading a configuration does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moa.config import MoAConfig
    from moa.errors import (
        AdapterError,
        MissingAdapterError,
        MoAConfigError,
        NoMatchingModuleError,
    )
    from moa.injection import InjectReport, inject
    from moa.layer import MoALinear
    from moa.merging import merge
    from moa.model import (
        aux_loss,
        recorded_routes,
        routing_stats,
        set_routing_position,
        update_balance,
    )
    from moa.noise import RoutingPosition
    from moa.origin import Origin
    from moa.peft_bridge import export_peft, import_peft
    from moa.reading import AdapterInfo
    from moa.state import adapter_state_dict, base_hash, load_adapter, save_adapter

_OWNERS = {
    "AdapterError": "errors",
    "AdapterInfo": "reading",
    "InjectReport": "injection",
    "MissingAdapterError": "errors",
    "MoAConfig": "config",
    "MoAConfigError": "errors",
    "MoALinear": "layer",
    "NoMatchingModuleError": "errors",
    "Origin": "origin",
    "RoutingPosition": "noise",
    "adapter_state_dict": "state",
    "aux_loss": "model",
    "base_hash": "state",
    "export_peft": "peft_bridge",
    "import_peft": "peft_bridge",
    "inject": "injection",
    "load_adapter": "state",
    "merge": "merging",
    "recorded_routes": "model",
    "routing_stats": "model",
    "save_adapter": "state",
    "set_routing_position": "model",
    "update_balance": "model",
}

__all__ = [
    "AdapterError",
    "AdapterInfo",
    "InjectReport",
    "MissingAdapterError",
    "MoAConfig",
    "MoAConfigError",
    "MoALinear",
    "NoMatchingModuleError",
    "Origin",
    "RoutingPosition",
    "adapter_state_dict",
    "aux_loss",
    "base_hash",
    "export_peft",
    "import_peft",
    "inject",
    "load_adapter",
    "merge",
    "recorded_routes",
    "routing_stats",
    "save_adapter",
    "set_routing_position",
    "update_balance",
]


def __getattr__(name: str) -> Any:
    if name not in _OWNERS:
        raise AttributeError(f"module 'moa' has no attribute {name!r}")
    return getattr(import_module(f"moa.{_OWNERS[name]}"), name)
