"""What a model of adapted layers does as a whole, on the kinds of vision transformers timm has."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import timm
import torch
from timm.layers import SwiGLU
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moa import (
    MoALinear,
    adapter_state_dict,
    aux_loss,
    inject,
    routing_stats,
    set_routing_position,
    update_balance,
)
from moa.layers.experts import overlap
from moa.layers.layer import moa_layers
from tests.support.moa_fixtures import (
    ADAPTERS,
    MIXTURES,
    SEVERAL,
    images,
    position,
    small_config,
    stir,
    tiny_vit,
)

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
SMALL["num_classes"] = 3
VITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "plain": (tiny_vit, "attn.qkv"),
    "layer scale, no class token, attention pooling": (
        partial(VisionTransformer, **SMALL, init_values=0.5, class_token=False, global_pool="map"),
        "attn.qkv",
    ),
    "q and k norms, swiglu": (
        partial(VisionTransformer, **SMALL, qk_norm=True, mlp_layer=SwiGLU),
        "attn.qkv",
    ),
    "EVA, separate q k v, swiglu": (
        partial(Eva, **SMALL, qkv_fused=False, swiglu_mlp=True, scale_mlp=True),
        "attn.[qkv]_proj",
    ),
    "EVA, fused qkv with its bias apart": (partial(Eva, **SMALL, qkv_fused=True), "attn.qkv"),
    "BEiT": (partial(Beit, **SMALL, use_rel_pos_bias=True), "attn.qkv"),
}


def made(name: str) -> tuple[nn.Module, str]:
    build, target = VITS[name]
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():  # timm starts biases and heads at zero, which would hide a lost one
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.double(), target


@pytest.mark.parametrize("method", ["lora", "moa_lora", "moa_kron", "bias", "attention"])
@pytest.mark.parametrize("name", VITS)
def test_kinds_of_vision_transformers(name: str, method: str) -> None:
    model, target = made(name)
    x = images(3, dtype=torch.float64)
    before = model.eval()(x).detach()
    changes: dict[str, object] = {}
    if method in ADAPTERS:
        changes["targets"] = (target,)
    if method in MIXTURES:
        changes["top_k"] = 3  # every expert gets a gradient
    report = inject(model, small_config(method, **changes))
    after = model(x)
    bound = 1e-3 if method == "moa_kron" else 1e-12
    torch.testing.assert_close(after, before, rtol=bound, atol=bound)
    stir(model)
    assert not torch.allclose(model(x), before)  # no layer is passed by
    model.train()
    (model(x).square().sum() + aux_loss(model)).backward()
    for path, parameter in model.named_parameters():
        trains = parameter.requires_grad
        # a bias of k adds the same to all scores of a token: its gradient is but rounding
        assert (parameter.grad is not None and parameter.grad.isfinite().all()) == trains, path
        if trains and "bias" not in path:
            assert parameter.grad.count_nonzero() > 0, path  # type: ignore[union-attr]
    assert report.layers


@pytest.mark.parametrize(
    ("backbone", "target", "layers"),
    [
        ("vit_large_patch14_dinov2", "attn.qkv", 12),
        ("vit_giant_patch14_dinov2", "attn.qkv", 20),
        ("eva02_large_patch14_224", "attn.[qkv]_proj", 36),
        ("eva_giant_patch14_224", "attn.qkv", 20),
        ("vit_so400m_patch14_siglip_224", "attn.qkv", 14),
        ("beit_large_patch16_224", "attn.qkv", 12),
    ],
)
def test_large_backbones_by_name(backbone: str, target: str, layers: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(backbone, num_classes=7)
        config = small_config("moa_lora", ranks=(1, 2, 4, 8), targets=(target,))
        report = inject(model, config)
    assert len(report.layers) == layers
    assert {int(path.split(".")[1]) % 2 for path in report.layers} == {0}


# The methods that train parts of the backbone.


def test_attention_trains_attention_and_head() -> None:
    model = tiny_vit()
    report = inject(model, small_config("attention"))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in model.named_parameters() if ".attn." in n or n[:5] == "head."}
    assert set(report.layers) == {n for n in names if n[:5] != "head."}
    assert report.trainable == sum(dict(model.named_parameters())[n].numel() for n in names)


def test_attention_of_the_papers_backbone_counts_28_million() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_clip_224", num_classes=345)
        report = inject(model, small_config("attention"))
    assert report.trainable - report.head == 12 * 4 * 768 * 769  # 28.4 M in the paper's table


def test_bias_trains_biases_of_the_chosen_parts() -> None:
    model = tiny_vit()
    inject(model, small_config("bias", blocks="last_2", targets=("attn.*",)))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    biases = {f"blocks.{b}.attn.{part}.bias" for b in (2, 3) for part in ("qkv", "proj")}
    assert names == biases | {"head.weight", "head.bias"}


# Memory.


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Sizes of the tensors that autograd saves, each storage once, parameters left out."""
    sizes: dict[int, int] = {}
    total: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not tensor.is_leaf:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(sizes.values()))


