"""The benchmark runs, and compares like with like; what it measures is never asserted."""

import importlib.util
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import moa
import trainer.prepare.vit_embedded  # noqa: F401  (registers the embedded backbone)
from moa import MoAConfig, MoALinear
from moa.layers.layer import moa_layers
from trainer.bench import (
    __main__ as bench,
    checkpoint as bench_checkpoint,
    engine as bench_engine,
    layer as bench_layer,
    step as bench_step,
)
from trainer.bench.timing import in_fresh_process, interleaved


def test_variants_of_the_layer_compute_the_same() -> None:
    """The slow variants are fair only if they give the fast one's numbers."""
    torch.manual_seed(0)
    for method, slow in (
        ("moa_lora", bench_layer.formed_lora),
        ("moa_kron", bench_layer.summed_kronecker),
    ):
        config = MoAConfig(method=method, kron_dim=8, router_dim=8)  # type: ignore[arg-type]
        layer = MoALinear(nn.Linear(32, 96), config).eval()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(0, 0.5)
        x = torch.randn(20, 32)
        torch.testing.assert_close(slow(layer, x), layer(x), rtol=1e-4, atol=1e-4)


def test_ratios_are_medians_against_the_first() -> None:
    calls: list[str] = []
    work = {name: (lambda n=name: calls.append(n)) for name in ("a", "b")}
    table = interleaved(work, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 4  # in turns, one round to warm up
    assert table["a"]["ratio"] == 1


def step_command(target: Path, *more: str) -> list[str]:
    return [
        "--part", "step", "--backbones", "vit_embedded", "--batches", "2", "--precision", "bf16",
        "--rounds", "1", "--alone", "--json", str(target), *more,
    ]  # fmt: skip


def test_steps_of_all_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that a GPU gets, on a CPU; whose peaks are another test's."""
    # Here, where everything is imported.
    monkeypatch.setattr(bench_step, "in_fresh_process", lambda work, *args: work(*args))
    target = tmp_path / "figures.json"
    assert bench.main(step_command(target)) == 0
    (rows,) = json.loads(target.read_text()).values()
    assert list(rows) == list(bench_step.METHODS)
    for row in rows.values():
        assert set(row) == {"ms", "ratio", "img/s", "MFU", "operations", "peak GiB", "peak ratio"}
    assert "moa_kron" in capsys.readouterr().out
    assert "| moa_kron" in target.with_suffix(".md").read_text()


def test_a_step_by_static_buffers_computes_the_same() -> None:
    """Ours and PEFT's, and of a model in which nothing trains."""
    setting = bench_step.Setting("vit_embedded", 2, "cpu", torch.float32)
    for name in (bench_step.REFERENCE, "backbone alone, gradient of the input", "moa_kron"):
        losses = []
        for each in (setting, setting.in_mode("graphed")):
            step = bench_step.make_step(name, each)
            losses.append([float(step()) for _ in range(3)])
        assert losses[0] == losses[1]
        assert (len(set(losses[0])) == 1) == name.startswith("backbone")


def test_steps_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {name: bench_step.METHODS[name] for name in (bench_step.REFERENCE, "moa_kron")}
    monkeypatch.setattr(bench_step, "METHODS", kept)
    monkeypatch.setattr(bench_step, "in_fresh_process", lambda work, *args: work(*args))
    target = tmp_path / "figures.json"
    assert bench.main(step_command(target, "--compile")) == 0
    tables = json.loads(target.read_text())
    assert [("torch.compile" in title) for title in tables] == [False, True]
    for rows in tables.values():
        assert all(row["img/s"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rounds", "0"], ["--rounds", "'0'", ">= 1"]),
        (["--rounds", "few"], ["--rounds", "'few'", "whole number"]),
        (["--batches", "-4"], ["--batches", "'-4'", ">= 1"]),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["--part", "step", *argv])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words)


def refused(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit code and lines of a command that must measure nothing."""

    def never(*_: object) -> None:
        raise AssertionError("measured")

    for module in (bench_layer, bench_step):
        monkeypatch.setattr(module, "measure", never)
    code = bench.main(argv)
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


def test_what_is_missing_shows_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["--part", "layer", "step"]
    code, told = refused([*both, "--backbones", "vit_hug"], monkeypatch, capsys)
    assert (code, told.split()[1]) == (2, "--backbones:")
    assert "'vit_hug'" in told
    target = tmp_path / "none" / "figures.json"
    code, told = refused([*both, "--json", str(target)], monkeypatch, capsys)
    assert (code, told.split()[1]) == (73, "--json:")
    assert str(target) in told
    code, told = refused([*both, "--json", str(tmp_path / "figures.md")], monkeypatch, capsys)
    assert (code, told.split()[1]) == (2, "--json:")
    code, told = refused([*both, "--graph"], monkeypatch, capsys)
    assert (code, told.split()[1]) == (2, "--graph:")
    assert "--device cpu; leave one of them out" in told
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, told = refused(["--device", "cuda"], monkeypatch, capsys)
    assert (code, told.split()[1]) == (2, "--device:")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "peft" else found(n))
    code, told = refused(both, monkeypatch, capsys)
    assert code == 2
    assert "moa-trainer[test]" in told


def test_what_is_there_is_shown_and_written_although_the_rest_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("later")

    monkeypatch.setattr(bench_layer, "measure", lambda *_: {"first": {"row": {"ms": 1.5}}})
    monkeypatch.setattr(bench_checkpoint, "measure", broken)
    target = tmp_path / "figures.json"
    assert bench.main(["--part", "layer", "checkpoint", "--json", str(target)]) == 1
    printed = capsys.readouterr()
    assert "first" in printed.out
    assert "RuntimeError: later" in printed.err
    assert json.loads(target.read_text()) == {"first": {"row": {"ms": 1.5}}}


@pytest.mark.parametrize("fails", ["building", "stepping"])
def test_a_model_that_does_not_fit_makes_room_for_the_next(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[nn.Module]] = []

    def make_step(name: str, _: bench_step.Setting) -> Callable[[], object]:
        assert all(model() is None for model in alive), f"{name} is built beside another"
        model = nn.Linear(1, 1)
        alive.append(weakref.ref(model))
        full = name == bench_step.REFERENCE

        def work() -> None:
            model(torch.ones(1))
            if full:
                raise torch.OutOfMemoryError("full")

        if full and fails == "building":
            work()
        return work

    monkeypatch.setattr(bench_step, "make_step", make_step)
    monkeypatch.setattr(bench_step, "_peaks_on_cpu", lambda _: {})
    setting = bench_step.Setting("vit_embedded", 1, "cpu", torch.float32, alone=True)
    table, _ = bench_step._alone(setting, 1)
    assert len(alive) == len(table) == len(bench_step.METHODS)
    assert [row["ms"] == "out of memory" for row in table.values()] == [True, *[False] * 4]


def test_more_is_counted_for_more_work() -> None:
    flops = {name: bench_step.step_flops(name, "vit_embedded") for name in bench_step.METHODS}
    floor = flops["backbone alone, gradient of the input"]
    assert all(count > floor for name, count in flops.items() if "alone" not in name)
    assert flops["moa_kron"] < 1.5 * floor


def test_an_adapted_layer_launches_few_operations() -> None:
    """On a GPU it waits for them: what is small is to be done for all layers at once."""
    model = timm.create_model("vit_embedded", num_classes=10)
    moa.inject(model, bench_step.METHODS["moa_kron"])  # type: ignore[arg-type]
    layers = len(list(moa_layers(model)))
    counts = {
        name: bench_step.step_operations(name, "vit_embedded", torch.float32)
        for name in ("backbone alone, gradient of the input", "moa_kron")
    }
    floor, adapted = counts.values()
    assert layers > 1
    assert 0 < (adapted - floor) / layers < 170


def test_operations_are_those_of_the_dtype() -> None:
    """A cast is one, too."""
    wide, narrow = (
        bench_step.step_operations("moa_kron", "vit_embedded", dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert narrow > wide


def test_the_reference_pays_for_its_steps_alone() -> None:
    """Not for importing PEFT, which takes more than a step of a small model."""
    setting = bench_step.Setting("vit_embedded", 2, "cpu", torch.float32)
    theirs, ours = (
        in_fresh_process(bench_step.peak, name, setting)
        for name in (bench_step.REFERENCE, "lora r=8, qkv of all blocks")
    )
    assert theirs < 2 * ours


def test_a_step_through_the_engine() -> None:
    cases = tuple(
        bench_engine.Case("vit_embedded", 2, precision, True) for precision in ("fp32", "bf16")
    )
    *_, (rows,) = (tables.values() for tables in bench_engine.measure(cases, rounds=2))
    assert len(rows) == 2
    for row in rows.values():
        assert row["img/s"] == pytest.approx(2000 / float(row["ms"]))
        assert row["moved"] == row["trainable tensors"]
        assert 0 < float(row["loss"]) < 20


def test_buckets_of_the_engine_hold_all_that_trains() -> None:
    _, backbone, resolved = bench_engine.build(
        bench_engine.Case("vit_embedded", 2, "fp32", False, method="full"), torch.device("cpu")
    )
    trainable = sum(p.numel() for p in backbone.model.parameters() if p.requires_grad)
    assert resolved["zero_optimization"]["reduce_bucket_size"] > trainable > 2**20


def test_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["--part", "everything"])
    assert caught.value.code == 2
    assert (
        "legal are layer, step, engine, checkpoint, data, train, report" in capsys.readouterr().err
    )
