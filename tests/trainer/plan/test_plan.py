"""`python -m trainer.plan`: what it says is held against real models, files and closed formulas."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import moa
from moa.config import ADAPTER_METHODS
from moa.files.reading import AdapterInfo
from moa.files.saving import WEIGHTS_FILE
from moa.layers.layer import moa_layers
from moa.model.heads import fit_head
from moa.parallel.placement import traffic
from shards import DataConfigError
from tests.support.shards_fixtures import make_set
from trainer.bench.step import Setting, step_operations
from trainer.checkpoint import checkpoint
from trainer.config import deepspeed_json
from trainer.config.averages import AverageConfig
from trainer.config.command_line import parse
from trainer.config.run_config import ModelConfig, RunConfig
from trainer.engine.swad import Swad
from trainer.monitor.efficiency import image_utilisation
from trainer.plan.__main__ import main, read_command_line
from trainer.plan.data import images_evaluated
from trainer.plan.memory import (
    CONTEXT_BYTES,
    Sharding,
    gpu_bytes,
    kept_terms,
    memory_terms,
    memory_warnings,
    read_sharding,
)
from trainer.plan.planning import Plan, make_plan
from trainer.plan.scaling import FLOPS as RATES, LOOP_OPERATIONS
from trainer.plan.sizes import (
    TEXT_BYTES,
    Weights,
    adapter_file_bytes,
    checkpoint_bytes,
    roles,
    weights_of,
)
from trainer.plan.table import show_table
from trainer.plan.whole_table import POOLS, makespan, plan_table
from trainer.prepare.backbone import outline
from trainer.prepare.batches import batch_arithmetic
from trainer.prepare.footprint import Footprint, forward_only, measure
from trainer.prepare.meter import FLOPS
from trainer.prepare.parts import build
from trainer.process.world import World

GIB = 2**30
COLUMNS: dict[str, dict[str, Any]] = {
    "lora r=2": {"method": "lora"},
    "lora r=8 qkv": {"method": "lora", "ranks": (8,), "targets": ("attn.qkv",)},
    "moa_lora": {"method": "moa_lora"},
    "moa_kron": {"method": "moa_kron"},
}
TABLE = {
    "vit_base_patch16_clip_224": (110_592, 294_912, 1_463_814, 1_485_830),
    "vit_large_patch14_clip_224": (294_912, 786_432, 3_898_380, 3_943_436),
    "vit_giant_patch14_clip_224": (675_840, 1_802_240, 8_924_180, 9_016_852),
    "vit_gigantic_patch14_clip_224": (958_464, 2_555_904, 12_650_520, 12_778_520),
}
METHODS = (*ADAPTER_METHODS, "full", "linear", "bias", "attention")
DOMAINNET = ["--data.dataset=domainnet", "--train.batch_per_domain=32"]


def settings(method: str, **more: Any) -> moa.MoAConfig:
    """Of the embedded backbone; P = 32 divides its widths and keeps the rule small."""
    return moa.MoAConfig(method=method, kron_dim=32, router_dim=16, **more)  # type: ignore[arg-type]


def real(config: moa.MoAConfig, grad_checkpointing: bool = False, classes: int = 7) -> nn.Module:
    model: nn.Module = timm.create_model("vit_embedded", pretrained=False, num_classes=classes)
    model.set_grad_checkpointing(grad_checkpointing)  # type: ignore[operator]
    moa.inject(model, config)
    return model.train()


def planned(config: moa.MoAConfig, grad_checkpointing: bool = False, classes: int = 7) -> nn.Module:
    base = ModelConfig(backbone="vit_embedded", grad_checkpointing=grad_checkpointing)
    return outline(base, config, classes)[0].model


@pytest.mark.parametrize("backbone", TABLE)
def test_trainable_counts_are_those_of_the_design(backbone: str) -> None:
    for (name, options), wanted in zip(COLUMNS.items(), TABLE[backbone], strict=True):
        config = moa.MoAConfig(**options)
        outlined, report = outline(ModelConfig(backbone=backbone), config, 345)
        model = outlined.model
        counts = roles(model)
        width = model.get_classifier().in_features  # type: ignore[operator]
        assert counts.pop("head") == 345 * (width + 1)
        assert sum(counts.values()) == wanted, name
        assert report.trainable - report.head == wanted, name
        assert {p.device.type for p in model.parameters()} == {"meta"}


def test_roles_are_told_apart() -> None:
    counts = roles(planned(settings("moa_kron", shared_rank=3)))
    layers, width, ranks, small = 3, 128, 1 + 2 + 4 + 8 + 3, 16
    assert counts == {
        "experts": layers * ranks * 4 * width,
        "routers": layers * (small * width + small + small * 4 + 1),
        "rule": 2 * 32 * 32,
        "added biases": layers * 3 * width,
        "head": 7 * (width + 1),
    }
    assert roles(planned(settings("bias"))).keys() == {"backbone", "head"}
    everything = planned(settings("full"))
    assert sum(roles(everything).values()) == sum(p.numel() for p in everything.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_adapter_file_has_the_planned_size(method: str, tmp_path: Path) -> None:
    config = settings(method)
    model, info = real(config), AdapterInfo("vit_embedded", "0", config, ("a",) * 7, {})
    moa.save_adapter(model, tmp_path / "adapter", info)
    size = (tmp_path / "adapter" / WEIGHTS_FILE).stat().st_size
    assert adapter_file_bytes(moa.adapter_state_dict(planned(config))) == size


@pytest.mark.parametrize("frozen", [False, True])
def test_a_cosine_head_is_planned_as_it_is_saved(frozen: bool, tmp_path: Path) -> None:
    base = ModelConfig(backbone="vit_embedded", head="cosine", head_init="text", head_frozen=frozen)
    outlined, report = outline(base, settings("lora"), 7)
    assert report.head == roles(outlined.model).get("head", 0) == (0 if frozen else 15 * 129)
    model: nn.Module = timm.create_model("vit_embedded", num_classes=7)
    fit_head(model, 7, {"kind": "cosine", "space": 15, "frozen": frozen})
    moa.inject(model, settings("lora"))
    info = AdapterInfo("vit_embedded", "0", settings("lora"), ("a",) * 7, {})
    moa.save_adapter(model, tmp_path / "adapter", info)
    size = (tmp_path / "adapter" / WEIGHTS_FILE).stat().st_size
    assert adapter_file_bytes(moa.adapter_state_dict(outlined.model)) == size
    terms = plan_of("--model.head=cosine", "--model.head_init=text", "--objective.margin=0.3")
    assert terms.roles["head"] == 15 * 129


def test_whole_numbers_in_the_adapter_file_count_too(tmp_path: Path) -> None:
    config = settings("moa_lora", balance="bias")
    info = AdapterInfo("vit_embedded", "0", config, ("a",) * 7, {})
    moa.save_adapter(real(config), tmp_path / "adapter", info)
    tensors = moa.adapter_state_dict(planned(config))
    assert any(not t.is_floating_point() for t in tensors.values())
    size = (tmp_path / "adapter" / WEIGHTS_FILE).stat().st_size
    assert adapter_file_bytes(tensors) == size


@pytest.mark.parametrize(
    ("averages", "parts"),
    [
        ({}, []),
        ({"ema": True}, ["ema"]),
        (
            {"ema": True, "swad": True, "swad_n_converge": 2, "swad_n_tolerance": 3},
            ["ema", "swad.kept", "swad.open", "swad.waiting0", "swad.waiting1"],
        ),
    ],
)
def test_checkpoint_has_the_planned_size_but_for_its_text(
    averages: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    """With the best adapter, and with all parts of the averages that there can be."""
    config = settings("moa_kron", balance="bias")
    model, classes = real(config), [f"class {i}" for i in range(7)]
    info = AdapterInfo("vit_embedded", "0" * 64, config, tuple(classes), {})
    masters = moa.adapter_state_dict(model)
    moments = {f"{n}|{m}": t.clone() for n, t in masters.items() for m in ("exp_avg", "exp_avg_sq")}
    state = {"step": 1, "config": {"key": "value"}, "data": {"classes": classes}}
    means = {f"{part}|{n}": t.clone() for part in parts for n, t in masters.items()}
    folder = checkpoint.save(
        tmp_path, info, masters, moments, state, keep=1, best=masters, averages=means
    )
    text = sum(f.stat().st_size for f in folder.iterdir() if f.suffix != ".safetensors")
    whole = sum(f.stat().st_size for f in folder.iterdir())
    predicted = checkpoint_bytes(masters, list(masters), 7, AverageConfig(**averages))
    assert predicted - (TEXT_BYTES + 7 * 64) == whole - text
    assert text < TEXT_BYTES + 7 * 64


def kept_by_forward(model: nn.Module, images: Tensor) -> int:
    """Bytes of all storages saved for backward that are not the model's."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(images).float(), torch.zeros(len(images), dtype=torch.int64))
        loss = loss + moa.aux_loss(model)
        return sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in own)


