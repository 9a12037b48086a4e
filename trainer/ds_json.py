"""The DeepSpeed JSON: read, checked, and its "auto" entries filled from the run's settings.

Raw DeepSpeed does not know "auto"; here it means: the run's configuration decides.
"""

import json
from collections.abc import Iterator
from typing import Any

from trainer.config import RunConfig
from trainer.errors import ConfigError

STAGES = (1, 2)
_OWN_SECTIONS = {
    "optimizer": "--optim.name, --optim.lr, ...",
    "scheduler": "--optim.lr (the rate is constant)",
    "fp16": "--train.precision bf16 or fp32",
    "amp": "--train.precision bf16 or fp32",
}


def resolve(config: RunConfig, world_size: int, global_batch: int, bf16: bool) -> dict[str, Any]:
    """The complete JSON for `deepspeed.initialize`.

    Args:
        config: the run; its `ds_config` names the file.
        world_size: number of processes.
        global_batch: images per optimizer step over all processes.
        bf16: whether weights and activations are bf16.

    Raises:
        ConfigError: not JSON, an entry that contradicts the run, an "auto" that has no meaning.
    """
    path = config.ds_config_path()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"ds_config: {path} is not JSON: {error}") from error
    if problem := _shape_problem(content):
        raise ConfigError(f"ds_config: {problem} (in {config.ds_config})")
    accumulation = config.train.accumulation
    wanted: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": global_batch // (world_size * accumulation),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        "bf16.enabled": bf16,
    }
    problems = _section_problems(content)
    for dotted, value in wanted.items():
        problems += _fill(content, dotted, value)
    problems += [
        f'ds_config: {dotted} is "auto", which only {", ".join(wanted)} may be; give a value'
        for dotted in _autos(content)
    ]
    if problems:
        raise ConfigError("\n".join(f"{p} (in {config.ds_config})" for p in problems))
    return dict(content)


def check_buckets(content: dict[str, Any], trainable: int) -> None:
    """Refuses a gradient bucket that the trainable numbers do not fit into.

    With smaller buckets, ranks that hold different experts would flush at different points and
    their reductions no longer match.

    Raises:
        ConfigError: `reduce_bucket_size` is not larger than `trainable`.
    """
    size = content["zero_optimization"].get("reduce_bucket_size", 500_000_000)
    if size <= trainable:
        raise ConfigError(
            f"ds_config: zero_optimization.reduce_bucket_size {size:,.0f} must exceed the "
            f"{trainable:,} trainable numbers; raise it"
        )


def _shape_problem(content: Any) -> str:
    """What keeps the content from being read at all, or an empty text."""
    if not isinstance(content, dict):
        return "must be a JSON object with sections such as zero_optimization"
    for name in ("zero_optimization", "bf16"):
        if not isinstance(content.get(name, {}), dict):
            return f"{name} is {content[name]!r}; it must be an object"
    zero = content.get("zero_optimization", {})
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        value = zero.get(name, 1)
        if value != "auto" and (not isinstance(value, int | float) or isinstance(value, bool)):
            return f"zero_optimization.{name} is {value!r}; it must be a number"
    return ""


def _section_problems(content: dict[str, Any]) -> list[str]:
    problems = [
        f"ds_config: section {name!r} is not read; use {instead}"
        for name, instead in _OWN_SECTIONS.items()
        if name in content
    ]
    zero = content.get("zero_optimization", {})
    if type(zero.get("stage")) is not int or zero["stage"] not in STAGES:
        problems.append(
            f"ds_config: zero_optimization.stage {zero.get('stage')!r}; legal are "
            f"{', '.join(map(str, STAGES))} (ds_configs/zero1.json, ds_configs/zero2.json)"
        )
    if zero.get("stage") == 2 and not zero.get("contiguous_gradients", True):
        problems.append("ds_config: zero_optimization.contiguous_gradients must be true at stage 2")
    return problems


def _fill(content: dict[str, Any], dotted: str, value: Any) -> list[str]:
    """Sets an absent or "auto" entry; reports one that says something else."""
    *sections, name = dotted.split(".")
    for section in sections:
        content = content.setdefault(section, {})
    if content.setdefault(name, "auto") == "auto":
        content[name] = value
    elif content[name] != value:
        return [
            f'ds_config: {dotted} is {content[name]!r}, the run needs {value!r}; write "auto" there'
        ]
    return []


def _autos(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{prefix}{key}.")
        elif value == "auto":
            yield prefix + key
