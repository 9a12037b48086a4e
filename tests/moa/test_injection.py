import copy
import itertools
from functools import cache, partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from moa import (
    AdapterInfo,
    MoAConfig,
    MoAConfigError,
    MoALinear,
    NoMatchingModuleError,
    adapter_state_dict,
    base_hash,
    export_peft,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from moa.layers.layer import moa_layers
from moa.layers.router import make_router
from tests.support.moa_fixtures import (
    ADAPTERS,
    DIM,
    METHODS,
    assert_untouched,
    images,
    small_config,
    snapshot,
    stir,
    tiny_vit,
)

COUNTS = {
    "vit_base_patch16_clip_224": (110_592, 294_912, 1_463_814, 1_485_830),
    "vit_large_patch14_clip_224": (294_912, 786_432, 3_898_380, 3_943_436),
    "vit_giant_patch14_clip_224": (675_840, 1_802_240, 8_924_180, 9_016_852),
    "vit_gigantic_patch14_clip_224": (958_464, 2_555_904, 12_650_520, 12_778_520),
}
COLUMNS = (
    MoAConfig(method="lora"),
    MoAConfig(method="lora", ranks=(8,), targets=("attn.qkv",)),
    MoAConfig(method="moa_lora"),
    MoAConfig(method="moa_kron"),
)
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@cache
def outline(backbone: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(backbone, num_classes=7)
    return model


@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("backbone", COUNTS)
def test_trainable_counts(backbone: str, column: int) -> None:
    model = copy.deepcopy(outline(backbone))
    width = model.num_features
    total = sum(p.numel() for p in model.parameters())
    report = inject(model, COLUMNS[column])
    wanted = COUNTS[backbone][column]
    assert report.trainable - report.head == wanted
    assert report.head == 7 * (width + 1)  # type: ignore[operator]
    assert report.total == total + wanted
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == report.trainable
    assert all(p.device.type == "meta" for p in model.parameters())


def paths(blocks: list[int], names: tuple[str, ...] = ("attn.qkv",)) -> tuple[str, ...]:
    return tuple(f"blocks.{block}.{name}" for block in blocks for name in names)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, paths([0, 2])),
        ({"blocks": "every_3"}, paths([0, 3])),
        ({"blocks": "all"}, paths([0, 1, 2, 3])),
        ({"blocks": "last_2"}, paths([2, 3])),
        ({"blocks": (3, 1)}, paths([1, 3])),
        ({"method": "lora"}, paths([0, 1, 2, 3], ("attn.qkv", "attn.proj"))),
        ({"targets": ("mlp.fc1",)}, paths([0, 2], ("mlp.fc1",))),
        ({"targets": ("attn.proj", "mlp.fc2")}, paths([0, 2], ("attn.proj", "mlp.fc2"))),
        ({"targets": ("mlp.fc2", "attn.qkv")}, paths([0, 2], ("attn.qkv", "mlp.fc2"))),
        ({"targets": ("mlp.*", "mlp.fc1")}, paths([0, 2], ("mlp.fc1", "mlp.fc2"))),
        ({"targets": ("*",), "blocks": (1,)}, paths([1], LINEARS)),
        ({"targets": ("attn.[pq]*",), "blocks": (1,)}, paths([1], LINEARS[:2])),
    ],
)
def test_targets_and_blocks(changes: dict[str, object], layers: tuple[str, ...]) -> None:
    model = tiny_vit()
    report = inject(model, small_config(**{"method": "moa_kron", **changes}))  # type: ignore[arg-type]
    assert report.layers == layers
    assert tuple(name for name, _ in moa_layers(model)) == layers
    assert model(images(2)).shape == (2, 3)


def test_more_than_nine_blocks_keep_their_order() -> None:
    report = inject(tiny_vit(depth=11), small_config("lora", targets=("attn.qkv",)))
    assert report.layers == paths(list(range(11)))


def test_linear_trains_the_head_only() -> None:
    model = tiny_vit()
    modules = [type(module) for module in model.modules()]
    report = inject(model, MoAConfig(method="linear"))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    assert [type(module) for module in model.modules()] == modules
    assert report.layers == ()
    assert report.trainable == report.head == 3 * (DIM + 1) < report.total


def test_full_trains_everything() -> None:
    model = tiny_vit()
    model.requires_grad_(False)
    report = inject(model, MoAConfig(method="full"))
    assert all(p.requires_grad for p in model.parameters())
    assert report.layers == ()
    assert report.trainable == report.total == sum(p.numel() for p in model.parameters())
    assert report.head == 3 * (DIM + 1)


ROUTER = ("router.proj.weight", "router.proj.bias", "router.embed", "router.temperature")
BASE = ("base.weight", "base.bias")
LORA = ("down", "up")
KRON = ("left", "right")
NAMES = {
    "lora": [f"experts.0.{part}" for part in LORA],
    "kadaptation": ["bias", *(f"experts.0.{part}" for part in KRON)],
    "multi_lora": [*(f"experts.{e}.{part}" for e in range(3) for part in LORA), "router.logits"],
    "moa_lora": [*(f"experts.{e}.{part}" for e in range(3) for part in LORA), *ROUTER],
    "moa_kron": ["bias", *(f"experts.{e}.{part}" for e in range(3) for part in KRON), *ROUTER],
}


