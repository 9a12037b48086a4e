"""Imported first by what trains: timm and DeepSpeed, without the trackers that they try to import.

Both would take those that are installed for uses that are none of ours, seconds at every start.
"""

import sys

_TRACKERS = [name for name in ("mlflow", "wandb") if name not in sys.modules]
sys.modules.update(dict.fromkeys(_TRACKERS))  # type: ignore[arg-type]  # None: as if not installed
try:
    import deepspeed  # noqa: F401
    import timm  # noqa: F401
finally:
    for _name in _TRACKERS:
        del sys.modules[_name]
