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
    from moa.files.origin import Origin
    from moa.files.peft_folder import export_peft, import_peft
    from moa.files.reading import AdapterInfo
    from moa.files.saving import adapter_state_dict, base_hash, load_adapter, save_adapter
    from moa.layers.layer import MoALinear
    from moa.layers.noise import RoutingPosition
    from moa.model.injection import InjectReport, inject
    from moa.model.merging import merge
    from moa.model.routing import (
        aux_loss,
        recorded_routes,
        routing_stats,
        set_routing_position,
        update_balance,
    )

_OWNERS = {
    "AdapterError": "errors",
    "AdapterInfo": "files.reading",
    "InjectReport": "model.injection",
    "MissingAdapterError": "errors",
    "MoAConfig": "config",
    "MoAConfigError": "errors",
    "MoALinear": "layers.layer",
    "NoMatchingModuleError": "errors",
    "Origin": "files.origin",
    "RoutingPosition": "layers.noise",
    "adapter_state_dict": "files.saving",
    "aux_loss": "model.routing",
    "base_hash": "files.saving",
    "export_peft": "files.peft_folder",
    "import_peft": "files.peft_folder",
    "inject": "model.injection",
    "load_adapter": "files.saving",
    "merge": "model.merging",
    "recorded_routes": "model.routing",
    "routing_stats": "model.routing",
    "save_adapter": "files.saving",
    "set_routing_position": "model.routing",
    "update_balance": "model.routing",
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
