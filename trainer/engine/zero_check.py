"""DeepSpeed's own look at a ZeRO section, before the processes of a run meet."""

from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from trainer.process.errors import ConfigError


def check_zero(ds_json: dict[str, Any], file: str) -> None:
    """Refuses entries that DeepSpeed would refuse when it starts, on every rank with a traceback.

    Args:
        ds_json: complete DeepSpeed configuration (`trainer.config.deepspeed_json.resolve`).
        file: where it comes from, for the message.

    Raises:
        ConfigError: names each entry, its value and what is legal, one a line.
    """
    try:
        DeepSpeedZeroConfig(**ds_json["zero_optimization"])
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            place = ".".join(map(str, ("zero_optimization", *problem["loc"])))
            value = f" is {problem['input']!r}" if problem["loc"] else ""
            lines.append(f"ds_config: {place}{value}; {problem['msg']} (in {file})")
        raise ConfigError("\n".join(lines)) from error