@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_saved_bytes_are_those_of_a_real_model(method: str, grad_checkpointing: bool) -> None:
    config = settings(method)
    model, images = real(config, grad_checkpointing), torch.randn(3, 3, 32, 32)
    footprint = measure(planned(config, grad_checkpointing), micro_batch=3, eval_batch=5)
    assert footprint.kept == kept_by_forward(model, images)
    # A CPU is asked for every operation, and merges some others than the meta device does.
    on_cpu = measure(model, micro_batch=3, eval_batch=5)
    assert footprint == replace(on_cpu, operations=footprint.operations)
    assert footprint.operations == pytest.approx(on_cpu.operations, rel=0.05)
    assert all(p.grad is None for p in model.parameters())


def test_checkpointing_trades_memory_for_flops() -> None:
    whole = measure(planned(settings("moa_kron")), 4, 1)
    less = measure(planned(settings("moa_kron"), grad_checkpointing=True), 4, 1)
    assert (less.forward, less.backward) == (whole.forward, whole.backward)
    assert whole.recomputed == 0
    # Frozen products that end a block need not be repeated, all others are.
    assert 0.6 * less.forward < less.recomputed < less.forward
    assert less.kept < whole.kept / 4
    assert less.kept < less.peak < whole.peak
    # One block at a time: its input for each of six, and the whole of one.
    assert less.peak < less.kept + whole.kept / 3


