"""Imported first by what trains: timm and DeepSpeed, quickly and without others' trackers.

Both would take those trackers that are installed for uses that are none of ours, seconds at every
start. Their imports make more than half a million objects and no garbage: a collector that looks
for some takes a fifth of their time, and again in each of the collections that DeepSpeed asks for
while it makes an engine (four at ZeRO-1 in bf16).
"""

import gc
import sys

_TRACKERS = [name for name in ("mlflow", "wandb") if name not in sys.modules]
_COLLECTING = gc.isenabled()
sys.modules.update(dict.fromkeys(_TRACKERS))  # type: ignore[arg-type]  # None: as if not installed
gc.disable()
try:
    import deepspeed  # noqa: F401
    import timm  # noqa: F401
finally:
    for _name in _TRACKERS:
        del sys.modules[_name]
    gc.freeze()
    if _COLLECTING:
        gc.enable()
