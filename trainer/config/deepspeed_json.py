"""The DeepSpeed JSON: read, checked, and its "auto" entries filled from the run's settings.

Raw DeepSpeed does not know "auto"; here it means: the run's configuration decides.
"""

import json
from collections.abc import Iterator
from typing import Any

from trainer.config.repeated_keys import repeated_key
from trainer.config.run_config import RunConfig
from trainer.process.errors import ConfigError, did_you_mean

STAGES = (1, 2, 3)
_OWN_SECTIONS = {
    "optimizer": "--optim.name, --optim.lr, ...",
    "scheduler": "--optim.schedule, --optim.warmup, ...",
    "fp16": "--train.precision bf16 or fp32",
    "amp": "--train.precision bf16 or fp32",
    "activation_checkpointing": "--model.grad_checkpointing true",
}

# Words that DeepSpeed looks up one by one; one that it does not know it would pass over in silence.
# For its sections it has classes (`trainer.prepare.zero_check`).
_KNOWN: tuple[str, ...] = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "bf16", "data_types", "zero_optimization", "steps_per_print",
    "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "aio",
    "comms_logger", "flops_profiler", "memory_breakdown", "dump_state", "timers",
)  # fmt: skip
_SECTIONS = (
    "zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param",
    "bf16", "data_types",
)  # fmt: skip
_ACCUMULATION = ("fp32", "bf16")
_BUCKETS = ("reduce_bucket_size", "allgather_bucket_size")


def read(config: RunConfig) -> dict[str, Any]:
    """The JSON as it stands, once it has the sections that everything relies on.

    Raises `ConfigError`: not JSON, or not of the right shape.
    """
    path = config.ds_config_path()
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"ds_config: {path} is not JSON: {error}") from error
    if problem := _shape_problem(content) or repeated_key(text):
        raise ConfigError(f"ds_config: {problem} (in {config.ds_config})")
    return dict(content)


def resolve(
    config: RunConfig, world_size: int, global_batch: int, bf16: bool, trainable: int = 0
) -> dict[str, Any]:
    """The complete JSON for `deepspeed.initialize`.

    Args:
        config: the run; its `ds_config` names the file.
        world_size: number of processes.
        global_batch: images per optimizer step over all processes.
        bf16: whether weights and activations are bf16.
        trainable: numbers that train, to which an "auto" bucket is fitted; 0 if not known yet.

    Raises:
        ConfigError: not JSON, an entry that contradicts the run, an "auto" that has no meaning.
    """
    content = read(config)
    accumulation = config.train.accumulation
    wanted: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": global_batch // (world_size * accumulation),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        "bf16.enabled": bf16,
    }
    zero = content["zero_optimization"]
    for name in _BUCKETS:  # DeepSpeed allocates them in full, and adapters are small
        if zero.get(name) == "auto":
            zero[name] = (trainable // 2**20 + 1) * 2**20  # more than them, and aligned
    problems = [*_unknown(content), *_section_problems(content, trainable)]
    problems += [line for entry in wanted.items() for line in _fill(content, *entry)]
    problems += [
        f'ds_config: {dotted} is "auto", which only {", ".join(wanted)} may be; give a value'
        for dotted in _autos(content)
    ]
    if problems:
        raise ConfigError("\n".join(f"{p} (in {config.ds_config})" for p in problems))
    return content


def _unknown(content: dict[str, Any]) -> Iterator[str]:
    """Words that no one reads, with the nearest that someone does."""
    words = {name: _KNOWN for name in content if name not in _OWN_SECTIONS}
    words |= {f"data_types.{name}": ("grad_accum_dtype",) for name in inside(content, "data_types")}
    for dotted, known in words.items():
        name = dotted.removeprefix("data_types.")
        if name not in known:
            hint = did_you_mean(name, known, f"; legal are {', '.join(known)}", cutoff=0.5)
            yield f"ds_config: {dotted} is not known{hint}"


def inside(content: dict[str, Any], dotted: str) -> Any:
    """A section by its dotted name; empty where there is none."""
    for name in dotted.split("."):
        content = content.get(name, {})
    return content


def _shape_problem(content: Any) -> str:
    """What keeps the content from being read at all, or an empty text."""
    if not isinstance(content, dict):
        return "must be a JSON object with sections such as zero_optimization"
    if "zero_optimization" not in content:
        return "has no zero_optimization section; copy one of ds_configs/"
    for section in _SECTIONS:
        if not isinstance(found := inside(content, section), dict):
            return f"{section} is {found!r}; it must be an object, such as ds_configs/ have there"
    for name in _BUCKETS:
        value = content["zero_optimization"].get(name, 1)
        if value != "auto" and (not isinstance(value, int | float) or isinstance(value, bool)):
            return f"zero_optimization.{name} is {value!r}; it must be a number"
    return ""


def _section_problems(content: dict[str, Any], trainable: int) -> Iterator[str]:
    for name, instead in _OWN_SECTIONS.items():
        if name in content:
            yield f"ds_config: section {name!r} is not read; use {instead}"
    zero = content["zero_optimization"]
    if type(zero.get("stage")) is not int or zero["stage"] not in STAGES:
        yield (
            f"ds_config: zero_optimization.stage {zero.get('stage')!r}; legal are "
            f"{', '.join(map(str, STAGES))} (ds_configs/zero1.json, zero2.json, zero3.json)"
        )
    if zero.get("stage") == 2 and not zero.get("contiguous_gradients", True):
        yield "ds_config: zero_optimization.contiguous_gradients must be true at stage 2"
    named = inside(content, "data_types").get("grad_accum_dtype", _ACCUMULATION[0])
    if named not in _ACCUMULATION:
        yield (
            f"ds_config: data_types.grad_accum_dtype is {named!r}; legal are "
            f"{', '.join(_ACCUMULATION)}"
        )
    # With smaller ones, ranks that hold different experts would flush at different points and their
    # reductions no longer match.
    size = zero.get("reduce_bucket_size", 500_000_000)
    if size <= trainable:
        yield (
            f"ds_config: zero_optimization.reduce_bucket_size {size:,.0f} must exceed the "
            f"{trainable:,} trainable numbers; raise it"
        )


def _fill(content: dict[str, Any], dotted: str, value: Any) -> Iterator[str]:
    """Sets an absent or "auto" entry; reports one that says something else."""
    *sections, name = dotted.split(".")
    for section in sections:
        content = content.setdefault(section, {})
    if content.setdefault(name, "auto") == "auto":
        content[name] = value
    elif content[name] != value:
        yield (
            f'ds_config: {dotted} is {content[name]!r}, the run needs {value!r}; write "auto" there'
        )


def _autos(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{prefix}{key}.")
        elif value == "auto":
            yield prefix + key
