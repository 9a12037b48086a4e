import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moa import (
    AdapterError,
    Origin,
    adapter_state_dict,
    base_hash,
    export_peft,
    inject,
    load_adapter,
    save_adapter,
)
from moa.files.atomic_folder import replaced_folder
from moa.files.reading import AdapterInfo, read_adapter
from moa.files.saving import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from tests.support.moa_fixtures import (
    METHODS,
    assert_equal_tensors,
    assert_untouched,
    images,
    seal,
    small_config,
    snapshot,
    stir,
    tiny_vit,
)

DATA_CONFIG = {"input_size": [3, 16, 16], "mean": [0.5, 0.5, 0.5], "interpolation": "bicubic"}
RESULTS = {"accuracy": 0.875}
CLASSES = ("cat", "dog", "emu")


def trained(method: str, **changes: object) -> tuple[nn.Module, AdapterInfo]:
    """An injected model whose every trainable number has moved, and its description."""
    model = tiny_vit()
    sha256 = base_hash(model)
    config = small_config(method, **changes)
    inject(model, config)
    stir(model)
    info = AdapterInfo("vit_tiny.none", sha256, config.resolved(), CLASSES, DATA_CONFIG, RESULTS)
    return model.eval(), info


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a moa_kron adapter."""
    folder = tmp_path / "adapter"
    model, info = trained("moa_kron")
    save_adapter(model, folder, info)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_converted_base_is_refused_with_the_way_that_works(
    dtype: torch.dtype, saved: Path
) -> None:
    with pytest.raises(AdapterError, match=rf"in {dtype}: load the adapter in fp32.*then convert"):
        load_adapter(tiny_vit().to(dtype), saved)
    with pytest.raises(AdapterError, match=r"create it with: model = timm\.create_model") as caught:
        load_adapter(tiny_vit(seed=1), saved)
    assert "then convert" not in str(caught.value)
    model = tiny_vit()
    load_adapter(model, saved)
    assert model.to(dtype)(images(1).to(dtype)).dtype == dtype


def stored_names(folder: Path) -> set[str]:
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        return set(file.keys())


def fresh_vit(num_classes: int = 3, seed: int = 0) -> nn.Module:
    """The same base with another head, in evaluation mode."""
    model = tiny_vit(num_classes=num_classes, seed=seed).eval()
    torch.manual_seed(5)
    nn.init.normal_(model.head.weight)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("num_classes", [3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_round_trip_is_exact(method: str, num_classes: int, tmp_path: Path) -> None:
    model, info = trained(method)
    save_adapter(model, tmp_path / "adapter", info)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert stored_names(tmp_path / "adapter") == trainable
    assert (len(frozen) == 0) == (method == "full")
    if method != "full":  # a full model is its own base, which only the head may differ from
        assert not stored_names(tmp_path / "adapter") & frozen

    loaded = fresh_vit(num_classes)
    assert load_adapter(loaded, tmp_path / "adapter") == info
    assert_equal_tensors(adapter_state_dict(loaded), adapter_state_dict(model))
    assert_equal_tensors(loaded.state_dict(), model.state_dict())
    assert loaded.head.out_features == 3  # type: ignore[union-attr]
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == trainable
    with torch.no_grad():
        assert torch.equal(loaded(images(4)), model(images(4)))


def test_files_of_a_folder(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == sorted([CARD_FILE, CONFIG_FILE, WEIGHTS_FILE])
    assert sorted(p.name for p in saved.parent.iterdir()) == ["adapter"]
    config = json.loads((saved / CONFIG_FILE).read_text())
    assert (config["peft_type"], config["format_version"]) == ("MOA", 1)
    assert config["base_sha256"] == base_hash(tiny_vit())
    assert config["classes"] == list(CLASSES)
    assert config["moa_config"]["ranks"] == [1, 2, 3]
    assert config["moa_config"]["blocks"] == "every_2"
    card = (saved / CARD_FILE).read_text()
    for part in ("timm/vit_tiny.none", "[1, 2, 3]", "| accuracy | 0.8750 |", config["base_sha256"]):
        assert part in card


def test_defaults_are_written_out(tmp_path: Path) -> None:
    """A later release may change its defaults, an old adapter must not follow."""
    model, info = trained("lora")
    config = small_config("lora")
    assert config.ranks is None
    open_info = AdapterInfo("name", info.base_sha256, config, CLASSES, DATA_CONFIG)
    save_adapter(model, tmp_path / "adapter", open_info)
    read, _ = read_adapter(tmp_path / "adapter")
    assert (read.moa.ranks, read.moa.blocks) == ((2,), "all")
    assert read.moa.targets == ("attn.qkv", "attn.proj")
    assert read.results == {}


def test_given_tensors_are_written_instead(tmp_path: Path) -> None:
    model, info = trained("lora")
    masters = {n: t.double() + 1e-12 for n, t in adapter_state_dict(model).items()}
    save_adapter(model, tmp_path / "adapter", info, masters)
    assert_equal_tensors(read_adapter(tmp_path / "adapter")[1], masters)


def test_views_of_one_buffer_are_written_apart(tmp_path: Path) -> None:
    """Optimizers keep parameters as slices of a flat buffer; only the slices may be stored."""
    model, info = trained("lora")
    wanted = {n: t.clone() for n, t in adapter_state_dict(model).items()}
    buffer, place = torch.zeros(sum(t.numel() for t in wanted.values()) + 10_000), 0
    for name, parameter in model.named_parameters():
        if name in wanted:
            piece = buffer[place : place + parameter.numel()].view(parameter.shape)
            parameter.data = piece.copy_(parameter.detach())
            place += parameter.numel()
    save_adapter(model, tmp_path / "adapter", info)
    assert_equal_tensors(read_adapter(tmp_path / "adapter")[1], wanted)
    assert (tmp_path / "adapter" / WEIGHTS_FILE).stat().st_size < 4 * place + 20_000


def test_model_keeps_dtype_and_mode(saved: Path) -> None:
    narrow = tiny_vit().bfloat16()
    with pytest.raises(AdapterError, match="base weights"):
        load_adapter(narrow, saved)  # rounded weights are other weights
    model, info = trained("moa_lora")
    for training in (False, True):
        base = tiny_vit(num_classes=5).bfloat16().train(training)
        own = AdapterInfo(info.base_model, base_hash(base), info.moa, CLASSES, DATA_CONFIG)
        save_adapter(model, saved, own)
        load_adapter(base, saved)
        assert all(p.dtype == torch.bfloat16 for p in base.parameters())
        layer = base.get_submodule("blocks.0.attn.qkv")
        assert all(module.training == training for module in layer.modules())
        rounded = {n: t.bfloat16() for n, t in adapter_state_dict(model).items()}
        assert_equal_tensors(adapter_state_dict(base), rounded)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    for name, value in changes.items():
        owner = config["moa_config"] if name in config["moa_config"] else config
        owner[name] = value
    seal(folder, config)


def drop_key(folder: Path, name: str) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    del config[name]
    seal(folder, config)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    seal(folder, json.loads((folder / CONFIG_FILE).read_text()))


def truncate(folder: Path, size: int) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:size])


ORIGIN = Origin(
    dataset="PACS", domains=("art", "photo"), held_out="photo", trial_seed=0,
    holdout_fraction=0.2, seed=1, data_hash="d", split_hash="s", command="deepspeed",
)  # fmt: skip
EXPERT = "blocks.0.attn.qkv.experts.1.left"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: f.rename(f.with_name("moved")), "no such folder"),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), "no adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), "no adapter_model.safetensors"),
    "cut tensors": (lambda f: truncate(f, -100), "damaged adapter"),
    "cut header": (lambda f: truncate(f, 100), "damaged adapter"),
    "empty weights": (lambda f: truncate(f, 0), "damaged adapter"),
    "broken json": (lambda f: (f / CONFIG_FILE).write_text('{"peft_type": "MOA",'), "damaged"),
    "empty json": (lambda f: (f / CONFIG_FILE).write_text(""), "damaged"),
    "binary json": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"), "damaged"),
    "list json": (lambda f: (f / CONFIG_FILE).write_text("[]"), "no JSON object"),
    "other type": (lambda f: edit_config(f, peft_type="LORA"), "peft_type 'LORA'.*import_peft"),
    "other version": (lambda f: edit_config(f, format_version=2), "format_version 2.*newer"),
    "other base": (
        lambda f: edit_config(f, base_sha256="ab" * 32),
        "trained on vit_tiny.none with base weights abababababab, the given model's are",
    ),
    "no base": (lambda f: edit_config(f, base_sha256=None), "base_sha256: None; must be a text"),
    "no classes": (lambda f: drop_key(f, "classes"), "not legal: 'classes'"),
    "no settings": (lambda f: drop_key(f, "moa_config"), "not legal: 'moa_config'"),
    "null settings": (lambda f: edit_config(f, moa_config=None), "not legal"),
    "unknown setting": (
        lambda f: edit_config(f, moa_config={"method": "lora", "alpha": 2}),
        r"unknown moa_config fields \['alpha'\]",
    ),
    "illegal setting": (lambda f: edit_config(f, top_k=7), "not legal: moa.top_k: 7"),
    "unknown method": (lambda f: edit_config(f, method="moa_x"), "not legal: moa.method"),
    "missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop(EXPERT)),
        f"does not fit the model: missing {EXPERT}; give the model and the",
    ),
    "extra tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"norm.weight": torch.ones(16)})),
        "unexpected norm.weight; give",
    ),
    "other shape": (
        lambda f: edit_tensors(f, lambda t: t.update({EXPERT: t[EXPERT][:, :1].contiguous()})),
        rf"{EXPERT} is \(8, 1, 2\), the model has \(8, 2, 2\)",
    ),
    "other ranks": (
        lambda f: edit_config(f, ranks=[1, 4, 3]),
        rf"{EXPERT} is \(8, 2, 2\), the model has \(8, 2, 4\)",
    ),
    "fewer ranks": (lambda f: edit_config(f, ranks=[1, 2]), "unexpected blocks.0.*experts.2"),
    "other blocks": (lambda f: edit_config(f, blocks="all"), "missing blocks.1.* and 18 more"),
    "other method": (lambda f: edit_config(f, method="linear"), "unexpected"),
    "other classes": (lambda f: edit_config(f, classes=["a", "b"]), r"head.weight is \(3, 16\)"),
    "nan": (
        lambda f: edit_tensors(f, lambda t: t[EXPERT][0, 0].fill_(float("nan"))),
        f"{EXPERT} holds NaN",
    ),
    "beyond fp32": (
        lambda f: edit_tensors(f, lambda t: t.update({EXPERT: t[EXPERT].double() * 1e300})),
        rf"{EXPERT} does not fit into torch.float32",
    ),
    "whole numbers": (
        lambda f: edit_tensors(f, lambda t: t.update({EXPERT: t[EXPERT].long()})),
        rf"{EXPERT} is torch.int64, the model has torch.float32",
    ),
    "other numbers": (
        lambda f: edit_tensors(f, lambda t: t.update({EXPERT: t[EXPERT].to(torch.complex64)})),
        rf"{EXPERT} is torch.complex64; legal are float32, ",
    ),
    "classes in a word": (lambda f: edit_config(f, classes="ab"), "classes: 'ab'; must be a list"),
    "a nameless class": (lambda f: edit_config(f, classes=["a", None, "b"]), "one or more names"),
    "no class": (lambda f: edit_config(f, classes=[]), "one or more names"),
    "an origin without a dataset": (
        lambda f: edit_config(f, origin={"seed": 0}),
        "not legal: origin: .*missing.*'dataset'",
    ),
    "an origin of another kind": (
        lambda f: edit_config(f, origin={**ORIGIN.plain(), "seed": "0"}),
        "not legal: origin: seed '0'; must be a whole number",
    ),
    "no data config": (lambda f: edit_config(f, data_config=None), "must be a JSON object"),
    "other targets": (lambda f: edit_config(f, targets=["norm1"]), "moa_config does not fit"),
    "other kron_dim": (lambda f: edit_config(f, kron_dim=7), "moa_config does not fit.*kron_dim"),
    "infinity": (
        lambda f: edit_tensors(f, lambda t: t["head.bias"][1:].fill_(float("-inf"))),
        "head.bias holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_adapter_leaves_the_model_untouched(saved: Path, damage: str) -> None:
    harm, message = DAMAGES[damage]
    harm(saved)
    for model in (tiny_vit(), tiny_vit(num_classes=5)):
        next(model.parameters()).requires_grad_(False)
        before = snapshot(model)
        with pytest.raises(AdapterError, match=message) as caught:
            load_adapter(model, saved)
        assert str(saved) in str(caught.value)
        assert_untouched(model, before)


def test_refused_on_another_base_or_a_second_time(saved: Path) -> None:
    other = tiny_vit(seed=1)
    before = snapshot(other)
    with pytest.raises(AdapterError, match="the given model's are"):
        load_adapter(other, saved)
    assert_untouched(other, before)
    model = tiny_vit()
    load_adapter(model, saved)
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"blocks\.0\.attn\.qkv of the model already"):
        load_adapter(model, saved)
    assert_untouched(model, before)


# The hash of a base.


def test_hash_ignores_head_random_state_and_mode() -> None:
    model = tiny_vit()
    wanted = base_hash(model)
    assert len(wanted) == 64
    assert base_hash(fresh_vit(7)) == wanted
    with torch.no_grad():
        model.head.weight.add_(1)
        model.head.bias.add_(1)
    model.requires_grad_(False).eval()
    state = torch.get_rng_state()
    assert base_hash(model) == wanted
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["cls_token", "blocks.3.mlp.fc2.bias", "patch_embed.proj.weight"])
def test_hash_sees_one_changed_bit(name: str) -> None:
    model = tiny_vit()
    before = base_hash(model)
    with torch.no_grad():
        model.get_parameter(name).view(-1).view(torch.int32)[-1] ^= 1
    assert base_hash(model) != before


def test_hash_sees_shape_dtype_name_and_buffers() -> None:
    hashes = [base_hash(tiny_vit()), base_hash(tiny_vit().double()), base_hash(tiny_vit(depth=3))]
    reshaped = tiny_vit()
    reshaped.cls_token.data = reshaped.cls_token.data.view(1, 2, -1)
    renamed = tiny_vit()
    renamed.zz_norm = renamed.norm
    del renamed.norm
    buffered = tiny_vit()
    buffered.register_buffer("scale", torch.tensor(2.0))
    hashes += [base_hash(model) for model in (reshaped, renamed, buffered)]
    assert len(set(hashes)) == len(hashes)


# Replacing a folder.


def test_repeated_save_replaces(saved: Path) -> None:
    (saved / "stray.txt").write_text("left by hand")
    model, info = trained("lora")
    save_adapter(model, saved, info)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["adapter"]
    assert not (saved / "stray.txt").exists()
    assert stored_names(saved) == set(adapter_state_dict(model))
    assert read_adapter(saved)[0].moa.method == "lora"


@pytest.mark.parametrize("peft", [False, True])
def test_other_work_is_not_replaced(peft: bool, tmp_path: Path) -> None:
    model, info = trained("lora")

    def save(folder: Path) -> None:
        if peft:
            export_peft(model, folder, info.base_model)
        else:
            save_adapter(model, folder, info)

    work = tmp_path / "results"
    (work / "run").mkdir(parents=True)
    (work / "run" / "thesis.tex").write_text("years of work")
    for taken in (work, work / "run", work / "run" / "thesis.tex"):
        with pytest.raises(FileExistsError, match=r"no adapter and would be .* give a new"):
            save(taken)
    assert (work / "run" / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    (tmp_path / "empty").mkdir()
    for free in ("new", "empty"):
        save(tmp_path / free)
        save(tmp_path / free)  # an older adapter is replaced
        assert (tmp_path / free / WEIGHTS_FILE).exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def power_cut(*_: object) -> str:
    raise RuntimeError("power cut")


def test_failure_leaves_the_old_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(saved)

    def half_written() -> None:
        with replaced_folder(saved) as temporary:
            (temporary / CONFIG_FILE).write_text("{")
            assert contents(saved) == before
            power_cut()

    with pytest.raises(RuntimeError, match="power cut"):
        half_written()
    assert contents(saved) == before
    load_adapter(tiny_vit(), saved)

    model, info = trained("lora")
    monkeypatch.setattr("moa.files.saving.model_card", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        save_adapter(model, saved, info)
    assert contents(saved) == before
    monkeypatch.undo()
    save_adapter(model, saved, info)  # what the failure left behind is in nobody's way
    assert read_adapter(saved)[0].moa.method == "lora"
    assert sorted(p.name for p in saved.parent.iterdir()) == ["adapter"]


def test_files_are_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    monkeypatch.setattr("os.fsync", lambda _: events.append("sync"))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda *a: (events.append("rename"), rename(*a))[1])
    with replaced_folder(tmp_path / "deep" / "folder") as temporary:
        (temporary / "a").write_text("1")
        (temporary / "b").write_text("2")
    assert events == ["sync"] * 3 + ["rename", "sync"]
    assert contents(tmp_path / "deep" / "folder") == {"a": b"1", "b": b"2"}
