"""Merged models compute what the adapted ones did; what cannot be merged stays as it was."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from moa import MoAConfig, MoAConfigError, MoALinear, inject, merge
from moa.layers.layer import moa_layers
from tests.support.moa_fixtures import (
    assert_untouched,
    dense_update,
    images,
    small_config,
    snapshot,
    stir,
    tiny_vit,
)

MERGEABLE: dict[str, dict[str, object]] = {
    "lora": {},
    "kadaptation": {},
    "multi_lora": {},
    "multi_lora shared": {"shared_rank": 2},
    "moa_lora uniform": {"router": "uniform"},
    "moa_kron uniform": {"router": "uniform", "shared_rank": 1},
}


def mergeable(case: str, **changes: object) -> MoAConfig:
    return small_config(case.split()[0], **MERGEABLE[case], **changes)


def adapted(config: MoAConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_vit().to(dtype)
    inject(model, config)
    stir(model)
    return model.eval()


def distance(given: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest wanted number."""
    return ((given - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("case", MERGEABLE)
def test_outputs_stay(case: str, dtype: torch.dtype, limit: float) -> None:
    model, x = adapted(mergeable(case), dtype), images(4, dtype=dtype)
    paths = [path for path, _ in moa_layers(model)]
    bare = copy.deepcopy(model)
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(bare.get_submodule(parent), name, bare.get_submodule(path).base)
    with torch.no_grad():
        wanted, without = model(x), bare(x)
        assert distance(without, wanted) > 1e-2  # the adapters do count
        merge(model)
        assert distance(model(x), wanted) < limit

    assert not list(moa_layers(model))
    assert not hasattr(model, "kron_rule")
    assert set(model.state_dict()) == set(tiny_vit().state_dict())
    for path in paths:
        layer = model.get_submodule(path)
        assert type(layer) is nn.Linear
        assert not any(p.requires_grad for p in layer.parameters())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "head.weight",
        "head.bias",
    }
    tiny_vit().to(dtype).load_state_dict(model.state_dict())  # a plain timm checkpoint


@pytest.mark.parametrize("case", ["lora", "moa_kron uniform"])
@pytest.mark.parametrize("training", [False, True])
def test_mode_and_dtype_stay(case: str, training: bool) -> None:
    model = adapted(mergeable(case, expert_dropout=0.5), torch.bfloat16).train(training)
    merge(model)
    assert all(module.training == training for module in model.modules())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    x = images(2, dtype=torch.bfloat16)
    assert torch.equal(model(x), model(x))  # dropout is gone


def test_merged_model_trains_its_head() -> None:
    model = adapted(mergeable("lora"))
    merge(model)
    model(images(2)).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "head.weight",
        "head.bias",
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    case=st.sampled_from(sorted(MERGEABLE)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    kron_dim=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    ranks=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_layer(
    case: str,
    dtype: torch.dtype,
    kron_dim: int,
    sizes: tuple[int, int],
    ranks: list[int],
    bias: bool,
    seed: int,
) -> None:
    """Against weights spelled out in float64 and rounded; a lone layer has a rule of its own."""
    torch.manual_seed(seed)
    base = nn.Linear(kron_dim * sizes[0], kron_dim * sizes[1], bias=bias, dtype=dtype)
    config = mergeable(case, kron_dim=kron_dim)
    kept = tuple(ranks) if config.mixes else (ranks[0],)
    layer = MoALinear(base, mergeable(case, kron_dim=kron_dim, ranks=kept))
    stir(layer, seed)
    exact = copy.deepcopy(layer).double()
    model = nn.Sequential(layer)
    merge(model)

    weights = [1.0] * len(kept)
    if config.mixes:
        weights = exact.router.logits.softmax(0).tolist()  # type: ignore[union-attr]
    weights += [1.0] * bool(config.shared_rank)
    rule = exact._shared_rule[0].double() if config.kronecker else None
    with torch.no_grad():
        delta = sum(
            w * dense_update(e, rule).T for w, e in zip(weights, exact.all_experts(), strict=True)
        )
        wanted = exact.base.weight + delta
        merged = model[0]
        ulp = torch.finfo(dtype).eps  # summed in another order, a last digit may fall elsewhere
        torch.testing.assert_close(merged.weight, wanted.to(dtype), rtol=2 * ulp, atol=2 * ulp)
        assert merged.weight.dtype == dtype
        assert not any(p.requires_grad for p in merged.parameters())
        if config.kronecker:
            offset = exact.base.bias if bias else 0.0
            assert torch.equal(merged.bias, (exact.bias + offset).to(dtype))
        elif bias:
            assert torch.equal(merged.bias.double(), exact.base.bias)
        else:
            assert merged.bias is None


def test_a_small_update_survives_where_the_sum_can_hold_it() -> None:
    """bf16 numbers near one are 2^-7 apart: the update must not be rounded before it is added."""
    base = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    layer = MoALinear(base, MoAConfig(method="lora", ranks=(1,)))
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, -1.0]]))
        layer.experts[0].up.fill_(1 + 2**-7)
        layer.experts[0].down.copy_(torch.tensor([[2**-8 * (1 - 2**-8), 2**-8 * (1 - 2**-8)]]))
    # The update is 2^-8 (1 + 2^-8 - 2^-15), just above half a step; rounded alone it is 2^-8, a
    # tie that falls to the even neighbour, which is one.
    merge(model := nn.Sequential(layer))
    assert model[0].weight[0, 0].item() == 1 + 2**-7