def test_blocks_before_the_first_adapted_one_keep_no_graph() -> None:
    model = tiny_vit()
    inject(model, small_config("moa_kron", blocks="last_1"))
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    with saved_bytes() as late:
        model(images(2)).sum()
    assert [output.requires_grad for output in outputs] == [False, False, False, True]
    early = tiny_vit()
    inject(early, small_config("moa_kron", blocks=(0,)))
    with saved_bytes() as all_blocks:
        early(images(2)).sum()
    assert 0 < late[0] < 0.6 * all_blocks[0]


class CountLarge(TorchDispatchMode):
    """Counts results with at least `size` numbers in memory of their own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.seen = size, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.numel() >= self.size:
                self.seen.add(tensor)
        return result


@pytest.mark.parametrize("method", MIXTURES)
def test_no_temporary_per_expert(method: str) -> None:
    """As many [N, O] results, and as many saved bytes, for eight experts as for two."""
    counts, kept = [], []
    for ranks in ((4, 4), (1,) * 8):
        torch.manual_seed(0)
        config = small_config(method, ranks=ranks, top_k=2)
        layer = MoALinear(nn.Linear(64, 192), config)
        x = torch.randn(50, 64, requires_grad=True)
        with CountLarge(50 * 192) as counter, saved_bytes() as saved:
            layer(x).sum().backward()
        counts.append(len(counter.seen))
        kept.append(saved[0])
    assert counts[0] == counts[1]
    assert kept[1] - kept[0] < 4 * 50 * 8 * 8  # a few [N, E]


# Compilation.


@pytest.mark.parametrize("method", ADAPTERS)
def test_compiles_without_a_graph_break(method: str) -> None:
    changes = {"balance": "bias", "shared_rank": 2} if method == "moa_kron" else {}
    torch.manual_seed(0)
    layer = MoALinear(nn.Linear(16, 24), small_config(method, expert_dropout=0.2, **changes))
    stir(layer)
    x = torch.randn(3, 5, 16, requires_grad=True)

    def results(forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        layer.zero_grad()
        x.grad = None
        set_routing_position(layer, position(first=1))
        y = forward(x)
        aux = aux_loss(layer)
        (y.square().sum() + aux).backward()
        grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
        stats = {f"stat {n}": s for n, s in routing_stats(layer).get("", {}).items()}
        assert x.grad is not None
        return {"y": y.detach(), "aux": aux.detach(), "x": x.grad.clone(), **grads, **stats}

    eager = results(layer)
    torch._dynamo.reset()
    compiled = results(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    assert compiled.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)


# Transforms of torch.func.


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("method", ADAPTERS)
def test_gradients_of_each_image(method: str) -> None:
    """As for Fisher information: per image by vmap, and their sum, against plain backward."""
    model = tiny_vit()
    inject(model, small_config(method))
    stir(model)
    model.eval()
    given = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    x = images(3)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(given, x.unsqueeze(1))
    model(x).square().sum().backward()
    for name, parameter in given.items():
        assert parameter.grad is not None
        torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", SEVERAL)
def test_diversity_is_added_to_the_auxiliary_loss(method: str) -> None:
    losses = []
    for weight in (0.0, 0.25):
        model = tiny_vit()
        inject(model, small_config(method, diversity=weight))
        stir(model)
        model(images(4))
        losses.append(aux_loss(model))
    shared = overlap([list(layer.experts) for _, layer in moa_layers(model)])
    assert losses[1].item() == pytest.approx(losses[0].item() + 0.25 * shared.item(), rel=1e-5)
    assert shared > 0.01


# Balance by bias.


def test_balance_raises_the_bias_of_idle_experts() -> None:
    model = tiny_vit()
    inject(model, small_config("moa_lora", balance="bias", balance_rate=0.03))
    stir(model)
    with torch.no_grad():  # the first expert is every token's favourite
        for _, layer in moa_layers(model):
            layer.router.proj.bias.fill_(1.0)  # type: ignore[union-attr]
            layer.router.embed[:, 0] = 1.0  # type: ignore[index, union-attr]
            layer.router.temperature.fill_(1.5)  # type: ignore[union-attr]
    loads = []
    for step in range(90):
        set_routing_position(model, position(step=step))
        model(images(6, seed=step))
        loads.append(torch.stack([s["load"] for s in routing_stats(model).values()]))
        assert aux_loss(model).item() == 0  # instead of the loss
        update_balance(model)
    first, last = torch.stack(loads[:5]).mean(0), torch.stack(loads[-30:]).mean(0)
    assert (first[:, 0] > 0.6).all(), first
    assert (last - 1 / 3).abs().max() < 0.1, last
    for _, layer in moa_layers(model):
        steps = layer.router.balance_steps  # type: ignore[union-attr]
        assert steps.dtype == torch.int64
        assert steps[0] < steps[1:].min()


def test_balance_counts_micro_batches_and_ranks_together() -> None:
    def steps_of(shares: tuple[int, ...]) -> dict[str, Tensor]:
        model = tiny_vit().double()
        inject(model, small_config("moa_kron", balance="bias"))
        stir(model)
        first = 0
        for share in shares:
            set_routing_position(model, position(first=first))
            model(images(6, dtype=torch.float64)[first : first + share])
            first += share
        update_balance(model)
        update_balance(model)  # nothing ran since
        moved = adapter_state_dict(model)
        return {n: t.clone() for n, t in moved.items() if n.endswith("balance_steps")}

    whole = steps_of((6,))
    assert len(whole) == 2
    assert any(t.abs().sum() > 0 for t in whole.values())
    for shares in ((1, 2, 3), (3, 3)):
        parts = steps_of(shares)
        assert all(torch.equal(parts[name], steps) for name, steps in whole.items())


def test_balance_over_ranks_is_one_sum() -> None:
    model = tiny_vit()
    inject(model, small_config("moa_lora", balance="bias"))
    model(images(4))
    seen: list[Tensor] = []

    def sum_over_ranks(local: Tensor) -> Tensor:
        seen.append(local)
        return torch.tensor([[9.0, 1.0, 5.0], [2.0, 2.0, 2.0]])

    update_balance(model, sum_over_ranks)
    assert [tuple(t.shape) for t in seen] == [(2, 3)]
    assert seen[0].sum().item() == 2 * 4 * 5
    moved = [t.tolist() for n, t in adapter_state_dict(model).items() if "balance_steps" in n]
    assert moved == [[-1, 1, 0], [0, 0, 0]]


def test_the_key_third_of_a_trained_bias_matters_to_nothing() -> None:
    """So its gradient is rounding, which Adam makes steps of (docs/distributed.md)."""
    model = tiny_vit(depth=2).double().eval()
    inject(model, small_config("moa_kron", blocks="all"))
    stir(model)
    x = images(4, dtype=torch.float64)
    model(x).logsumexp(-1).sum().backward()
    before = model(x)
    with torch.no_grad():
        for _, layer in moa_layers(model):
            assert layer.bias is not None
            assert layer.bias.grad is not None
            query, key, value = layer.bias.grad.abs().chunk(3)
            assert key.max() < 1e-14
            assert min(query.max(), value.max()) > 1e-6
            layer.bias.chunk(3)[1].add_(3)
    assert torch.allclose(model(x), before, rtol=0, atol=1e-12)