@pytest.mark.parametrize("method", ADAPTERS)
def test_parameter_names(method: str) -> None:
    model = tiny_vit()
    original = set(model.state_dict())
    inject(model, small_config(method, targets=("attn.qkv",), blocks=(1,)))
    place = "blocks.1.attn.qkv."
    wrapped = {place + "weight", place + "bias"}
    adapter = {place + name for name in NAMES[method]}
    if method in ("kadaptation", "moa_kron"):
        adapter |= {"kron_rule.left", "kron_rule.right"}
    expected = (original - wrapped) | {place + name for name in BASE} | adapter
    assert set(model.state_dict()) == expected
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == adapter | {"head.weight", "head.bias"}


def test_parameter_shapes() -> None:
    model = tiny_vit()
    inject(model, small_config("moa_kron", ranks=(1, 4), blocks=(0,), targets=("mlp.fc1",)))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    place = "blocks.0.mlp.fc1."
    assert shapes == {
        "kron_rule.left": (8, 8),
        "kron_rule.right": (8, 8),
        place + "bias": (64,),
        place + "experts.0.left": (8, 2, 1),
        place + "experts.0.right": (8, 1, 8),
        place + "experts.1.left": (8, 2, 4),
        place + "experts.1.right": (8, 4, 8),
        place + "router.proj.weight": (8, 16),
        place + "router.proj.bias": (8,),
        place + "router.embed": (8, 2),
        place + "router.temperature": (1,),
        "head.weight": (3, 16),
        "head.bias": (3,),
    }


@pytest.mark.parametrize("method", ADAPTERS)
def test_base_weights_stay_the_same_objects(method: str) -> None:
    model = tiny_vit()
    weights = {id(p): p.detach().clone() for p in model.parameters()}
    inject(model, small_config(method))
    kept = {id(p): p for p in model.parameters() if id(p) in weights}
    assert len(kept) == len(weights)
    for key, parameter in kept.items():
        assert torch.equal(parameter, weights[key])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_adapters_take_dtype_and_mode(training: bool, dtype: torch.dtype) -> None:
    model = tiny_vit().to(dtype).train(training)
    inject(model, small_config("moa_kron"))
    assert all(p.dtype == dtype for p in model.parameters())
    for _, layer in moa_layers(model):
        assert all(module.training == training for module in layer.modules())


def test_one_rule_for_all_layers() -> None:
    model = tiny_vit()
    inject(model, small_config("kadaptation"))
    rules = [name for name, _ in model.named_modules() if name.endswith("kron_rule")]
    assert rules == ["kron_rule"]
    model.train()(images(2)).sum().backward()
    assert all(p.grad.count_nonzero() > 0 for p in model.kron_rule.parameters())  # type: ignore[union-attr]


def without_blocks() -> nn.Module:
    """A model with a classifier and no blocks."""
    return timm.create_model("resnet10t", num_classes=2)


def injected_already() -> nn.Module:
    model = tiny_vit()
    inject(model, small_config("lora"))
    return model


REFUSED = [
    (tiny_vit, {"targets": ("attn.key",)}, NoMatchingModuleError, "'attn.key' matches no linear"),
    (
        tiny_vit,
        {"targets": ("attn.qkv", "qkv")},
        NoMatchingModuleError,
        "'qkv' .*these would match: attn.proj, attn.qkv, mlp.fc1, mlp.fc2$",
    ),
    (
        tiny_vit,
        {"targets": ("norm1",)},
        NoMatchingModuleError,
        r"\(it matches blocks.0.norm1, which is LayerNorm\); these would match: attn.proj",
    ),
    (
        tiny_vit,
        {"method": "bias", "targets": ("mlp.act",)},
        NoMatchingModuleError,
        "'mlp.act' matches no part that bias can train .* would match: attn.proj, attn.qkv",
    ),
    (
        tiny_vit,
        {"method": "attention", "targets": ("attn.key",)},
        NoMatchingModuleError,
        "'attn.key' matches no part that attention can train",
    ),
    (tiny_vit, {"targets": ()}, MoAConfigError, r"moa.targets: \[\]"),
    (without_blocks, {}, NoMatchingModuleError, "ResNet has no linear layers under `blocks.N`"),
    (
        tiny_vit,
        {"kron_dim": 12},
        MoAConfigError,
        r"kron_dim: 12 .* the width 16 of blocks.0.attn.qkv; .* 256: 1, 2, 4, 8, 16$",
    ),
    (
        tiny_vit,
        {"kron_dim": 3, "targets": ("mlp.*",), "blocks": (2,)},
        MoAConfigError,
        "the width 16 of blocks.2.mlp.fc1; .* 1, 2, 4, 8, 16$",
    ),
    (tiny_vit, {"method": "kadaptation", "kron_dim": 32}, MoAConfigError, "kron_dim: 32"),
    (tiny_vit, {"blocks": (0, 4)}, MoAConfigError, r"\[0, 4\]; the model has blocks 0 to 3"),
    (tiny_vit, {"blocks": (-1,)}, MoAConfigError, "blocks 0 to 3"),
    (tiny_vit, {"blocks": ()}, MoAConfigError, "blocks 0 to 3"),
    (tiny_vit, {"blocks": "last_5"}, MoAConfigError, "'last_5'; the model has only 4 blocks"),
    (tiny_vit, {"top_k": 9}, MoAConfigError, "moa.top_k: 9"),
    (partial(nn.Linear, 2, 2), {}, MoAConfigError, "Linear is no timm model; give one of timm"),
    (tiny_vit, {"method": "adapter"}, MoAConfigError, "moa.method: 'adapter'"),
    *((injected_already, {"method": m}, MoAConfigError, "blocks.0.*fresh model") for m in METHODS),
    *(
        (lambda: tiny_vit(num_classes=0), {"method": m}, MoAConfigError, "num_classes > 0")
        for m in METHODS
    ),
]


