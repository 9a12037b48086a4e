"""A small backbone from other icon themes and other icons than those of the set.

Learns to name some 830 icons (`camera-photo`, `firefox` ...), each drawn in four or more themes,
none of which is a domain of `build.py`, with no name of its classes and no picture of its domains.
`vit_embedded` at 64 px in patches of 16, from the weights that ship with the trainer, which have
seen letters alone. Writes `backbone.safetensors`.
"""

import argparse
import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from build import DOMAINS, THEMES, check_themes, class_of, collect
from drawings import SIDE, distinct, drawings, fingerprint, on_background, picture
from safetensors.torch import save_file
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

import trainer.prepare.vit_embedded  # noqa: F401  (registers the backbone)

log = logging.getLogger("pretrain")

OTHERS = (
    "Adwaita", "Faba", "Mint-Y", "Moka", "Numix", "Numix-Circle", "Nuovo", "Paper", "Sea", "Tango",
    "Vintage", "Yaru", "bloom", "gartoon", "gnome-colors-common", "nuoveXT2", "sugar", "suru",
    "yasis",
)  # fmt: skip
"""Without relatives of the domains: Obsidian (faenza), gnome (mate), elementary, ePapirus ..."""
PACKAGES = (
    "adwaita-icon-theme faba-icon-theme mint-y-icons moka-icon-theme numix-icon-theme "
    "numix-icon-theme-circle gnome-icon-theme-nuovo paper-icon-theme deepin-icon-theme "
    "tango-icon-theme yaru-theme-icon gnome-icon-theme-gartoon gnome-colors-common "
    "lxde-icon-theme sugar-icon-theme suru-icon-theme gnome-icon-theme-yasis"
)
PATCH = 16
THEMES_A_NAME = 4
BATCH, WARMUP, PEAK_LR, WEIGHT_DECAY, SMOOTHING = 128, 100, 1e-3, 0.05, 0.1


@dataclass(frozen=True)
class Bank:
    """Drawings with transparency, uint8 [N, 4, 64, 64], and the numbers of their names, [N]."""

    pictures: Tensor
    labels: Tensor
    names: list[str]


def bank(themes: Path, forbidden: Iterable[str]) -> Bank:
    """All drawings of the names that enough of the other themes have, each once."""
    by_name: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for theme in OTHERS:
        for drawing in distinct(drawings(themes / theme)):
            if not class_of(drawing.name) and not class_of(drawing.own_name):
                by_name[drawing.name.removesuffix("-symbolic")][theme].append(drawing.path)
    seen, pictures, labels = set(forbidden), [], []
    names = sorted(name for name, found in by_name.items() if len(found) >= THEMES_A_NAME)
    for label, name in enumerate(names):
        for path in (path for paths in by_name[name].values() for path in paths):
            drawn = picture(path)
            shown = on_background(drawn) if drawn else None
            if drawn is None or shown is None or (code := fingerprint(shown)) in seen:
                continue
            seen.add(code)
            pictures.append(torch.from_numpy(np.array(drawn)).permute(2, 0, 1))
            labels.append(label)
    return Bank(torch.stack(pictures), torch.tensor(labels), names)


def varied(pictures: Tensor, draw: torch.Generator) -> Tensor:
    """Random place, size, tilt, colours and background; [B, 4, 64, 64] to [B, 3, 64, 64]."""
    count = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=draw)

    angle, zoom = uniform(-0.2, 0.2), uniform(0.8, 1.3)
    turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1)
    place = torch.cat([(turned * zoom[:, None]).view(-1, 2, 2), uniform(-0.2, 0.2, 2, 1)], -1)
    grid = F.affine_grid(place, [count, 4, SIDE, SIDE], align_corners=False)
    levels = pictures.float() / 255
    colours, alpha = levels[:, :3] * levels[:, 3:], levels[:, 3:]  # else edges darken
    moved = F.grid_sample(torch.cat([colours, alpha], 1), grid, align_corners=False)
    ground = torch.where(uniform(0, 1, 1) < 0.5, 1.0, uniform(0, 1, 3))[..., None, None]
    image = moved[:, :3] + (1 - moved[:, 3:]) * ground
    mixed = F.normalize(uniform(0, 1, 3, 3), p=1, dim=-1)  # other colours, or grey
    keep = (uniform(0, 1) < 0.5)[:, None, None]
    image = torch.einsum("bij,bjhw->bihw", torch.where(keep, torch.eye(3), mixed), image)
    inverted = (uniform(0, 1) < 0.1)[:, None, None, None]
    return torch.where(inverted, 1 - image, image) * 2 - 1


def plain(pictures: Tensor) -> Tensor:
    """As the set has them, on white; [B, 4, 64, 64] to [B, 3, 64, 64]."""
    levels = pictures.float() / 255
    return (levels[:, :3] * levels[:, 3:] + 1 - levels[:, 3:]) * 2 - 1


def rate(step: int, steps: int) -> float:
    """Learning rate: up linearly, then down a cosine."""
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def batches(count: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Numbers of pictures, all of them before any again."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(count, generator=draw)])
        yield order[:BATCH]
        order = order[BATCH:]


def pretrain(data: Bank, steps: int, seed: int) -> nn.Module:
    """Trains on 95 % of the drawings; the rest only tell how far it came."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.labels), generator=draw)
    held, used = order[: len(order) // 20], order[len(order) // 20 :]
    model = timm.create_model(
        "vit_embedded.glyphs", pretrained=True, img_size=SIDE, patch_size=PATCH,
        num_classes=len(data.names),
    )  # fmt: skip
    groups = param_groups_weight_decay(model, WEIGHT_DECAY, ("cls_token", "pos_embed"))
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR)
    start, losses = time.perf_counter(), []
    for step, numbers in zip(range(steps), batches(len(used), draw), strict=False):
        chosen = used[numbers]
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        scores = model(varied(data.pictures[chosen], draw))
        loss = F.cross_entropy(scores, data.labels[chosen], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            passed = time.perf_counter() - start
            log.info("step %d loss %.3f after %.0f s", step + 1, sum(losses[-100:]) / 100, passed)
    model.eval()
    with torch.inference_mode():
        right = model(plain(data.pictures[held])).argmax(-1) == data.labels[held]
    log.info("names of %d drawings not trained on: %.1f %%", len(held), 100 * right.float().mean())
    return model  # type: ignore[no-any-return]


def main(argv: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of backbone.safetensors")
    parser.add_argument("--themes", type=Path, default=THEMES, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    check_themes(parser, args.themes, [*DOMAINS.values(), *OTHERS], PACKAGES)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)  # another number gives other rounding
    data = bank(args.themes, collect(args.themes, DOMAINS, most=0).seen)
    log.info(
        "%d drawings of %d names from %d themes", *data.labels.shape, len(data.names), len(OTHERS)
    )
    model = pretrain(data, args.steps, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "backbone.safetensors"
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(
        {name: value for name, value in tensors.items() if not name.startswith("head.")}, file
    )
    log.info("wrote %s", file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
