"""`python -m trainer.plan`: what a run will train, need and compute, before it is submitted.

Takes the flags of `trainer/run.py` and a few of its own; needs no GPU, no weights and no data.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trainer.commandline import build_parser, parse
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.session import conclude
from trainer.world import World

if TYPE_CHECKING:
    from trainer.estimates import Batches, Term
    from trainer.footprint import Footprint
    from trainer.scaling import Load, Prediction

ALONE = World(rank=0, size=1, local_rank=0, local_size=1)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks beyond the run itself; None: from the dataset, or not asked."""

    world_size: int = 1
    gpu_memory: float | None = None
    """GiB"""
    num_classes: int | None = None
    domains: int | None = None
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the command prints.

    Attributes:
        run: settings that decide about the rest.
        roles: trainable numbers by role.
        total: all numbers of the model.
        adapter_bytes: size of the adapter file.
        checkpoint_bytes: size of one checkpoint, text files estimated.
        memory: terms of one process.
        gpu_bytes: sum of those on the GPU.
        footprint: what was measured on the meta device.
        batches: batch arithmetic.
        warnings: what deserves a second look.
        load: what a step computes and sends.
        predictions: a step of as many images per process on more and more GPUs.
    """

    run: dict[str, Any]
    roles: dict[str, int]
    total: int
    adapter_bytes: int
    checkpoint_bytes: int
    memory: "tuple[Term, ...]"
    gpu_bytes: int
    footprint: "Footprint"
    batches: "Batches"
    warnings: tuple[str, ...]
    load: "Load"
    predictions: "tuple[Prediction, ...]"

    @property
    def trainable(self) -> int:
        """All trainable numbers."""
        return sum(self.roles.values())


class _OwnFlags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _add_own(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world-size", default="1", metavar="N", help="processes (default: 1)")
    parser.add_argument(
        "--gpu-memory", metavar="GIB", help="memory of a GPU; says whether the run fits"
    )
    parser.add_argument("--num-classes", metavar="N", help="default: the dataset's, where known")
    parser.add_argument(
        "--domains", metavar="D", help="with the held-out one; default: the dataset's, where known"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, no tables")


def read_command_line(argv: Sequence[str]) -> tuple[RunConfig, Request]:
    """The run, and what is asked about it.

    Raises:
        ConfigError: every problem of the command line, one a line.
    """
    own = _OwnFlags(add_help=False, allow_abbrev=False)
    _add_own(own)
    given, rest = own.parse_known_args(argv)
    problems: list[str] = []
    request = Request(
        world_size=_number(given.world_size, "--world-size", int, 1, problems) or 1,
        gpu_memory=_number(given.gpu_memory, "--gpu-memory", float, 0, problems),
        num_classes=_number(given.num_classes, "--num-classes", int, 1, problems),
        domains=_number(given.domains, "--domains", int, 2, problems),
        json=given.json,
    )
    try:
        config = _parse_without_data(rest)
    except ConfigError as error:
        raise ConfigError("\n".join([*problems, str(error)])) from error
    if problems:
        raise ConfigError("\n".join(problems))
    return config, request


def _number(text: str | None, flag: str, kind: type, least: int, problems: list[str]) -> Any:
    if text is None:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is not None and least <= value < 2**63 and value > 0:
        return value
    what = "a whole number" if kind is int else "a number"
    bound = f">= {least}" if least else "> 0"
    problems.append(f"{flag} = {text!r}: legal is {what} {bound}")
    return None


def _parse_without_data(argv: Sequence[str]) -> RunConfig:
    """Like `parse`, but the folder of the data may be missing."""
    try:
        return parse(argv)
    except ConfigError:
        # With some folder given, everything else that is wrong shows up again.
        config = parse(["--data.root=none needed", *argv])
    return replace(config, data=replace(config.data, root=None))


def known_data(config: RunConfig, request: Request) -> tuple[int, int, dict[str, int]]:
    """Domains, classes and sizes: from the flags, the shard set if it is at hand, the registry.

    Returns:
        Number of domains, of classes, and training images of each source domain where known.

    Raises:
        ConfigError: a number that nothing tells, or a held-out domain that does not exist.
    """
    from shards import ShardIndex
    from shards.datasets import DATASETS

    spec, root = DATASETS[config.data.dataset], config.data.root
    names, samples, classes = spec.domains, spec.samples, spec.num_classes
    if root is not None and (Path(root) / "index.json").is_file():
        index = ShardIndex.load(root)
        names, classes = index.domains, len(index.classes)
        samples = tuple(index.num_samples(env) for env in range(len(names)))
    number = request.domains or (len(names) if names else None)
    classes = request.num_classes or classes
    missing = [
        f"{flag}: dataset {spec.name!r} does not fix it; give a number"
        for flag, value in (("--domains", number), ("--num-classes", classes))
        if value is None
    ]
    if number is None or classes is None:
        raise ConfigError("\n".join(missing))
    if names is None or number != len(names):
        return number, classes, {}
    held_out = config.data.held_out or names[-1]
    if held_out not in names:
        raise ConfigError(
            f"data.held_out = {held_out!r}: not a domain of {spec.name}; legal: {', '.join(names)}"
        )
    sizes = dict(zip(names, samples or (), strict=False))
    held_back = config.data.holdout_fraction
    return number, classes, {d: n - int(n * held_back) for d, n in sizes.items() if d != held_out}


def make_plan(config: RunConfig, request: Request) -> Plan:
    """Builds the model on the meta device and plans the run.

    Raises:
        ConfigError, MoAConfigError, DataConfigError: a setting that cannot work.
    """
    import torch

    from moa import adapter_state_dict
    from trainer import ds_json, estimates
    from trainer.footprint import measure, outline, roles, weights_of
    from trainer.scaling import WORLDS, Rates, load_of, predict

    domains, classes, sizes = known_data(config, request)
    bf16 = config.train.precision != "fp32"  # "auto" is bf16 on a GPU
    model, report = outline(config.model, config.moa, classes)
    batches = estimates.batch_arithmetic(config, request.world_size, domains, sizes)
    content = ds_json.resolve(
        config, request.world_size, batches.global_batch, bf16, report.trainable
    )
    ds_json.check_buckets(content, report.trainable)
    tensors = adapter_state_dict(model)
    moved = [name for name, p in model.named_parameters() if p.requires_grad]
    model.to(torch.bfloat16 if bf16 else torch.float32)
    footprint = measure(model, batches.micro_batch, config.train.eval_batch)
    sharding = estimates.read_sharding(content, request.world_size)
    terms = estimates.memory_terms(weights_of(model), sharding, footprint)
    used = estimates.gpu_bytes(terms)
    tokens = int(model.patch_embed.num_patches) + 1  # type: ignore[union-attr, arg-type]
    load = load_of(model, footprint, sharding.stage, tokens, 2 if bf16 else 4)
    ep_size, each = config.moa.ep_size, batches.per_process
    return Plan(
        run={
            "backbone": config.model.backbone,
            "method": config.moa.method,
            "adapted_layers": len(report.layers) if config.moa.adapts else 0,
            "classes": classes,
            "precision": "bf16" if bf16 else "fp32",
            "grad_checkpointing": config.model.grad_checkpointing,
            "zero_stage": sharding.stage,
            "world_size": request.world_size,
        },
        roles=roles(model),
        total=report.total,
        adapter_bytes=estimates.adapter_file_bytes(tensors),
        checkpoint_bytes=estimates.checkpoint_bytes(tensors, moved, classes),
        memory=terms,
        gpu_bytes=used,
        footprint=footprint,
        batches=batches,
        warnings=tuple(
            estimates.memory_warnings(used, request.gpu_memory, report.trainable, sharding)
        ),
        load=load,
        predictions=tuple(
            predict(load, world, each, ep_size, Rates())
            for world in sorted({request.world_size, *WORLDS})
            if world % ep_size == 0
        ),
    )


def plan_command(argv: Sequence[str]) -> None:
    """Reads the command line, plans and prints."""
    config, request = read_command_line(argv)
    plan = make_plan(config, request)
    from trainer.plan_table import show

    show(plan, request)


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        parser = build_parser()
        parser.prog, parser.description = "python -m trainer.plan", __doc__
        _add_own(parser)
        parser.print_help()
        return 0
    return conclude(lambda: plan_command(argv), ALONE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
