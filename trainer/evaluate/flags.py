"""Flags that the commands on saved adapters share; `trainer.evaluate.data` reads what they name."""

import argparse
from typing import get_args

from shards.config import MAX_PIXELS, Decode, Truncated


def add_shared_flags(result: argparse.ArgumentParser) -> None:
    """Adapters, their base, and the data and split they are looked at on."""
    add = result.add_argument
    add(
        "--adapter", nargs="+", required=True, metavar="A",
        help="folders of saved adapters or checkpoints, or hf-hub:organisation/name",
    )  # fmt: skip
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


def add_weights_flag(result: argparse.ArgumentParser, purpose: str = "") -> None:
    """The weights of the base; `purpose` says what needs them where not the whole command does."""
    result.add_argument(
        "--model.weights", dest="weights",
        help=f"{purpose}pretrained, random, or a safetensors file of the base (as the adapter "
        "says, else pretrained)",
    )  # fmt: skip