def test_bytes_grow_by_the_image_and_flops_per_image_stay() -> None:
    one, two, four = (measure(planned(settings("lora")), batch, 1) for batch in (1, 2, 4))
    assert one.forward == two.forward == four.forward
    # Beside what each image adds there are the experts' weights, put side by side.
    assert four.kept - two.kept == 2 * (two.kept - one.kept)
    assert two.kept - one.kept > 0.9 * one.kept
    assert four.peak > four.kept


def closed_forward(batch: int, classes: int) -> tuple[int, int, int]:
    """Of the embedded ViT: patches, linear layers of the blocks with the head, attention."""
    width, depth, patches, patch = 128, 6, 16, 8
    tokens = patches + 1
    embed = 2 * patches * 3 * patch**2 * width
    linears = depth * 2 * tokens * 12 * width**2 + 2 * width * classes
    attention = depth * 2 * 2 * tokens**2 * width
    return batch * embed, batch * linears, batch * attention


def test_flops_of_a_plain_vit_follow_the_closed_formula() -> None:
    full = measure(planned(settings("full")), 2, 1)
    embed, linears, attention = closed_forward(1, 7)
    assert full.forward == embed + linears + attention
    # Twice the linear layers; the patches' weights alone; fused attention forms its scores anew.
    assert full.backward == embed + 2 * linears + 5 * attention // 2


def test_frozen_layers_have_no_weight_gradient() -> None:
    head = measure(planned(settings("linear")), 2, 1)
    assert (head.forward, head.backward) == (sum(closed_forward(1, 7)), 2 * 128 * 7)
    last = measure(planned(settings("lora", blocks="last_1", targets=("attn.proj",))), 2, 1)
    tokens, width, rank = 17, 128, 2
    # Down to the wrapped layer: through the MLP and the head, and the two skinny products, whose
    # input needs no gradient since nothing before them trains.
    mlp, skinny = 2 * tokens * 8 * width**2, 2 * tokens * rank * width
    assert last.backward == mlp + 2 * 2 * width * 7 + 3 * skinny


def test_flops_are_those_of_torchs_own_counter() -> None:
    config = settings("moa_kron")
    model, footprint = real(config), measure(planned(config), 2, 1)
    missing = {op: partial(count) for op, count in FLOPS.items() if op not in flop_registry}
    for count in missing.values():
        count._get_raw = True  # as torch marks those that take tensors, not shapes
    with FlopCounterMode(display=False, custom_mapping=missing) as forward:
        loss = F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1]))
    with FlopCounterMode(display=False, custom_mapping=missing) as backward:
        torch.autograd.backward(loss + moa.aux_loss(model))
    assert footprint.forward == forward.get_total_flops() // 2
    assert footprint.backward == backward.get_total_flops() // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_tensors(dtype: torch.dtype) -> None:
    model = real(settings("moa_kron", balance="bias")).to(dtype)
    frozen = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    trainable = [p for p in model.parameters() if p.requires_grad]
    terms = terms_of(weights_of(model), stage=2, world=1, bf16=dtype == torch.bfloat16)
    assert terms["frozen weights"] == sum(t.nbytes for t in frozen)
    assert terms["trainable weights"] == sum(t.nbytes for t in trainable)
    assert terms["fp32 masters"] == 4 * sum(t.numel() for t in trainable)
    assert terms["Adam moments"] == 2 * terms["fp32 masters"]


FOOTPRINT = Footprint(
    images=4, kept=700, peak=1000, evaluation=900, forward=1, backward=1, recomputed=0
)
WEIGHTS = Weights(trainable=1000, frozen=100_000, buffer_bytes=16)


