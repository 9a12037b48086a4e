"""Imported first by what trains: timm and DeepSpeed, quickly and without others' trackers.

Both would take those trackers that are installed for uses that are none of ours, seconds at every
start.
"""

import sys

from trainer.process.importing import many_imports

_TRACKERS = [name for name in ("mlflow", "wandb") if name not in sys.modules]
sys.modules.update(dict.fromkeys(_TRACKERS))  # type: ignore[arg-type]  # None: as if not installed
try:
    with many_imports():
        import deepspeed  # noqa: F401
        import timm  # noqa: F401
finally:
    for _name in _TRACKERS:
        del sys.modules[_name]