VARIANTS = {
    "eva": "eva02_tiny_patch14_224",
    "beit": "beit_base_patch16_224",
    "plain": "vit_tiny_patch16_224",
}


@pytest.mark.parametrize("method", ["lora", "kadaptation"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_vision_transformers(variant: str, method: str) -> None:
    torch.manual_seed(0)
    size = 28 if variant == "eva" else 32
    model = timm.create_model(
        VARIANTS[variant],
        img_size=size,
        depth=2,
        embed_dim=48 if variant == "eva" else 96,
        num_heads=3,
        num_classes=3,
    )
    inject(model, small_config(method, targets=("attn.qkv", "attn.proj", "mlp.*")))
    stir(model, scale=0.1)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = model.eval()(x)
        merge(model)
        assert distance(model(x), wanted) < 1e-5
        if method == "lora":  # nothing but values differ from a plain timm model
            for module in model.modules():
                if hasattr(module, "qkv_bias_separate"):
                    module.qkv_bias_separate = False
            assert distance(model(x), wanted) < 1e-5


@pytest.mark.parametrize(
    ("method", "router"),
    [(m, r) for m in ("moa_lora", "moa_kron") for r in ("cosine", "linear", "soft")],
)
def test_token_routing_is_refused(method: str, router: str) -> None:
    model = adapted(small_config(method, router=router, shared_rank=1))
    before = snapshot(model)
    reason = f"moa.method: '{method}' with router '{router}' cannot be merged: .*the token"
    with pytest.raises(MoAConfigError, match=reason) as caught:
        merge(model)
    assert "moa.save_adapter" in str(caught.value)
    assert_untouched(model, before)


@pytest.mark.parametrize("method", ["full", "linear", "bias", "attention"])
def test_nothing_to_merge(method: str) -> None:
    model = adapted(small_config(method))
    before = snapshot(model)
    with pytest.raises(MoAConfigError, match="no adapters, so there is nothing to be merged"):
        merge(model)
    assert_untouched(model, before)


def test_merged_twice() -> None:
    model = adapted(mergeable("kadaptation"))
    merge(model)
    before = snapshot(model)
    with pytest.raises(MoAConfigError, match="nothing to be merged: it was merged before"):
        merge(model)
    assert_untouched(model, before)
    inject(model, small_config("lora"))  # it is a fresh model again


def test_a_lone_layer_cannot_replace_itself() -> None:
    layer = MoALinear(nn.Linear(4, 4), MoAConfig(method="lora"))
    with pytest.raises(MoAConfigError, match="itself an adapted layer"):
        merge(layer)
