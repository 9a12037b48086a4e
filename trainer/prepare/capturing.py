"""Whether a step can be captured as a CUDA graph, and what of a run stands against it."""

from trainer.config.run_config import RunConfig
from trainer.process.errors import ConfigError


def obstacle(config: RunConfig, sharded: bool) -> tuple[str, str] | None:
    """What no CUDA graph can repeat, with the flag without which it could; None if nothing is so.

    `sharded` is ZeRO-3.
    """
    ep_size = config.moa.ep_size
    fetches = "ZeRO-3, which fetches weights while a step runs"
    exchanges = f"moa.ep_size {ep_size}, whose ranks exchange experts or tokens while a step runs"
    asks = "model.grad_checkpointing, which asks for a random generator's state"
    repeats = f"objective.name {config.objective.name}, whose step is more than one forward"
    sharpness = f"objective.sam {config.objective.sam}, whose steps have two passes"
    for is_so, what, remedy in (
        (sharded, fetches, "ds_config ds_configs/zero2.json"),
        (ep_size > 1, exchanges, "moa.ep_size 1"),
        (config.model.grad_checkpointing, asks, "model.grad_checkpointing false"),
        (config.objective.name != "erm", repeats, "objective.name erm"),
        (config.objective.sam > 0, sharpness, "objective.sam 0"),
    ):
        if is_so:
            return what, f"--{remedy}"
    return None


def check_captured(config: RunConfig, sharded: bool) -> None:
    """Raises `ConfigError` if a graph is asked for where it cannot be."""
    if config.train.graph == "on" and (found := obstacle(config, sharded)):
        what, remedy = found
        raise ConfigError(f"train.graph: on with {what}; use --train.graph auto, or {remedy}")


def is_captured(config: RunConfig, sharded: bool, on_gpu: bool) -> bool:
    """Whether a run's steps go by static buffers; on a GPU they are a CUDA graph then."""
    wanted = {"on": True, "auto": on_gpu, "off": False}[config.train.graph]
    return wanted and obstacle(config, sharded) is None
