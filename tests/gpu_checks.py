"""What only a GPU can show: `make test-gpu` runs it, and it fails where there is none.

The first line of each check is the sentence of docs/gpus.md that it proves.
"""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moa
from moa.layers import precision
from tests.support import warm
from tests.support.trainer_fixtures import RUN, arguments, environment, launch, launch_anew, rows
from tests.trainer.train.test_graphed import ALONE, STEPS, trained
from trainer.bench.counting import counted
from trainer.engine import collectives
from trainer.train import graphed

assert torch.cuda.is_available(), "torch finds no GPU, which these checks are about"
GPU = torch.device("cuda")
METHODS = ("lora", "kadaptation", "multi_lora", "moa_lora", "moa_kron")


def make_layer(method: str, dim_in: int = 64, dim_out: int = 192) -> moa.MoALinear:
    """In training, on the CPU, with parameters of order one."""
    torch.manual_seed(0)
    config = moa.MoAConfig(method=method, kron_dim=8, router_dim=16)  # type: ignore[arg-type]
    layer = moa.MoALinear(nn.Linear(dim_in, dim_out), config)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5)
    layer.noise_key = torch.tensor([1, 2, 3, 4, 0])
    return layer


def value_and_gradients(layer: moa.MoALinear, x: Tensor) -> dict[str, Tensor]:
    """On the layer's device, brought back to the CPU."""
    given = x.to(layer.base.weight).requires_grad_()
    y = layer(given)
    loss = y.float().square().mean() + 0.01 * moa.aux_loss(layer)
    torch.autograd.backward(loss)
    named = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    found = {"y": y, "x": given.grad, **named}
    return {name: t.detach().cpu() for name, t in found.items() if t is not None}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("images", [4, 1400], ids=["few", "beyond 65,535 tokens"])
def test_a_layer_computes_what_a_cpu_does(method: str, images: int) -> None:
    """A layer computes what a CPU does, beyond 65,535 tokens, too."""
    layer = make_layer(method)
    x = torch.randn(images, 50, 64)
    on_gpu = value_and_gradients(copy.deepcopy(layer).to(GPU), x)
    on_cpu = value_and_gradients(layer, x)
    assert on_gpu.keys() == on_cpu.keys()
    for name, expected in on_cpu.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            on_gpu[name], expected, rtol=1e-4, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("method", ["moa_lora", "moa_kron"])
def test_bf16_routes_in_fp32(method: str) -> None:
    """In bf16 the gates are those of exact products.

    Of the rounded numbers in float64, not of rounded sums.
    """
    layer = make_layer(method, 256, 64).to(torch.bfloat16)
    x = torch.randn(8, 100, 256).bfloat16()
    gates: dict[str, Tensor] = {}
    for name, device, dtype in (("gpu", GPU, torch.bfloat16), ("cpu", "cpu", torch.float64)):
        twin = copy.deepcopy(layer).to(device, dtype)
        twin.record_gates = lambda g, n=name: gates.__setitem__(n, g.double().cpu().flatten(0, 1))
        with torch.no_grad():
            twin(x.to(device, dtype))
    same = gates["gpu"].argmax(1) == gates["cpu"].argmax(1)
    assert same.float().mean() > 0.995  # near ties may fall either way
    torch.testing.assert_close(gates["gpu"][same], gates["cpu"][same], rtol=0, atol=2e-5)


def test_products_of_bf16_factors_are_wide() -> None:
    """Products of bf16 factors are rounded only at their end."""
    torch.manual_seed(0)
    x, weight = torch.randn(3000, 512).bfloat16(), torch.randn(48, 512).bfloat16()
    gradient = torch.randn(3000, 48)
    on_gpu = [t.to(GPU).requires_grad_() for t in (x, weight)]
    product = precision.wide_product(*on_gpu)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    expected = exact[0] @ exact[1].T
    torch.testing.assert_close(product.double().cpu(), expected, rtol=1e-5, atol=1e-4)
    found = torch.autograd.grad(product, on_gpu, gradient.to(GPU))
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    for a, b in zip(found, wanted, strict=True):
        error = (a.double().cpu() - b).abs() / b.abs().clamp(min=0.1)
        assert error.max() < 2.0**-7  # no more than rounding to bf16 at the end
    # Rounding the gradient first would be ten times worse before that last rounding.
    halves = precision.split(gradient).double()
    low = ((halves[:, :48] + halves[:, 48:]) - gradient.double()).abs().max()
    assert low < 2.0**-15


