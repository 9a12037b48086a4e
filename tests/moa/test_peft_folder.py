"""Folders of the real PEFT library and ours, in both directions."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lazy_loader
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moa import (
    AdapterError,
    MoAConfig,
    MoAConfigError,
    adapter_state_dict,
    base_hash,
    export_peft,
    import_peft,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from moa.files.reading import AdapterInfo
from moa.files.saving import CONFIG_FILE, WEIGHTS_FILE
from moa.layers.layer import moa_layers
from tests.support.moa_fixtures import (
    assert_equal_tensors,
    assert_untouched,
    images,
    small_config,
    snapshot,
    stir,
    tiny_vit,
)

# Where nothing may be skipped, a missing library is an error.
if not os.environ.get("MOA_NO_SKIPS") and importlib.util.find_spec("peft") is None:
    pytest.skip("peft is missing", allow_module_level=True)
peft = lazy_loader.load("peft")  # it takes seconds, which other tests need not wait for

A, B = (f"base_model.model.blocks.1.attn.qkv.lora_{letter}.weight" for letter in "AB")
QKV = r"blocks\.\d+\.attn\.qkv"
DEPTH = 12  # so that there is a block 1 and a block 11


def distance(given: Tensor, wanted: Tensor) -> float:
    return ((given - wanted).abs().max() / wanted.abs().max()).item()


def fresh(num_classes: int = 3, depth: int = 4) -> nn.Module:
    """The same base every time, with a head that no other model has."""
    model = tiny_vit(num_classes, depth).eval()
    torch.manual_seed(7)
    nn.init.normal_(model.head.weight)
    return model


def peft_model(seed: int = 4, depth: int = 4, **changes: Any) -> nn.Module:
    """A LoRA model of PEFT in which every trainable number has moved."""
    settings = {"r": 2, "target_modules": QKV, "modules_to_save": ["head"], **changes}
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_vit(depth=depth), peft.LoraConfig(**settings))
    stir(model, seed)
    return model.eval()


# Export.


EXPORTS: dict[str, MoAConfig] = {
    "defaults": small_config("lora"),
    "r 1": small_config("lora", ranks=(1,)),
    "r 8": small_config("lora", ranks=(8,), targets=("attn.*", "mlp.fc1")),
    "block 1, not 11": small_config("lora", blocks=(1,)),
    "block 11, not 1": small_config("lora", blocks=(11,)),
    "every third": small_config("lora", blocks="every_3", targets=("mlp.fc2",)),
    "mixture": small_config("multi_lora"),
    "mixture with a shared expert": small_config("multi_lora", shared_rank=2, blocks=(1, 10)),
    "mixture by router": small_config("moa_lora", router="uniform"),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_peft_loads_an_export(case: str, tmp_path: Path) -> None:
    model = tiny_vit(depth=DEPTH)
    report = inject(model, EXPORTS[case])
    stir(model)
    export_peft(model.eval(), tmp_path / "out", "vit_tiny.none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]

    base = fresh(depth=DEPTH)
    with torch.no_grad():
        plain = base(images(4))
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
        wanted = model(images(4))
        assert distance(plain, wanted) > 1e-2
        assert distance(loaded(images(4)), wanted) < 1e-6
    layers = peft.tuners.lora.LoraLayer
    prefix = "base_model.model."
    found = [n.removeprefix(prefix) for n, m in loaded.named_modules() if isinstance(m, layers)]
    assert sorted(found) == sorted(report.layers)
    config = loaded.peft_config["default"]
    assert config.base_model_name_or_path == "vit_tiny.none"
    assert (config.lora_alpha, config.lora_dropout) == (config.r, 0.0)


def test_a_single_expert_is_exported_bit_by_bit(tmp_path: Path) -> None:
    model = tiny_vit().bfloat16()
    inject(model, small_config("lora"))
    stir(model)
    export_peft(model, tmp_path / "out", "vit_tiny.none")
    stored = load_file(tmp_path / "out" / WEIGHTS_FILE)
    renamed = {"base_model.model." + n: t for n, t in adapter_state_dict(model).items()}
    for ours, theirs in (
        (".experts.0.down", ".lora_A.weight"),
        (".experts.0.up", ".lora_B.weight"),
    ):
        renamed = {n.replace(ours, theirs): t for n, t in renamed.items()}
    assert_equal_tensors(stored, renamed)


REFUSED_EXPORTS = {
    "kadaptation": (small_config("kadaptation"), "'kadaptation' has Kronecker adapters"),
    "moa_lora": (small_config("moa_lora"), "router 'cosine' cannot be exported.*on the token"),
    "moa_kron": (small_config("moa_kron"), "router 'cosine' cannot be exported"),
    "soft": (small_config("moa_lora", router="soft"), "router 'soft' cannot be exported"),
    "linear": (small_config("linear"), "no adapters, so there is nothing to be exported"),
}


@pytest.mark.parametrize("case", REFUSED_EXPORTS)
def test_refused_exports_write_nothing(case: str, tmp_path: Path) -> None:
    config, message = REFUSED_EXPORTS[case]
    model = tiny_vit()
    inject(model, config)
    before = snapshot(model)
    with pytest.raises(MoAConfigError, match=message):
        export_peft(model, tmp_path / "out", "vit_tiny.none")
    assert_untouched(model, before)
    assert not list(tmp_path.iterdir())


def eva() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "eva02_tiny_patch14_224",
        img_size=28,
        depth=2,
        embed_dim=48,
        num_heads=3,
        num_classes=3,
        qkv_fused=True,
        scale_mlp=False,
    ).eval()


def test_attention_that_reads_the_weight_of_qkv(tmp_path: Path) -> None:
    """A LoRA of PEFT there changes nothing, so an export would silently lose the adapter."""
    x = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    settings = peft.LoraConfig(r=2, target_modules=QKV, init_lora_weights=False)
    with torch.no_grad():
        assert torch.equal(peft.get_peft_model(eva(), settings).eval()(x), eva()(x))
    model = eva()
    inject(model, MoAConfig(method="lora", targets=("attn.qkv",)))
    with pytest.raises(MoAConfigError, match=r"blocks.0.attn.qkv: a fresh EvaAttention"):
        export_peft(model, tmp_path / "out", "eva")

    model = eva()
    inject(model, MoAConfig(method="lora", targets=("attn.proj", "mlp.*")))
    stir(model)
    export_peft(model.eval(), tmp_path / "out", "eva")
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(eva(), tmp_path / "out").eval()
        assert distance(loaded(x), model(x)) < 1e-6


# Import.


IMPORTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "r 1": {"r": 1, "lora_alpha": 1},
    "r 8": {"r": 8, "lora_alpha": 8},
    "alpha": {"r": 4, "lora_alpha": 7},
    "no effect": {"lora_alpha": 0},
    "rslora": {"r": 8, "lora_alpha": 3, "use_rslora": True},
    "names": {"target_modules": ["qkv", "attn.proj"]},
    "whole names": {"target_modules": ["blocks.1.attn.qkv", "blocks.11.attn.qkv"]},
    "one of a pair": {"target_modules": ["blocks.1.attn.qkv"]},
    "blocks": {"target_modules": r"blocks\.(1|11)\.(attn\.proj|mlp\.fc1)"},
    "transform": {
        "target_modules": ["qkv"],
        "layers_to_transform": [1, 3],
        "layers_pattern": "blocks",
    },
    "excluded": {"target_modules": ["qkv", "proj"], "exclude_modules": ["patch_embed.proj"]},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["head"]},
    "one rank": {"r": 3, "rank_pattern": {"qkv": 2}},
    "alphas": {"alpha_pattern": {r"1\.attn\.qkv": 5, "qkv": 3}},
    "no head": {"modules_to_save": None},
    "dropout": {"lora_dropout": 0.5},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", IMPORTS)
def test_import_computes_what_peft_does(case: str, training: bool, tmp_path: Path) -> None:
    source = peft_model(depth=DEPTH, **IMPORTS[case])
    source.save_pretrained(tmp_path)
    model = fresh(depth=DEPTH).train(training)
    head = {n: t.clone() for n, t in model.head.state_dict().items()}
    report = import_peft(model, tmp_path)
    assert all(module.training == training for module in model.modules())

    layer_type = peft.tuners.lora.LoraLayer
    prefix = "base_model.model."
    layers = [
        n.removeprefix(prefix) for n, m in source.named_modules() if isinstance(m, layer_type)
    ]
    assert sorted(report.layers) == sorted(layers)
    assert {n.partition(".experts")[0] for n in adapter_state_dict(model)} == {
        *layers,
        "head.weight",
        "head.bias",
    }
    assert report.trainable == sum(t.numel() for t in adapter_state_dict(model).values())
    if case == "no head":
        assert_equal_tensors(model.head.state_dict(), head)
        source.base_model.model.head.load_state_dict(head)
    with torch.no_grad():
        wanted = source(images(4))
        assert distance(model.eval()(images(4)), wanted) < 1e-6


@pytest.mark.parametrize("num_classes", [3, 5])
def test_import_fits_the_classifier(num_classes: int, tmp_path: Path) -> None:
    source = peft_model()
    source.save_pretrained(tmp_path)
    model = fresh(num_classes).double()
    report = import_peft(model, tmp_path)
    assert model.head.out_features == 3
    assert report.head == 3 * 16 + 3
    assert all(p.dtype == torch.float64 for p in model.parameters())
    with torch.no_grad():
        wanted = source.double()(images(2, dtype=torch.float64))
        assert distance(model(images(2, dtype=torch.float64)), wanted) < 1e-12


@pytest.mark.parametrize("alpha", [4, 6])
def test_gradients_are_those_of_peft(alpha: int, tmp_path: Path) -> None:
    """With scale s, `up` is s lora_B: its gradient is that of lora_B over s, all else is equal."""
    source = peft_model(r=4, lora_alpha=alpha).double()
    source.save_pretrained(tmp_path)
    model = fresh().double()
    import_peft(model, tmp_path)
    x, labels = images(6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    for each in (source, model):
        nn.functional.cross_entropy(each(x), labels).backward()
    theirs = {n: p.grad for n, p in source.named_parameters() if p.grad is not None}
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(ours) == len(theirs) == 2 * 4 + 2
    for name, gradient in ours.items():
        their_name = name
        for old, new in ((".experts.0.down", ".lora_A.default.weight"),
                         (".experts.0.up", ".lora_B.default.weight"),
                         ("head.", "head.modules_to_save.default.")):  # fmt: skip
            their_name = their_name.replace(old, new)
        scale = alpha / 4 if name.endswith(".up") else 1.0
        wanted = theirs["base_model.model." + their_name]
        assert distance(gradient * scale, wanted) < 1e-10, name


def test_imported_model_trains_saves_loads_merges_and_goes_back(tmp_path: Path) -> None:
    peft_model(r=4, lora_alpha=6).save_pretrained(tmp_path / "theirs")
    model = fresh()
    sha256 = base_hash(model)
    import_peft(model, tmp_path / "theirs")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, labels = images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model.train()(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]

    with torch.no_grad():
        wanted = model.eval()(x)
        config = next(layer.config for _, layer in moa_layers(model))
        info = AdapterInfo("vit_tiny.none", sha256, config, ("a", "b", "c"), {})
        save_adapter(model, tmp_path / "ours", info)
        load_adapter(loaded := fresh(), tmp_path / "ours")
        assert torch.equal(loaded(x), wanted)

        export_peft(model, tmp_path / "back", "vit_tiny.none")
        again = peft.PeftModel.from_pretrained(fresh(), tmp_path / "back").eval()
        assert distance(again(x), wanted) < 1e-6
        import_peft(twice := fresh(), tmp_path / "back")
        assert_equal_tensors(adapter_state_dict(twice), adapter_state_dict(model))
        merge(twice)
        assert distance(twice(x), wanted) < 1e-5


# What PEFT itself makes, and lora is not.


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora: True; .*train it with use_dora=False"),
    "bias": ({"bias": "lora_only"}, "bias: 'lora_only'; .*train it with bias='none'"),
    "lora bias": ({"lora_bias": True}, "lora_bias: True; .*lora_bias=False"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the base"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora'"),
    "more modules": ({"modules_to_save": ["head", "norm"]}, r"\['head', 'norm'\]; legal is"),
    "other modules": ({"modules_to_save": ["norm"]}, r"modules_to_save: \['norm'\]"),
    "convolution": (
        {"target_modules": ["qkv", "proj"]},
        "adapts patch_embed.proj, which is a Conv2d; legal are the linear layers",
    ),
    "outside blocks": (
        {"target_modules": ["qkv", "head"], "modules_to_save": None},
        "adapts head, which is a Linear; legal are the linear layers inside",
    ),
    "uneven": (
        {"target_modules": ["blocks.0.attn.qkv", "blocks.1.attn.proj"]},
        "not alike in all adapted blocks, blocks.0.attn.proj, blocks.1.attn.qkv would be missing",
    ),
    "ranks": (
        {"rank_pattern": {r"1\.attn\.qkv": 4}},
        "several ranks .*4 at blocks.1.attn.qkv.*legal is one",
    ),
}


def assert_refused(folder: Path, message: str) -> None:
    for model in (tiny_vit(), tiny_vit(num_classes=5)):
        next(model.parameters()).requires_grad_(False)
        before = snapshot(model)
        with pytest.raises(AdapterError, match=message) as caught:
            import_peft(model, folder)
        assert str(folder) in str(caught.value)
        assert_untouched(model, before)


@pytest.mark.parametrize("case", FOREIGN)
def test_other_adapters_of_peft_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = FOREIGN[case]
    settings = {"r": 2, "target_modules": QKV, "modules_to_save": ["head"], **changes}
    peft.get_peft_model(tiny_vit(), peft.LoraConfig(**settings)).save_pretrained(tmp_path)
    assert_refused(tmp_path, message)


def test_another_method_of_peft_is_refused(tmp_path: Path) -> None:
    config = peft.LoHaConfig(r=2, target_modules=QKV)
    peft.get_peft_model(tiny_vit(), config).save_pretrained(tmp_path)
    assert_refused(tmp_path, "peft_type: 'LOHA'; legal is 'LORA'")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


HEAD = "base_model.model.head"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), "no readable adapter .*adapter_config"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), "no readable .*safe_serialization=True"),
    "cut weights": (lambda f: cut(f / WEIGHTS_FILE, -100), "no readable adapter"),
    "cut header": (lambda f: cut(f / WEIGHTS_FILE, 50), "no readable adapter"),
    "cut json": (lambda f: cut(f / CONFIG_FILE, 40), "no readable adapter"),
    "binary json": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe"), "no readable adapter"),
    "json number": (lambda f: (f / CONFIG_FILE).write_text("3"), "no readable adapter"),
    "json list": (lambda f: (f / CONFIG_FILE).write_text("[]"), "holds no JSON object"),
    "our own": (lambda f: edit_config(f, peft_type="MOA"), "'MOA'; .*moa.load_adapter reads"),
    "fan_in_fan_out": (lambda f: edit_config(f, fan_in_fan_out=True), "fan_in_fan_out: True; "),
    "from the future": (lambda f: edit_config(f, use_xyz=1), "use_xyz: 1; not part of plain LoRA"),
    "no rank": (lambda f: edit_config(f, r=None), "r: None; legal is a whole number"),
    "half a rank": (lambda f: edit_config(f, r=1.5), "r: 1.5; legal is a whole number"),
    "rank zero": (lambda f: edit_config(f, r=0), "r: 0; legal is a whole number"),
    "alpha text": (lambda f: edit_config(f, lora_alpha="8"), "lora_alpha: '8'; legal is a finite"),
    "alpha nan": (
        lambda f: edit_config(f, lora_alpha=float("nan")),
        "lora_alpha: nan; legal is a finite",
    ),
    "pattern list": (lambda f: edit_config(f, rank_pattern=[3]), "cannot be imported"),
    "no expression": (lambda f: edit_config(f, target_modules="("), "cannot be imported"),
    "endless expression": (
        lambda f: edit_config(f, target_modules=r"(\w+\.?)+X"),
        r"target_modules: .* repeats too much; name whole paths",
    ),
    "endless rank": (lambda f: edit_config(f, rank_pattern={".*" * 9: 2}), "rank_pattern: .*much"),
    "target number": (lambda f: edit_config(f, target_modules=3), "cannot be imported"),
    "no targets": (
        lambda f: (edit_config(f, target_modules="x"), edit_tensors(f, lambda t: t.clear())),
        "No modules were targeted .* check your `target_modules`",
    ),
    "other rank": (lambda f: edit_config(f, r=3), r"lora_A.weight is \(2, 16\), .* has \(3, 16\)"),
    "other width": (
        lambda f: edit_tensors(f, lambda t: t.update({B: torch.ones(47, 2)})),
        rf"{B} is \(47, 2\), the model has \(48, 2\); give",
    ),
    "missing factor": (lambda f: edit_tensors(f, lambda t: t.pop(A)), f"missing {A}; give"),
    "missing layer": (
        lambda f: edit_tensors(f, lambda t: (t.pop(A), t.pop(B))),
        "for blocks.1.attn.qkv there are no tensors",
    ),
    "extra layer": (
        lambda f: edit_config(f, target_modules=r"blocks\.[023]\.attn\.qkv"),
        "for blocks.1.attn.qkv there are tensors, but no target_modules",
    ),
    "layer of a deeper model": (
        lambda f: edit_tensors(f, lambda t: t.update({A.replace("1", "9"): t[A].clone()})),
        "adapts blocks.9.attn.qkv, which is not in the model",
    ),
    "extra tensor": (
        lambda f: edit_tensors(
            f, lambda t: t.update({"base_model.model.norm.bias": torch.ones(2)})
        ),
        "unexpected base_model.model.norm.bias; give",
    ),
    "missing head": (
        lambda f: edit_tensors(f, lambda t: t.pop(f"{HEAD}.weight")),
        f"missing {HEAD}.weight",
    ),
    "head not announced": (
        lambda f: edit_config(f, modules_to_save=None),
        f"unexpected {HEAD}.bias; unexpected {HEAD}.weight; give",
    ),
    "head without classes": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{HEAD}.weight": torch.ones(0, 16)})),
        rf"{HEAD}.weight is \(0, 16\)",
    ),
    "head of other width": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{HEAD}.weight": torch.ones(3, 8)})),
        rf"{HEAD}.weight is \(3, 8\), the model has \(3, 16\)",
    ),
    "nan": (lambda f: edit_tensors(f, lambda t: t[A][0].fill_(float("nan"))), f"{A} holds NaN"),
    "infinity": (
        lambda f: edit_tensors(f, lambda t: t[B][0].fill_(float("-inf"))),
        f"{B} holds NaN, infinity",
    ),
    "whole numbers": (
        lambda f: edit_tensors(f, lambda t: t.update({A: t[A].int()})),
        f"{A} holds NaN, infinity or whole numbers",
    ),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("template")
    peft_model().save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_folder_leaves_the_model_untouched(
    damage: str, template: dict[str, bytes], tmp_path: Path
) -> None:
    for name, content in template.items():
        (tmp_path / name).write_bytes(content)
    import_peft(tiny_vit(), tmp_path)
    harm, message = DAMAGES[damage]
    harm(tmp_path)
    assert_refused(tmp_path, message)


def test_a_missing_library_is_named_with_its_remedy(
    template: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in template.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert_refused(tmp_path, r"needs peft \(.*\); pip install 'moa-trainer\[peft\]'$")


def test_unsuitable_models_are_refused(template: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in template.items():
        (tmp_path / name).write_bytes(content)
    adapted = tiny_vit()
    import_peft(adapted, tmp_path)
    headless, shallow = tiny_vit(num_classes=0), tiny_vit(depth=2)
    for model, message in (
        (adapted, "blocks.0.attn.qkv of the model already carries adapters"),
        (headless, "has no classifier"),
        (shallow, "adapts blocks.2.attn.qkv, which is not in the model"),
    ):
        before = snapshot(model)
        with pytest.raises(AdapterError, match=message):
            import_peft(model, tmp_path)
        assert_untouched(model, before)