@pytest.mark.parametrize(("build", "changes", "error", "message"), REFUSED)
def test_refused_injection_leaves_the_model_untouched(
    build, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    model = build()
    next(model.parameters()).requires_grad_(False)  # any pattern must survive
    before = snapshot(model)
    with pytest.raises(error, match=message):
        inject(model, small_config(**{"method": "moa_kron", **changes}))  # type: ignore[arg-type]
    assert_untouched(model, before)


def test_an_injection_that_fails_halfway_leaves_the_model_untouched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one that needs more memory than there is."""
    model = tiny_vit()
    next(model.parameters()).requires_grad_(False)
    before, number = snapshot(model), itertools.count()

    def router(*given: object) -> object:
        if next(number) == 1:
            raise MemoryError
        return make_router(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("moa.layers.layer.make_router", router)
    with pytest.raises(MemoryError):
        inject(model, small_config("moa_kron"))
    assert next(number) == 2
    assert_untouched(model, before)


def test_a_probe_can_be_followed_by_adapters() -> None:
    """`linear` wraps nothing, so the model still counts as fresh."""
    model = tiny_vit()
    inject(model, MoAConfig(method="linear"))
    report = inject(model, small_config("lora"))
    assert len(report.layers) == 8
    assert isinstance(model.get_submodule(report.layers[0]), MoALinear)


def with_statistics() -> nn.Module:
    """A transformer with BatchNorm in its stem and in its blocks."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "num_heads": 2, "depth": 2, "img_size": 32}
    model: nn.Module = timm.create_model("xcit_nano_12_p16_224", num_classes=3, **sizes)
    return model


@pytest.mark.parametrize("method", ["full", "linear", "bias", "lora"])
def test_what_is_saved_is_what_was_trained_also_with_running_statistics(method: str) -> None:
    model, fresh = with_statistics(), with_statistics()
    config = MoAConfig(method=method, blocks="all")  # type: ignore[arg-type]
    inject(model, config)
    stir(model, scale=0.1)
    model = copy.deepcopy(model)
    x = 3 * torch.randn(4, 3, 32, 32) + 2
    for _ in range(3):
        trained = model.train()(x)
    inject(fresh, config)
    fresh.load_state_dict(adapter_state_dict(model), strict=False)
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert torch.equal(trained, model(x)), "training sees the base that evaluation sees"


def test_a_merged_model_has_statistics_that_follow_again() -> None:
    model = with_statistics()
    inject(model, MoAConfig(method="lora", blocks="all"))
    merge(model)
    before = copy.deepcopy(dict(model.named_buffers()))
    model.train()(torch.randn(4, 3, 32, 32))
    moved = [n for n, b in model.named_buffers() if "running" in n and not b.equal(before[n])]
    assert len(moved) == len([name for name in before if "running" in name]) > 0


def test_both_heads_of_a_distilled_model_train_and_are_saved(tmp_path: Path) -> None:
    def distilled(classes: int) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"embed_dim": 16, "num_heads": 2, "depth": 2, "img_size": 32}
        model: nn.Module = timm.create_model("deit_tiny_distilled_patch16_224", **sizes)
        model.reset_classifier(classes)  # type: ignore[operator]
        return model.eval()

    model, config = distilled(3), MoAConfig(method="lora")
    sha256 = base_hash(model)
    assert sha256 == base_hash(distilled(5)), "no head is part of the base"
    report = inject(model, config)
    assert report.head == 2 * 3 * 17
    stir(model)
    info = AdapterInfo("deit_tiny_distilled_patch16_224", sha256, config, ("a", "b", "c"), {})
    save_adapter(model, tmp_path / "adapter", info)
    loaded, x = distilled(5), torch.randn(2, 3, 32, 32)
    load_adapter(loaded, tmp_path / "adapter")
    assert loaded(x).shape == (2, 3)
    assert torch.equal(loaded(x), model(x))
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(MoAConfigError, match=r"two classifiers, .*keep the adapter as"):
        export_peft(model, tmp_path / "peft", info.base_model)
