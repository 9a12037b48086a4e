"""`python -m trainer.pretrain_embedded`: trains the embedded backbone on rendered glyphs.

Writes `vit_embedded.safetensors` and the model card `README.md` with the figures of the run.
Images start easy and widen with the step: with random polarity, colours and shapes from the first
step the loss of a transformer this small stays at chance for hundreds of steps.
"""

import logging
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import PIL
import timm
import torch
from safetensors.torch import save as save_tensors
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn import functional as F

from trainer.checkpoint.atomic_file import replace_text, replaced_file
from trainer.config.command_line import CommandParser
from trainer.prepare.vit_embedded import GLYPH_CLASSES, WEIGHTS_PATH
from trainer.pretrain_embedded.glyphs import HELD_OUT_FONTS, TRAIN_FONTS, GlyphBank, GlyphSampler

log = logging.getLogger(__name__)

VALIDATION_IMAGES = 4000


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Settings of one pretraining run; the defaults made the shipped weights.

    Attributes:
        steps: optimizer steps.
        batch_size: images per step.
        peak_lr: learning rate after the warmup; a cosine takes it to zero at the last step.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        weight_decay: of matrices; biases, norms, class token and positions have none.
        label_smoothing: of the cross-entropy.
        easy_until: share of the run during which glyphs are large, centred, upright, white on
            black.
        full_from: share of the run from which images have their full range; linear in between.
        seed: of the initial weights and of the images.
    """

    steps: int = 1200
    batch_size: int = 128
    peak_lr: float = 1e-3
    warmup_steps: int = 150
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    easy_until: float = 0.06
    full_from: float = 0.45
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be in [0, steps={self.steps}); "
                "lower it or train longer"
            )
        if not 0 <= self.easy_until < self.full_from <= 1:
            raise ValueError(
                f"easy_until={self.easy_until} and full_from={self.full_from} must satisfy "
                "0 <= easy_until < full_from <= 1"
            )

    def lr(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * progress))

    def difficulty(self, step: int) -> float:
        """Difficulty of the images of a step, in [0, 1]."""
        progress = (step / self.steps - self.easy_until) / (self.full_from - self.easy_until)
        return min(1.0, max(0.0, progress))


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """What a finished run produced.

    Attributes:
        model: in evaluation mode.
        seconds: with the drawing of the glyphs.
        accuracy: in [0, 1], by the name of the validation set.
    """

    model: nn.Module
    losses: list[float]
    seconds: float
    accuracy: dict[str, float]


@torch.inference_mode()
def _validate(model: nn.Module, fonts: Sequence[str], seed: int) -> dict[str, float]:
    """Accuracy on plain and on fully varied images of some fonts."""
    bank, accuracy = GlyphBank(fonts), {}
    for name, difficulty in (("plain", 0.0), ("full range", 1.0)):
        images, labels = GlyphSampler(bank, seed).batch(VALIDATION_IMAGES, difficulty)
        predicted = torch.cat([model(part).argmax(-1) for part in torch.split(images, 500)])
        accuracy[name] = (predicted == labels).double().mean().item()
    return accuracy


def pretrain(
    config: PretrainConfig,
    train_fonts: Sequence[str] = TRAIN_FONTS,
    held_out_fonts: Sequence[str] = HELD_OUT_FONTS,
) -> PretrainResult:
    """Trains from scratch; equal settings on equal hardware give equal weights.

    The validation images, in `held_out_fonts`, which may be empty, choose nothing.
    """
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = timm.create_model("vit_embedded", num_classes=len(GLYPH_CLASSES))
    sampler = GlyphSampler(GlyphBank(train_fonts), config.seed)
    undecayed = ("cls_token", "pos_embed")  # beside biases and norms
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=undecayed)
    optimizer = torch.optim.AdamW(groups, lr=config.peak_lr)
    losses: list[float] = []
    model.train()
    for step in range(config.steps):
        images, labels = sampler.batch(config.batch_size, config.difficulty(step))
        for group in optimizer.param_groups:
            group["lr"] = config.lr(step)
        loss = F.cross_entropy(model(images), labels, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            recent, elapsed = sum(losses[-100:]) / 100, time.perf_counter() - start
            log.info("step %d loss %.3f after %.0f s", step + 1, recent, elapsed)
    seconds = time.perf_counter() - start
    model.eval()
    accuracy = _validate(model, held_out_fonts, config.seed + 1) if held_out_fonts else {}
    return PretrainResult(model=model, losses=losses, seconds=seconds, accuracy=accuracy)


def model_card(config: PretrainConfig, result: PretrainResult) -> str:
    """The weights of a run in Markdown; every figure comes from the arguments."""
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    last = result.losses[-100:]
    return template.format(
        config=config, torch=torch, timm=timm, matplotlib=matplotlib, PIL=PIL,
        parameters=sum(parameter.numel() for parameter in result.model.parameters()),
        classes=" ".join(GLYPH_CLASSES), num_classes=len(GLYPH_CLASSES),
        fonts=len(TRAIN_FONTS), held_out_fonts=", ".join(HELD_OUT_FONTS),
        minutes=result.seconds / 60, threads=torch.get_num_threads(), cores=os.cpu_count(),
        machine=platform.machine(), python=platform.python_version(),
        validation_images=VALIDATION_IMAGES, loss=sum(last) / len(last),
        accuracy="\n".join(f"| {name} | {value:.1%} |" for name, value in result.accuracy.items()),
        settings="\n".join(f"| `{name}` | {value} |" for name, value in asdict(config).items()),
    )  # fmt: skip


def save(config: PretrainConfig, result: PretrainResult, folder: Path) -> Path:
    """Writes the weights and the model card, each whole; returns the path of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / WEIGHTS_PATH.name
    tensors = {name: value.contiguous() for name, value in result.model.state_dict().items()}
    with replaced_file(weights) as temporary:
        metadata = {"format": "pt", "classes": " ".join(GLYPH_CLASSES)}
        temporary.write_bytes(save_tensors(tensors, metadata=metadata))
    replace_text(folder / "README.md", model_card(config, result))
    return weights


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: trains, then writes weights and card."""
    parser = CommandParser(description="Pretrain the embedded backbone on glyphs.")
    parser.add_argument("--out", type=Path, default=WEIGHTS_PATH.parent, help="output folder")
    parser.add_argument("--seed", type=int, default=PretrainConfig.seed)
    parser.add_argument("--steps", type=int, default=PretrainConfig.steps)
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; another number gives other rounding"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    config = PretrainConfig(seed=options.seed, steps=options.steps)
    result = pretrain(config)
    log.info("accuracy on unseen fonts: %s", result.accuracy)
    log.info("wrote %s", save(config, result, options.out))


if __name__ == "__main__":
    main()
