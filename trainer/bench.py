"""`python -m trainer.bench`: what the factored adapters cost, as ratios measured in one run.

Variants take turns, so that whatever else the machine does meets all of them; the medians of their
times are compared. A ratio holds for one machine, no time here holds for another.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import moa
import trainer.vit_embedded  # noqa: F401  (registers the embedded backbone)
from moa.experts import KroneckerExpert, KroneckerRule
from moa.layer import MoALinear

Work = Callable[[], None]
METHODS = ("linear", "lora", "moa_lora", "moa_kron", "full")


def medians(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Median seconds of each work over `rounds` interleaved rounds, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if number:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def dense_kronecker(layer: MoALinear, rule: KroneckerRule, x: Tensor) -> Tensor:
    """The layer's output [N, O] with every expert's H_e [D, O] formed, as the paper reads."""
    assert layer.router is not None
    gates = layer.router(x, None).gates
    y: Tensor = layer.base(x) + layer.bias
    for e, expert in enumerate(layer.experts):
        assert isinstance(expert, KroneckerExpert)
        small = expert.left @ expert.right  # [P, D/P, O/P]
        full = torch.einsum("pa,pb,pio->aibo", rule.left, rule.right, small)
        y = y + gates[:, e : e + 1] * (x @ full.reshape(layer.in_features, layer.out_features))
    return y


def layer_works(width: int, tokens: int) -> dict[str, Work]:
    """Forward and backward of one qkv layer: bare, factored LoRA and Kronecker, dense Kronecker."""
    base, x = nn.Linear(width, 3 * width), torch.randn(tokens, width, requires_grad=True)
    lora = MoALinear(base, moa.MoAConfig(method="moa_lora"))
    kron = MoALinear(base, moa.MoAConfig(method="moa_kron"))

    def work(forward: Callable[[Tensor], Tensor]) -> Work:
        return lambda: torch.autograd.backward(forward(x).sum())

    return {
        "base alone": work(base),
        "moa_lora": work(lora),
        "moa_kron": work(kron),
        "moa_kron, dense H": work(lambda t: dense_kronecker(kron, kron.kron_rule, t)),
    }


def step_works(backbone: str, batch: int) -> dict[str, Work]:
    """Forward, backward and Adam of a whole model by method, on random images."""
    return {method: _step_work(backbone, batch, method) for method in METHODS}


def _step_work(backbone: str, batch: int, method: str) -> Work:
    model = timm.create_model(backbone, pretrained=False, num_classes=10).train()
    moa.inject(model, moa.MoAConfig(method=method))  # type: ignore[arg-type]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    images = torch.randn(batch, *timm.data.resolve_model_data_config(model)["input_size"])
    labels = torch.randint(10, (batch,))

    def work() -> None:
        loss = F.cross_entropy(model(images), labels) + moa.aux_loss(model)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    return work


def main(argv: Sequence[str]) -> int:
    """Command line: prints the table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m trainer.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    measured = {
        "qkv layer, ViT-B width, 788 tokens": medians(layer_works(768, 788), args.rounds),
        "training step, embedded ViT, 40 images": medians(
            step_works("vit_embedded", 40), args.rounds
        ),
    }
    console = Console()
    if args.json:
        console.print(json.dumps(measured, indent=1), soft_wrap=True, highlight=False)
        return 0
    table = Table("what", "variant", "ms", "ratio to the first")
    for what, times in measured.items():
        first = next(iter(times.values()))
        for name, seconds in times.items():
            table.add_row(what, name, f"{1000 * seconds:.1f}", f"{seconds / first:.2f}")
        table.add_section()
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
