"""The benchmark runs, and compares like with like; what it measures is never asserted."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from moa import MoAConfig, MoALinear
from trainer import bench, bench_engine, bench_layer, bench_step, bench_traffic
from trainer.bench_timing import interleaved


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


def test_steps_of_all_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command that a GPU gets, on a CPU."""
    target = tmp_path / "figures.json"
    assert bench.main(step_command(target)) == 0
    (rows,) = json.loads(target.read_text()).values()
    assert list(rows) == list(bench_step.METHODS)
    for row in rows.values():
        assert set(row) == {"ms", "ratio", "img/s", "MFU", "peak GiB", "peak ratio"}
    assert "moa_kron" in capsys.readouterr().out


def test_steps_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {name: bench_step.METHODS[name] for name in (bench_step.REFERENCE, "moa_kron")}
    monkeypatch.setattr(bench_step, "METHODS", kept)
    target = tmp_path / "figures.json"
    assert bench.main(step_command(target, "--compile")) == 0
    tables = json.loads(target.read_text())
    assert [("torch.compile" in title) for title in tables] == [False, True]
    for rows in tables.values():
        assert all(row["img/s"] > 0 for row in rows.values())


def test_more_is_counted_for_more_work() -> None:
    setting = bench_step.Setting("vit_embedded", 1, "cpu", torch.float32)
    flops = {name: bench_step.step_flops(name, setting) for name in bench_step.METHODS}
    floor = flops["backbone alone, gradient of the input"]
    assert all(count > floor for name, count in flops.items() if "alone" not in name)
    assert flops["moa_kron"] < 1.5 * floor


def test_a_step_through_the_engine() -> None:
    cases = tuple(
        bench_engine.Case("vit_embedded", 2, precision, True) for precision in ("fp32", "bf16")
    )
    (rows,) = bench_engine.measure(cases).values()
    for row in rows.values():
        assert row["moved"] == row["trainable tensors"]
        assert 0 < float(row["loss"]) < 20


def test_traffic_is_what_the_formula_says() -> None:
    """Counted at the collectives against the byte count by which a transport is chosen."""
    shape = bench_traffic.Shape("tiny", width=16, layers=2, tokens=500)
    (rows,) = bench_traffic.measure(shape, (2,)).values()
    (row,) = rows.values()
    experts = 2 * 15 * (16 + 48) * 4  # bytes of both layers' factors, half of them leave
    assert float(row["gather MiB"]) * 2**20 == pytest.approx(experts, rel=0.05)
    tokens = 2 * 2 * 500 * (16 + 48) * 4 / 2
    assert float(row["all_to_all MiB"]) * 2**20 == pytest.approx(tokens, rel=0.25)


def test_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["--part", "everything"])
    assert caught.value.code == 2
    assert "legal are layer, step, engine, traffic, checkpoint, data" in capsys.readouterr().err
