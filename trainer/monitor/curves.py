"""`Curves`: what TensorBoard shows of a run, under the tags and on the pages users look at.

The x axis is the global step throughout; a resumed run purges what it does again.
"""

import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from moa.files.atomic_folder import with_path
from moa.files.markdown import block
from trainer.config.run_config import RunConfig, as_plain, flat
from trainer.monitor.tracking import Tracking
from trainer.prepare.provenance import shown_command

TARGET = "select/training_domain_validation/target_acc"
VALIDATION = "select/training_domain_validation/validation_acc"
MEAN_OUT = "eval/mean_source_out_acc"
RESULTS = (TARGET, VALIDATION, "train/loss", "perf/img_s", "mem/peak_gib")
"""Columns of the hparams page beside the settings: the last value of these curves."""

HPARAMS = (
    "data.dataset", "data.held_out", "moa.aux_weight", "moa.method", "moa.ranks", "moa.router",
    "model.backbone", "optim.lr", "optim.weight_decay", "train.batch_per_domain", "train.seed",
    "train.steps", "train.trial_seed",
)  # fmt: skip
"""Settings on the hparams page, which shows the first five unasked; all are on the text page."""


class Curves:
    """Writes a run's TensorBoard events; on the main rank only.

    Args:
        first_step: where the run (re)starts; later events of an earlier start are purged.
        layers: paths of the layers that route.
        tracking: where the same scalars go beside TensorBoard.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        first_step: int,
        layers: Sequence[str],
        tracking: Tracking | None = None,
    ) -> None:
        self.tracking = tracking
        self.writer = SummaryWriter(str(folder), purge_step=first_step)
        self.writer.add_custom_scalars(layout(layers, config.average.names))
        text = yaml.safe_dump(as_plain(config), sort_keys=False)
        self.writer.add_text("run/config", block(text.rstrip(), "yaml"), first_step)
        self.writer.add_text("run/command", block(shown_command(sys.argv), "sh"), first_step)
        known = flat(config)
        settings = {name: _plain(known[name]) for name in HPARAMS}
        *opening, self._end = hparams(settings, dict.fromkeys(RESULTS, 0.0))  # type: ignore[no-untyped-call]
        for summary in opening:  # of the hparams page's row
            self._add(summary)

    def _add(self, summary: Any, step: int | None = None) -> None:
        with with_path(self.writer.log_dir):
            self.writer._get_file_writer().add_summary(summary, step)  # type: ignore[no-untyped-call]

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point on each of some curves; values that are not finite leave a gap."""
        finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
        with with_path(self.writer.log_dir):
            for tag, value in finite.items():
                self.writer.add_scalar(tag, value, step)
        if self.tracking is not None:
            self.tracking.scalars(finite, step)

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """An image, given as a file, of a page with a slider over steps."""
        width, height = Image.open(io.BytesIO(png)).size
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        self._add(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def projector(
        self, features: Tensor, labels: list[list[str]], images: Tensor, step: int
    ) -> None:
        """The embedding projector's N points, from features [N, F]; a step's are written once.

        Of each point `labels` are its domain, split of the domains and class, and `images`
        [N, 3, h, w] in [0, 1] what shows it.
        """
        if (Path(self.writer.log_dir) / f"{step:05d}" / "features").exists():
            return
        self.writer.add_embedding(
            features, metadata=labels, label_img=images, global_step=step, tag="features",
            metadata_header=["domain", "part", "class"],
        )  # fmt: skip

    def close(self, whole: bool) -> None:
        """Flushes; `whole` marks the run as finished on the hparams page and in trackers."""
        if self.tracking is not None:
            self.tracking.close(whole)
        if whole:
            self._add(self._end)
        with with_path(self.writer.log_dir):
            self.writer.close()


def layout(layers: Sequence[str], averages: Sequence[str]) -> dict[str, Any]:
    """The custom scalars page: training, domains, routers, performance."""

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", list(tags)]

    pages: dict[str, Any] = {
        "training": {
            "loss": chart("train/loss$", "train/ce$"),
            "balance loss": chart("train/aux_loss$"),
            "gradient norm": chart("train/grad_norm$"),
            "learning rate": chart("train/lr$"),
        },
        "domains": {
            "selected adapter": chart(TARGET, VALIDATION),
            "mean of the sources, out": chart(f"{MEAN_OUT}$"),
            "all domains, out": chart(r"eval/.*/out_acc$"),
            "all domains, in": chart(r"eval/.*/in_acc$"),
            **{f"{name}, out": chart(rf"average/{name}/.*/out_acc$") for name in averages},
        },
    }
    if layers:
        pages["routers"] = {
            "dead experts": chart("router/dead_experts$", "router/active_warnings$"),
            "entropy": chart(r"router/.*/entropy$"),
            "largest probability": chart(r"router/.*/max_prob$"),
            "bits about the domain": chart(r"router/.*/bits_domain$"),
            "bits about the class": chart(r"router/.*/bits_class$"),
            **{f"load {layer}": chart(rf"router/{layer}/load_\d+$") for layer in layers},
        }
    pages["performance"] = {
        "images/s": chart("perf/img_s$"),
        "step and data wait, ms": chart("perf/step_ms$", "perf/data_wait_ms$"),
        "model FLOP utilisation": chart("perf/mfu$"),
        "peak memory, GiB": chart("mem/peak_gib$"),
    }
    return pages


def _plain(value: object) -> str | float | bool:
    if isinstance(value, (bool, int, float, str)):
        return value
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