def sharding_of(stage: int, world: int, bf16: bool, **zero: Any) -> Sharding:
    content = {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000, **zero},
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    return read_sharding(content, world)


def terms_of(
    weights: Weights, stage: int, world: int, bf16: bool, place: str = "gpu", **zero: Any
) -> dict[str, int]:
    terms = memory_terms(weights, sharding_of(stage, world, bf16, **zero), FOOTPRINT)
    return {term.name: term.bytes for term in terms if term.place == place}


COMMON = {
    "activations kept for backward": 700,
    "workspace of forward and backward": 300,
    "CUDA context, cuBLAS, NCCL": CONTEXT_BYTES,
}


def test_stage_1_in_bf16_accumulates_the_whole_gradient_and_has_no_buckets() -> None:
    assert terms_of(WEIGHTS, 1, 8, True, overlap_comm=True) == COMMON | {
        "frozen weights": 200_016,
        "trainable weights": 2000,
        "fp32 masters": 500,
        "Adam moments": 1000,
        "gradients": 6000,
    }


def test_stage_2_shards_gradients_and_allocates_two_buckets_when_overlapping() -> None:
    terms = terms_of(WEIGHTS, 2, 8, True, overlap_comm=True)
    assert terms["gradients"] == 500
    assert terms["gradient buckets"] == 2 * 5000 * 2
    assert terms["trainable weights"] == 2000
    assert terms_of(WEIGHTS, 2, 8, False)["gradient buckets"] == 5000 * 4
    loose = terms_of(WEIGHTS, 2, 8, True, contiguous_gradients=False)
    assert "gradient buckets" not in loose
    assert loose["gradients before reduction"] == 2000


def test_stage_3_shards_weights_and_gathers_some() -> None:
    terms = terms_of(WEIGHTS, 3, 8, True, stage3_max_live_parameters=50_000)
    assert terms["frozen weights"] == 12_500 * 2 + 16
    assert terms["trainable weights"] == 250
    assert terms["gathered weights"] == 100_000
    assert "gathered weights" not in terms_of(WEIGHTS, 3, 1, True)


def test_offloaded_terms_are_the_hosts() -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    assert terms_of(WEIGHTS, 2, 8, True, place="host", **offload) == {
        "fp32 masters": 500,
        "Adam moments": 1000,
        "gradients": 500,
    }
    terms = memory_terms(WEIGHTS, sharding_of(2, 8, True, **offload), FOOTPRINT)
    on_gpu = {t.name: t.bytes for t in terms if t.place == "gpu"}
    assert gpu_bytes(terms) == sum(on_gpu.values())
    assert "Adam moments" not in on_gpu


def test_the_best_adapter_and_averages_are_kept_beside_the_weights() -> None:
    def kept(averages: AverageConfig, **zero: Any) -> dict[tuple[str, str], int]:
        terms = kept_terms(WEIGHTS, sharding_of(2, 8, True, **zero), averages)
        return {(t.name, t.place): t.bytes for t in terms}

    read = 4 * (100_000 + 1000) + 16  # the whole model in fp32, before it is spread
    best = {("best adapter", "host"): 4000, ("weights while they are read", "host"): read}
    assert kept(AverageConfig()) == best
    both = AverageConfig(ema=True, swad=True)
    # SWAD: what is kept, the open segment, and five that wait for the sixth loss above the level.
    assert kept(both) == best | {("EMA", "gpu"): 500, ("SWAD", "gpu"): 7 * 500}
    offloaded = kept(both, offload_optimizer={"device": "cpu"})
    assert offloaded == best | {("EMA", "host"): 500, ("SWAD", "host"): 7 * 500}


@pytest.mark.parametrize("losses", [[5.0] * 20, [3.0, 2.0, 1.0, 9.0, 9.0, 9.0, 1.0, 9.0], [1.0]])
def test_swad_never_holds_more_copies_than_planned(losses: list[float]) -> None:
    config, most = AverageConfig(swad=True, swad_n_converge=2, swad_n_tolerance=4), 0
    swad = Swad(config.swad_n_converge, config.swad_n_tolerance, config.swad_tolerance_ratio)
    for loss in losses:
        swad.add([torch.ones(3)], torch.tensor(True))
        most = max(most, sum(mean.values is not None for mean in swad.means().values()))
        swad = swad.closed(loss)
        assert len(swad.means()) <= config.swad_copies
    assert most <= config.swad_copies == 5


def test_a_large_evaluation_batch_counts_beyond_training() -> None:
    terms = memory_terms(WEIGHTS, sharding_of(2, 1, True), replace(FOOTPRINT, evaluation=1500))
    assert {t.name: t.bytes for t in terms}["evaluation beyond training"] == 500