@pytest.mark.parametrize("method", ["moa_lora", "moa_kron"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_train_alike(method: str, checkpointing: bool) -> None:
    """Compiled blocks train as others do."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    model.set_grad_checkpointing(checkpointing)
    moa.inject(model, moa.MoAConfig(method=method))  # type: ignore[arg-type]
    model.to(GPU).train()
    compiled = copy.deepcopy(model)
    moa.compile_blocks(compiled)
    losses = []
    images = torch.randn(4, 3, 224, 224, device=GPU)
    labels = torch.arange(4, device=GPU)
    for twin in (model, compiled):
        optimizer = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], 1e-3)
        for step in range(4):
            moa.set_routing_position(twin, moa.RoutingPosition(0, step, 0))
            loss = F.cross_entropy(twin(images), labels) + moa.aux_loss(twin)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-4)
    assert losses[3] < losses[0]


@pytest.mark.parametrize("method", ["moa_lora", "moa_kron", "multi_lora"])
def test_a_graph_trains_as_written(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step whose micro-batches are one CUDA graph trains as written and waits for nothing.

    It is captured once. A step is left out, and the bias of the balance moves.
    """
    captures: list[object] = []
    launched: dict[str, float | str] = {}
    captured = graphed.captured

    def once(*args: Any) -> Any:
        captures.append(args)
        return captured(*args)

    @contextmanager
    def watched(step: int) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        with counted(GPU, 1) if step == STEPS - 1 else nullcontext({}) as found:
            yield
            torch.cuda.set_sync_debug_mode("default")
        launched.update(found)

    collectives.start(ALONE)
    try:
        written = trained(tmp_path / "off", method, "off")
        monkeypatch.setattr(graphed, "captured", once)
        found = trained(tmp_path / "on", method, "on", watched)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        collectives.stop()
    torch.testing.assert_close(found, written, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert len(captures) == 1
    assert float(launched["kernels"]) > 3 * float(launched["launches"])


def test_a_step_is_counted_as_it_was_launched() -> None:
    """What is counted of a step are its kernels, their launches and the host's waits."""
    x = torch.ones(512, 512, device=GPU)
    with counted(GPU, 2) as found:
        for _ in range(2):
            (x + x).sum().item()
    assert found["kernels"] >= found["launches"] >= 2
    assert found["host waits"] == 1
    assert found["busy ms"] > 0
    assert found["waited ms"] > 0


RUNS = {
    "cpu": ({}, 0, {"CUDA_VISIBLE_DEVICES": ""}),
    "gpu": ({}, 0, {}),
    "as written": ({"train__graph": "off"}, 0, {}),
    "deepspeed": ({}, 1, {}),
    **{
        name: ({"ds_config": f"ds_configs/{name}.json"}, 0, {})
        for name in ("zero1", "zero2_offload", "zero3", "zero3_offload")
    },
    "device": ({"data__augment_on": "device"}, 0, {}),
    "device cpu": ({"data__augment_on": "device"}, 0, {"CUDA_VISIBLE_DEVICES": ""}),
    "workers": ({"data__workers": "2"}, 0, {}),
    "checkpointing": ({"model__grad_checkpointing": "true"}, 0, {}),
    "bf16": ({"train__precision": "auto"}, 0, {}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of finished short runs."""
    folder = tmp_path_factory.mktemp("runs")

    def start(name: str) -> None:
        changes, processes, variables = RUNS[name]
        changes = {"train__precision": "fp32", **changes}
        ended = launch(*arguments(folder / name, **changes), processes=processes, **variables)
        assert ended.returncode == 0, f"{name}: {ended.stdout[-500:]}{ended.stderr[:3000]}"

    with ThreadPoolExecutor(len(RUNS)) as pool:
        ended = {name: pool.submit(start, name) for name in RUNS}
    failed = [str(e.exception())[:4000] for e in ended.values() if e.exception()]
    assert not failed, "\n\n".join(failed)
    return folder


def losses(folder: Path) -> list[float]:
    return [float(row["loss"]) for row in rows(folder / "metrics.jsonl")]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "other", "tolerance"),
    [
        ("gpu", "cpu", 1e-4),
        ("as written", "gpu", 1e-5),
        *((name, "gpu", 1e-4) for name in (
            "deepspeed", "zero1", "zero2_offload", "zero3", "zero3_offload", "workers",
            "checkpointing",
        )),
        ("device", "device cpu", 1e-3),
        ("bf16", "gpu", 0.05),
    ],
)  # fmt: skip
def test_runs_train_alike(runs: Path, name: str, other: str, tolerance: float) -> None:
    """Runs under every JSON file train as a run on a CPU does, fp32 without TF32."""
    found, expected = losses(runs / name), losses(runs / other)
    assert len(found) == 13
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("name", ["gpu", "bf16"])
def test_a_run_resumes(runs: Path, tmp_path: Path, name: str) -> None:
    """A run resumes to the numbers of an uninterrupted one.

    The second half of a run of 13 steps after its first 6, against the run in one piece.
    """
    changes = {"train__precision": RUNS[name][0].get("train__precision", "fp32")}
    for steps in ("7", "13"):
        ended = launch(
            *arguments(tmp_path / "run", **changes | {"train__steps": steps}), "--resume=auto"
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
    found, expected = losses(tmp_path / "run"), losses(runs / name)
    assert found == pytest.approx(expected, rel=1e-5 if name == "gpu" else 1e-2)


def test_an_adapter_evaluates_as_its_run_did(runs: Path) -> None:
    """An adapter evaluates as its run did."""
    adapter = runs / "gpu" / "adapter"
    ended = subprocess.run(
        [sys.executable, "-m", "trainer.evaluate", "--adapter", str(adapter), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = json.loads(next(line for line in ended.stdout.splitlines() if line[0] == "{"))
    saved = json.loads((adapter / "adapter_config.json").read_text())["results"]
    assert {key: found[key] for key in found if key.endswith("_acc")} == {
        key: saved[key] for key in found if key.endswith("_acc")
    }


@pytest.mark.parametrize("name", ["zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_a_signal_ends_a_run_with_its_code(tmp_path: Path, name: str) -> None:
    """A signal ends a run with 75, also where an offloaded optimizer has pinned memory."""
    output, log = tmp_path / "run", tmp_path / "log.txt"
    command = arguments(output, train__steps="2000", ds_config=f"ds_configs/{name}.json")
    run = warm.Started((RUN, *command), log, log, environment())
    while run.poll() is None and not (output / "metrics.jsonl").exists():
        time.sleep(0.1)
    run.send_signal(signal.SIGUSR1)
    assert run.wait(300) == 75, log.read_text()[-3000:]


@pytest.mark.parametrize("name", ["zero2", "zero3_offload"])
def test_a_loss_that_is_not_finite_ends_a_run_with_its_code(tmp_path: Path, name: str) -> None:
    """A loss that is not finite ends a run with 70."""
    changes = {"optim__lr": "1e30", "ds_config": f"ds_configs/{name}.json"}
    assert launch(*arguments(tmp_path / "run", **changes)).returncode == 70


def test_a_process_takes_the_one_device_it_is_shown(tmp_path: Path) -> None:
    """A process that is shown one device of its own takes it, whatever its number on the host."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": shown}
    ended = launch(*arguments(tmp_path / "run"), **told)
    assert ended.returncode == 0, ended.stderr[-3000:]
    command = ("-m", "trainer.evaluate", "--adapter", str(tmp_path / "run" / "adapter"), "--json")
    ended = warm.run(*command, env=environment(**told))
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_an_image_that_turns_tf32_on_changes_nothing(runs: Path, tmp_path: Path) -> None:
    """An image that turns TF32 on changes no number."""
    command = arguments(tmp_path / "run", train__precision="fp32")
    ended = launch_anew(*command, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(runs / "gpu"), rel=1e-5)
