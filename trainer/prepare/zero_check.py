"""DeepSpeed's own look at the sections of its JSON, before the processes of a run meet."""

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)
from pydantic import ValidationError

from trainer.config import deepspeed_json
from trainer.config.run_config import RunConfig
from trainer.process.errors import ConfigError, did_you_mean

_WHOLE = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config}
_INNER = {
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
}
# What adapters, averages and checkpoints read of ZeRO's state would look different.
_UNTRIED = (
    "zero_*", "zenflow", "leaf_module", "parameter_alignment", "compute_grad_norm",
    "elastic_checkpoint", "legacy_stage1", "pipeline_loading_checkpoint", "save_muon_*",
)  # fmt: skip


def zero_problems(config: RunConfig) -> list[str]:
    """Entries that DeepSpeed would refuse when it starts, on every rank with a traceback.

    Returns:
        A line for each: the entry, its value, and what is legal. None where the file cannot be
        read, which `deepspeed_json.read` tells.
    """
    try:
        content = deepspeed_json.read(config)
    except ConfigError:
        return []
    found = [*_unknown(content), *_illegal(content)]
    return [f"ds_config: {line} (in {config.ds_config})" for line in found]


def _unknown(content: dict[str, Any]) -> Iterator[str]:
    for section, kind in (_WHOLE | _INNER).items():
        fields = {
            name: field
            for name, field in kind.model_fields.items()
            if not (field.json_schema_extra or {}).get("deprecated")
        }
        words = [field.alias or name for name, field in fields.items()]
        for name in deepspeed_json.inside(content, section):
            if any(fnmatch(name, pattern) for pattern in _UNTRIED):
                yield f"{section}.{name} is not made for adapters; leave it out"
            elif name not in words and name not in fields:
                hint = did_you_mean(name, words, f"; legal are {', '.join(words)}", cutoff=0.5)
                yield f"{section}.{name} is not known{hint}"


def _illegal(content: dict[str, Any]) -> Iterator[str]:
    for section, kind in _WHOLE.items():
        try:
            kind(**deepspeed_json.inside(content, section))
        except ValidationError as error:
            for problem in error.errors():
                if problem["type"] == "extra_forbidden" or problem["loc"] == ("stage",):
                    continue  # told by `_unknown` and `deepspeed_json`
                place = ".".join(map(str, (section, *problem["loc"])))
                value = f" is {problem['input']!r}" if problem["loc"] else ""
                yield f"{place}{value}; {problem['msg']}"