def test_warnings_come_when_they_should() -> None:
    tight, wasteful = sharding_of(2, 1, True), sharding_of(2, 1, True, reduce_bucket_size=5e8)
    assert not list(memory_warnings(8 * GIB, 10, 1000, tight))
    (hardly,) = memory_warnings(int(9.5 * GIB), 10, 1000, tight)
    assert "hardly fits" in hardly
    (never,) = memory_warnings(11 * GIB, 10, 1000, tight)
    assert "does not fit" in never
    (bucket,) = memory_warnings(11 * GIB, None, 1000, wasteful)
    assert "reduce_bucket_size" in bucket
    assert not list(memory_warnings(11 * GIB, None, 400_000_000, wasteful))


@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_shipped_json_is_understood(name: str) -> None:
    config = replace(RunConfig(), ds_config=f"ds_configs/{name}.json")
    sharding = read_sharding(deepspeed_json.resolve(config, 4, 160, True), 4)
    assert sharding.stage == int(name[-1])
    assert sharding.accumulation_bytes == 4
    assert (sharding.buckets > 0) == (name == "zero2")


@pytest.mark.parametrize(("steps", "eval_every", "every"), [(1, 5, 5), (11, 5, 4), (12, 5, 4)])
def test_evaluations_and_checkpoints_are_counted_as_the_loop_makes_them(
    steps: int, eval_every: int, every: int
) -> None:
    config = parse(
        [f"--train.steps={steps}", f"--train.eval_every={eval_every}",
         f"--checkpoint.every={every}"]
    )  # fmt: skip
    batches = batch_arithmetic(config, 2, 6, 5, {"a": 16})
    last = steps - 1
    assert batches.evaluations == sum(s % eval_every == 0 or s == last for s in range(steps))
    assert batches.checkpoints == sum((s + 1) % every == 0 or s == last for s in range(steps))
    assert batches.epochs == {"a": steps * 8 / 16}
    assert (batches.global_batch, batches.per_process) == (40, 20)


def test_batches_that_cannot_be_cut() -> None:
    config = parse(["--train.batch_per_domain=8", "--train.accumulation=3"])
    with pytest.raises(DataConfigError, match="micro-batches"):
        batch_arithmetic(config, 1, 6, 5, {})
    with pytest.raises(DataConfigError, match="world size 7"):
        batch_arithmetic(config, 7, 6, 5, {})


def plan_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main([*argv, "--json"]) == 0
    loaded: dict[str, Any] = json.loads(capsys.readouterr().out)
    return loaded


def test_whole_command_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_json(
        capsys, *DOMAINNET, "--model.backbone=vit_base_patch16_clip_224", "--world_size=8",
        "--train.steps=15001", "--train.eval_every=1000", "--data.held_out=real",
        "--model.compile=blocks",
    )  # fmt: skip
    assert plan["run"]["compile"] == "blocks"
    assert plan["trainable"] - plan["roles"]["head"] == 1_485_830
    assert plan["roles"]["head"] == 265_305
    assert plan["run"]["precision"] == "bf16", "a plan is for GPUs"
    batches = plan["batches"]
    assert (batches["global_batch"], batches["micro_batch"]) == (160, 20)
    assert batches["images_seen"] == 15001 * 160
    assert batches["evaluations"] == 16
    assert set(batches["epochs"]) == {"clipart", "infograph", "painting", "quickdraw", "sketch"}
    clipart = 48129 - math.floor(48129 * 0.2)
    assert batches["epochs"]["clipart"] == 15001 * 32 / clipart
    terms = {term["name"]: term["bytes"] for term in plan["memory"] if term["place"] == "gpu"}
    assert plan["gpu_bytes"] == sum(terms.values())
    assert terms["frozen weights"] == 2 * (plan["total"] - plan["trainable"])
    steps = {p["world"]: p for p in plan["predictions"]}
    assert list(steps) == [n for n in range(1, 161) if 160 % n == 0], "no GPU without an image"
    assert all(world * step["images"] == 160 for world, step in steps.items())
    counted = step_operations("moa_kron", "vit_base_patch16_clip_224", torch.bfloat16)
    for step in steps.values():
        assert step["host"] == pytest.approx(30e-6 * (counted + LOOP_OPERATIONS), rel=0.02)
    assert plan["load"]["loaders"] == 1
    # Linear layers of a ViT-B/16: 17.5 GMAC per image; adapters add a few per cent.
    assert 35.0e9 < plan["footprint"]["forward"] < 37.0e9


