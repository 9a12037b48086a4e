"""Mixture-of-Adapters for frozen vision transformers (arXiv 2310.11031): the public names."""

from .config import MoAConfig as MoAConfig
from .errors import (
    AdapterError as AdapterError,
    MissingAdapterError as MissingAdapterError,
    MoAConfigError as MoAConfigError,
    NoMatchingModuleError as NoMatchingModuleError,
)
from .files.origin import Origin as Origin
from .files.peft_folder import export_peft as export_peft, import_peft as import_peft
from .files.reading import AdapterInfo as AdapterInfo
from .files.saving import (
    adapter_state_dict as adapter_state_dict,
    base_hash as base_hash,
    load_adapter as load_adapter,
    save_adapter as save_adapter,
)
from .layers.layer import MoALinear as MoALinear
from .layers.noise import RoutingPosition as RoutingPosition
from .model.compiling import compile_blocks as compile_blocks
from .model.injection import InjectReport as InjectReport, inject as inject
from .model.merging import merge as merge
from .model.routing import (
    aux_loss as aux_loss,
    recorded_routes as recorded_routes,
    routing_stats as routing_stats,
    set_routing_position as set_routing_position,
    update_balance as update_balance,
)
