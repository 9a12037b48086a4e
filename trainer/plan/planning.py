"""The plan of a run, made from its settings and a model on the meta device."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from moa import adapter_state_dict
from moa.layers.layer import moa_layers
from moa.parallel.placement import traffic
from trainer.config import deepspeed_json
from trainer.config.run_config import SHIPPED, RunConfig
from trainer.objectives.objective import check_objective, passes
from trainer.plan.data import Request, domain_names, images_evaluated, known_data
from trainer.plan.measured import measured_rates
from trainer.plan.memory import (
    Sharding,
    Term,
    gpu_bytes,
    kept_terms,
    memory_terms,
    memory_warnings,
    read_sharding,
)
from trainer.plan.scaling import FLOPS, Load, Prediction, Rates, load_of, predict, with_passes
from trainer.plan.sizes import adapter_file_bytes, checkpoint_bytes, roles, weights_of
from trainer.prepare.backbone import outline
from trainer.prepare.batches import Batches, batch_arithmetic
from trainer.prepare.capturing import check_captured, is_captured
from trainer.prepare.compiling import check_compiled
from trainer.prepare.footprint import Footprint, measure
from trainer.prepare.parts import check_expert_parallel
from trainer.process.errors import ConfigError, noted

SHARING = 8
"""Processes that share the experts, for the traffic of both transports beside each other."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the command prints."""

    run: dict[str, Any]
    """Settings that decide about the rest."""
    roles: dict[str, int]
    """Trainable numbers."""
    total: int
    """All numbers of the model."""
    adapter_bytes: int
    checkpoint_bytes: int
    """Text files estimated."""
    memory: tuple[Term, ...]
    gpu_bytes: int
    footprint: Footprint
    batches: Batches
    warnings: tuple[str, ...]
    load: Load
    traffic: dict[Literal["gather", "all_to_all"], float]
    """Bytes that a process sends in a step, by transport, if `SHARING` share the experts."""
    rates: Rates
    measured: bool
    """Whether the rates of device and host are a benchmark's."""
    predictions: tuple[Prediction, ...]
    """A step of the run's batch, shared out over any number of GPUs that can share it."""
    images_evaluated: int
    """By all evaluations; 0 where sizes are not known."""
    run_folder: str
    """Empty where only the data tell."""

    @property
    def trainable(self) -> int:
        """All trainable numbers."""
        return sum(self.roles.values())


def make_plan(config: RunConfig, request: Request) -> Plan:
    """Builds the model on the meta device and plans the run.

    Raises `ConfigError`, `MoAConfigError` or `DataConfigError`: a setting that cannot work.
    """
    domains, sources, classes, sizes, whole = known_data(config, request)
    world = request.world_size
    backbone, report = outline(config.model, config.moa, classes)
    model = backbone.model
    batches = batch_arithmetic(config, world, domains, sources, sizes)
    sharding = _sharding(config, world, batches.global_batch, report.trainable)
    tensors = adapter_state_dict(model)
    moved = [name for name, p in model.named_parameters() if p.requires_grad]
    model.to(torch.bfloat16 if sharding.bf16 else torch.float32)
    footprint = measure(model, batches.micro_batch, config.train.eval_batch)
    weights = weights_of(model)
    kept = kept_terms(weights, sharding, config.average)
    on_gpu = all(step.device == "cuda" for step in request.measured)
    graphed = is_captured(config, sharding.stage == 3, on_gpu)
    memory = (*memory_terms(weights, sharding, footprint, graphed), *kept)
    used, rates = gpu_bytes(memory), Rates(flops=FLOPS[sharding.precision])
    if request.measured:
        rates = measured_rates(request.measured, config, rates)
    # The embedded digits are of a few hundred bytes each.
    loaders = 0 if config.data.dataset == "digits" else max(1, config.data.workers)
    check_objective(config, sources, sharding.stage == 3)
    load = load_of(model, footprint, batches, sharding, loaders, graphed)
    load = with_passes(load, footprint, *passes(config))
    layers = [layer for _, layer in moa_layers(model)]
    seen, width = footprint.tokens * batches.per_process, sharding.working_bytes
    shares = (n for n in batches.legal_world_sizes if not n % load.ep_size)
    shares = (n for n in shares if not batches.global_batch // n % batches.accumulation)
    return Plan(
        run=_settings(config, sharding, len(report.layers), classes, graphed),
        roles=roles(model),
        total=report.total,
        adapter_bytes=adapter_file_bytes(tensors),
        checkpoint_bytes=checkpoint_bytes(tensors, moved, classes, config.average),
        memory=memory,
        gpu_bytes=used,
        footprint=footprint,
        batches=batches,
        warnings=tuple(memory_warnings(used, request.gpu_memory, report.trainable, sharding)),
        load=load,
        traffic=traffic(layers, seen, SHARING, width, batches.accumulation),
        rates=rates,
        measured=bool(request.measured),
        predictions=tuple(predict(load.of(n, batches.global_batch), n, rates) for n in shares),
        images_evaluated=images_evaluated(config, batches.evaluations, sizes, whole),
        run_folder=_run_folder(config),
    )


def _sharding(config: RunConfig, world: int, global_batch: int, trainable: int) -> Sharding:
    """What the DeepSpeed JSON makes of the run, once it has proved legal."""
    bf16 = config.train.precision != "fp32"  # "auto" is bf16 on a GPU
    problems: list[str] = []
    if config.ds_config_path().resolve().parent != SHIPPED.resolve():  # which are right
        from trainer.prepare.zero_check import zero_problems  # imports deepspeed: seconds

        problems += zero_problems(config)
    with noted(problems):
        content = deepspeed_json.resolve(config, world, global_batch, bf16, trainable)
    if problems:
        raise ConfigError("\n".join(problems))
    sharding = read_sharding(content, world)
    check_expert_parallel(config.moa, world, sharding.stage == 3)
    check_compiled(config, sharding.stage == 3)
    check_captured(config, sharding.stage == 3)
    return sharding


def _settings(
    config: RunConfig, sharding: Sharding, layers: int, classes: int, graphed: bool
) -> dict[str, Any]:
    """Those that decide about the rest."""
    return {
        "backbone": config.model.backbone, "method": config.moa.method,
        "adapted_layers": layers if config.moa.adapts else 0, "classes": classes,
        "precision": sharding.precision, "grad_checkpointing": config.model.grad_checkpointing,
        "compile": config.model.compile, "graph": "on" if graphed else "off",
        "zero_stage": sharding.stage, "world_size": sharding.world_size,
        "averages": ", ".join(config.average.names) or "none",
    }  # fmt: skip


def _run_folder(config: RunConfig) -> str:
    held_out = config.data.held_out or (domain_names(config) or ("",))[-1]
    return str(config.run_folder(held_out)) if held_out or config.output_dir else ""