def test_settings_reach_the_plan() -> None:
    def terms(*more: str) -> tuple[dict[str, int], Footprint]:
        config, request = read_command_line(["--train.batch_per_domain=8", *more])
        plan = make_plan(config, request)
        return {t.name: t.bytes for t in plan.memory}, plan.footprint

    plain, whole = terms()
    wide, _ = terms("--train.precision=fp32")
    assert wide["frozen weights"] == 2 * plain["frozen weights"]
    _, pieces = terms("--train.accumulation=4")
    assert (whole.images, pieces.images) == (40, 10)
    _, checkpointed = terms("--model.grad_checkpointing=true")
    assert checkpointed.kept < whole.kept
    split, _ = terms("--world_size=4")
    assert split["Adam moments"] == -(-plain["Adam moments"] // 32) * 8


def test_flags_may_be_spelt_as_they_once_were() -> None:
    old = ["--world-size=2", "--gpu-memory", "8", "--num-classes=3"]
    new = ["--world_size=2", "--gpu_memory", "8", "--num_classes=3"]
    assert read_command_line(old) == read_command_line(new)


def plan_of(*argv: str) -> Plan:
    config, request = read_command_line(["--train.batch_per_domain=8", *argv])
    return make_plan(config, request)


def test_averages_reach_the_plan() -> None:
    plain, more = plan_of(), plan_of("--average.ema=true", "--average.swad=true")
    files = more.checkpoint_bytes - plain.checkpoint_bytes
    assert files > 8 * plain.adapter_bytes
    assert more.gpu_bytes - plain.gpu_bytes == 8 * 4 * plain.trainable


def test_precision_decides_about_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    for precision, rate in RATES.items():
        plan = plan_of(f"--train.precision={precision}")
        (alone,) = (p for p in plan.predictions if p.world == 1)
        assert alone.compute == pytest.approx(plan.load.flops * plan.load.images / rate)
        assert main([f"--train.precision={precision}"]) == 0
        title = " ".join(capsys.readouterr().out.split())
        assert f"{rate / 1e12:g} TFLOP/s a GPU in {precision}" in title
    assert RATES["fp32"] < 67e12 < RATES["bf16"]


def test_accumulation_reaches_the_prediction() -> None:
    sharing = ["--moa.ep_size=2", "--world_size=2", "--moa.transport=gather"]
    whole, pieces = plan_of(*sharing), plan_of(*sharing, "--train.accumulation=4")
    assert (whole.load.accumulation, pieces.load.accumulation) == (1, 4)
    assert pieces.load.expert_bytes == 4 * whole.load.expert_bytes > 0
    assert pieces.traffic["gather"] == 4 * whole.traffic["gather"]
    assert pieces.traffic["all_to_all"] == whole.traffic["all_to_all"]
    assert [p.world for p in pieces.predictions] == [2, 10], "40 images in 4 pieces, shared by 2"
    shared = {p.world: p for p in whole.predictions}
    assert all(p.gradients > shared[p.world].gradients for p in pieces.predictions)
    steps = [plan.load.operations - LOOP_OPERATIONS for plan in (whole, pieces)]
    assert steps[1] == 4 * steps[0]


def test_what_is_sent_is_what_the_layers_send() -> None:
    plan = plan_of("--moa.ep_size=2", "--world_size=2", "--moa.transport=all_to_all")
    config, _ = read_command_line(["--moa.ep_size=2"])
    backbone, _ = outline(config.model, config.moa, 10)
    layers = [layer for _, layer in moa_layers(backbone.model)]
    sent = traffic(layers, 17 * plan.batches.per_process, 2, 2)
    assert plan.load.expert_bytes == sent["all_to_all"]
    assert plan.load.transport == "all_to_all"


def test_a_transport_that_nothing_uses_is_not_refused(capsys: pytest.CaptureFixture[str]) -> None:
    masked = ["--moa.transport=all_to_all", "--moa.expert_dropout=0.2"]
    assert plan_of(*masked).load.transport is None
    assert main([*masked, "--moa.ep_size=2", "--world_size=2"]) == 2
    assert "moa.transport" in capsys.readouterr().err
    assert main(["--model.compile=blocks", "--moa.ep_size=2", "--world_size=2"]) == 2
    assert "--model.compile off, or --moa.ep_size 1" in capsys.readouterr().err


BACKBONES = {
    "vit_tiny_patch16_224": (197, 12),
    "vit_small_patch14_reg4_dinov2": (37**2 + 1 + 4, 12),
    "naflexvit_base_patch16_siglip": (24**2, 12),
    "mvitv2_tiny": (56**2, 10),
    "swin_tiny_patch4_window7_224": (56**2, 12),
    "hiera_tiny_224": (56**2, 12),
}
"""Most tokens of a layer, and blocks."""


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_of_all_builds_are_planned(name: str) -> None:
    plan = plan_of(f"--model.backbone={name}", "--moa.kron_dim=32", "--train.batch_per_domain=2")
    assert plan.load.modules == BACKBONES[name][1]
    assert plan.footprint.forward > 0
    settings = moa.MoAConfig(kron_dim=32, blocks="all")
    model = outline(ModelConfig(backbone=name), settings, 7)[0].model
    assert forward_only(model, 1)[1] == plan.footprint.tokens == BACKBONES[name][0]
    assert model.training


def test_a_run_counts_tokens_only_to_choose_a_transport() -> None:
    def tokens(*argv: str) -> int:
        # Whatever the model is: a backbone need not tell its number of patches.
        flags = ["--train.batch_per_domain=8", "--train.accumulation=2", *argv]
        return replace(build(parse(flags), World(0, 2, 0, 2)), model=nn.Identity()).tokens(
            World(0, 2, 0, 2)
        )

    assert tokens() == 0
    assert tokens("--moa.ep_size=2", "--moa.transport=gather") == 0
    assert tokens("--moa.ep_size=2") == 10 * 17, "40 images in two pieces on two processes"


def test_a_backbone_that_cannot_be_counted_has_no_utilisation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> Footprint:
        raise ValueError("too many values to unpack")

    config = replace(RunConfig(), train=replace(RunConfig().train, precision="bf16"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    device = torch.device("cuda")
    assert image_utilisation(config, device, 10, 1) is not None
    monkeypatch.setattr("trainer.prepare.footprint.measure", broken)
    assert image_utilisation(config, device, 10, 1) is None
    assert "vit_embedded" in caplog.text


def test_tables_are_plain_text_and_say_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpu_memory=80"]) == 0
    text = capsys.readouterr().out
    assert "80 GiB: fits" in text
    assert "\x1b" not in text
    paced = "host-bound: the GPU needs"
    for part in ("routers", "adapter file", "Adam moments", "GFLOP", "legal world sizes", paced):
        assert part in text
    assert main(["--gpu_memory=1"]) == 0
    text = capsys.readouterr().out
    assert "1 GiB: does not fit" in text
    assert "warning: the run does not fit in 1 GiB" in text


def bench_file(folder: Path, **tables: dict[str, Any]) -> str:
    """As `trainer.bench` writes it, of the embedded backbone in fp32 on a CPU."""
    content: dict[str, Any] = {"one layer, width 128": {"bare": {"ms": 1.0}}}
    for batch, rows in tables.items():
        setting = Setting("vit_embedded", int(batch.strip("_")), "cpu", torch.float32)
        content[str(setting)] = rows
    (folder / "cpu.json").write_text(json.dumps(content))
    return str(folder / "cpu.json")


def test_measured_rates_take_the_place_of_assumed_ones(tmp_path: Path) -> None:
    small = {"PEFT LoRA": {"ms": 6, "operations": 200}, "moa_kron": {"ms": 10, "operations": 500}}
    large = {"moa_kron": {"ms": 400, "operations": 500}, "moa_lora": {"ms": "out of memory"}}
    file = bench_file(tmp_path, _1=small, _400=large)
    plan = plan_of("--train.precision=fp32", f"--measured={file}")
    image = measure(planned(moa.MoAConfig(method="moa_lora"), classes=10), 1, 1)
    reached = 400 * (image.forward + image.backward) / 0.4
    assert (plan.rates.flops, plan.rates.operation) == (pytest.approx(reached), 10e-3 / 500)
    (alone,) = (p for p in plan.predictions if p.world == 1)
    assert alone.compute == pytest.approx(plan.load.flops * 40 / reached)
    # Where no step waits for its host nothing is known of that; another backbone is near enough.
    other = ["--model.backbone=vit_tiny_patch16_224", "--moa.kron_dim=32"]
    file = bench_file(tmp_path, _400=large)
    plan = plan_of("--train.precision=fp32", f"--measured={file}", *other)
    assert (plan.rates.flops, plan.rates.operation) == (pytest.approx(reached), 30e-6)


def test_a_benchmark_of_another_machine_is_refused_and_the_remedy_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = f"--measured={bench_file(tmp_path, _4={'moa_kron': {'ms': 8, 'operations': 500}})}"
    for more in ([], ["--gpu_memory=80", "--train.precision=fp32"]):
        assert main([measured, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "cpu.json was measured on cpu in fp32, and the run is planned for cuda in" in line
        assert ("with --train.precision fp32" in line) == (not more)
    assert main([measured, "--train.precision", "fp32"]) == 0
    assert "measured: " in capsys.readouterr().out
    for content in ("[1]", "{}", "{", '{"training step, x, batch 1, cpu, float32": {"a": {}}}'):
        (tmp_path / "cpu.json").write_text(content)
        assert main([measured]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "cpu.json" in line
        assert "trainer.bench --part step --json FILE" in line


def test_a_whole_table_is_runs_one_after_the_other_on_what_there_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--table", "--methods=moa_kron,lora", "--seeds=0,1", "--train.batch_per_domain=8"]
    config, request = read_command_line(argv)
    table = plan_table(config, request)
    assert (table.domains, table.seeds, table.runs) == (6, 2, 24)
    assert [choice.gpus for choice in table.choices] == [1, 2, 4, 8]
    for choice in table.choices:
        assert choice.gpu_hours == pytest.approx(choice.gpus * choice.wall_hours[choice.gpus])
        assert choice.bound == "host", "more GPUs a run are no faster"
        assert table.fastest(choice.gpus, 80) == 1
    assert table.choices[0].wall_hours[128] == table.choices[0].run_seconds / 3600
    assert table.fastest(8, 0.001) is None, "fits on no GPU"
    show_table(table, request)
    rows = [line for line in capsys.readouterr().out.splitlines() if "host-bound" in line]
    assert rows[0].count(" *") == len(POOLS)
    assert main(["--methods=lora", "--seeds=x"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_next_run_takes_the_first_place_that_is_free() -> None:
    assert makespan([3, 1, 1, 1, 2], 2) == 5
    assert makespan([3, 1], 4) == 3


def test_evaluations_are_counted_in_images() -> None:
    kept, whole = {"a": 80, "b": 160}, 400  # 20 and 40 held back, 100 in the domain held out
    full = parse(["--eval.mode=full"])
    assert images_evaluated(full, 3, kept, whole) == 3 * 400
    chosen = parse(["--eval.mode=selection", "--average.ema=true"])
    assert images_evaluated(chosen, 3, kept, whole) == 2 * (3 * 60 + 2 * 340)
    assert images_evaluated(full, 3, {}, 0) == 0


def test_folder_dataset_needs_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data.dataset=folder"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["--domains:", "--num_classes:"]
    plan = plan_json(capsys, "--data.dataset=folder", "--domains=3", "--num_classes=11")
    assert plan["run"]["classes"] == 11
    assert plan["batches"]["source_domains"] == 2
    assert plan["batches"]["epochs"] == {}


def test_shard_set_at_hand_gives_numbers_and_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = make_set(tmp_path)
    plan = plan_json(
        capsys, "--data.dataset=folder", f"--data.root={index.root}", "--train.steps=10",
        "--train.batch_per_domain=4",
    )  # fmt: skip
    assert plan["run"]["classes"] == len(index.classes) == 2
    sizes = [index.num_samples(env) for env in range(2)]
    sources = [n - int(n * 0.2) for n in sizes]
    wanted = {"art": 40 / sources[0], "photo": 40 / sources[1]}
    assert plan["batches"]["epochs"] == wanted, "the last domain is held out"


def test_weights_need_not_be_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_json(capsys, "--model.weights=/no/such/file.safetensors")["trainable"] > 0


def test_a_word_that_deepspeed_does_not_know_is_found_before_the_run_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ds.json"
    zero = {"stage": 2, "overlap_com": True}
    file.write_text(json.dumps({"zero_optimization": zero, "train_batch_size": 7}))
    assert main([f"--ds_config={file}"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [
        line for line in told if "overlap_com is not known; did you mean 'overlap_comm'" in line
    ]
    assert [line for line in told if "train_batch_size is 7" in line], "all at once"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--train.stepz=3"], ["train.stepz", "did you mean 'train.steps'"]),
        (["--world_size=7"], ["world size 7", "legal: 1, 2, 4"]),
        (["--world_size=0"], ["--world_size = '0'", ">= 1"]),
        (["--world_size=two", "--gpu_memory=nan"], ["--world_size = 'two'", "--gpu_memory"]),
        (["--world_size"], ["--world_size"]),
        (["--domains=1", "--optim.lr=fast"], ["--domains = '1'", "optim.lr"]),
        (["--model.backbone=vit_hug_patch16"], ["timm has no model 'vit_hug_patch16'"]),
        (["--moa.kron_dim=60"], ["moa.kron_dim", "60 does not divide"]),
        (["--moa.targets=[attn.qvk]"], ["attn.qvk", "attn.qkv"]),
        ([*DOMAINNET, "--data.held_out=photo"], ["'photo'", "clipart"]),
        (["--data.dataset=domainet"], ["did you mean 'domainnet'"]),
        (["--optim.lr", "-1"], ["optim.lr: -1"]),
        (["nonsense"], ["nonsense: not a setting"]),
    ],
)
def test_bad_input_ends_with_exit_code_2(
    argv: Sequence[str], words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "data.root" not in captured.err
    for word in words:
        assert word in captured.err
