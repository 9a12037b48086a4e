"""Flags that the commands on saved adapters share; `trainer.evaluate.data` reads what they name."""

import argparse
from collections.abc import Callable
from typing import get_args

from shards.config import MAX_PIXELS, DataConfig, Decode, Truncated
from trainer.config.command_line import LAUNCHER_FLAGS


def add_shared_flags(result: argparse.ArgumentParser) -> None:
    """Adapters, their base, and the data and split they are looked at on."""
    add_adapter_flag(result)
    add = result.add_argument
    add("--domains", nargs="+", metavar="NAME", help="domains to look at (all)")
    add_weights_flag(result)
    add("--train.trial_seed", dest="trial_seed", type=int, help="split (as the adapters say)")
    add = result.add_argument_group("data").add_argument
    add("--data.dataset", dest="dataset", help="(as the adapters say, else digits)")
    add("--data.root", dest="root", help="shard set (the embedded data)")
    add(
        "--data.holdout_fraction", dest="holdout_fraction", type=float,
        help="share of the out split (as the adapters say)",
    )  # fmt: skip
    listed = "samples to leave out, or to keep; `in` and `out` are without the rest"
    add("--data.exclude_list", dest="exclude_list", metavar="FILE", help=listed)
    add("--data.include_list", dest="include_list", metavar="FILE", help=listed)
    add_decoding_flags(add)


def add_adapter_flag(result: argparse.ArgumentParser) -> None:
    """The adapters, one or more."""
    result.add_argument(
        "--adapter", nargs="+", required=True, metavar="A",
        help="folders of saved adapters or checkpoints, or hf-hub:organisation/name",
    )  # fmt: skip


def add_pace_flags(result: argparse.ArgumentParser) -> None:
    """How an adapter is computed, and the flags that launchers append."""
    add = result.add_argument
    add("--batch", type=int, default=128, help="images per process and batch (%(default)s)")
    add(
        "--precision", choices=["fp32", "bf16"],
        help="of the arithmetic (that of the adapters' runs; fp32 where they differ)",
    )  # fmt: skip
    workers = DataConfig().workers
    add("--data.workers", dest="workers", type=int, default=workers, help="(%(default)s)")
    for name in LAUNCHER_FLAGS:
        add(f"--{name}", dest="launcher", type=int, help=argparse.SUPPRESS)


def add_decoding_flags(add: Callable[..., object]) -> None:
    """Where bytes of images are kept, and how they become pixels."""
    add("--data.cache_dir", dest="cache_dir", help="where shards of a remote root are kept")
    add(
        "--data.decode", dest="decode", choices=get_args(Decode),
        help="decoder (as the adapters say, else auto)",
    )  # fmt: skip
    add(
        "--data.truncated", dest="truncated", choices=get_args(Truncated),
        help="incomplete images (as the adapters say, else keep)",
    )  # fmt: skip
    add(
        "--data.max_pixels", dest="max_pixels", type=int,
        help=f"largest number of pixels of an image ({MAX_PIXELS})",
    )  # fmt: skip


def add_size_flag(result: argparse.ArgumentParser) -> None:
    """Images of another size than the adapter was trained on."""
    result.add_argument(
        "--model.image_size", dest="image_size", type=int, metavar="PIXELS",
        help="side of the images, to look at an adapter on others than its own",
    )  # fmt: skip


def add_weights_flag(result: argparse.ArgumentParser, purpose: str = "") -> None:
    """The weights of the base; `purpose` says what needs them where not the whole command does."""
    result.add_argument(
        "--model.weights", dest="weights",
        help=f"{purpose}pretrained, random, or a safetensors file of the base (as the adapter "
        "says, else pretrained)",
    )  # fmt: skip
