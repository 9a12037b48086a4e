"""Settings keep working under the names of older command lines, recipes and runs."""

from pathlib import Path

import pytest
import yaml

from trainer.config.command_line import parse
from trainer.config.run_config import CheckpointConfig, dotted
from trainer.process.errors import ConfigError


def test_the_old_spelling_on_the_command_line() -> None:
    data = parse(["--data.mode=window", "--data.window", "2"]).data
    assert (data.order, data.order_window) == ("window", 2)
    with pytest.raises(ConfigError, match=r"--data.order = 'windows': .*did you mean 'window'"):
        parse(["--data.mode=windows"])


def test_the_old_spelling_in_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "old.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"mode": "window", "window": 2}}))
    data = parse([f"--recipe={recipe}"]).data
    assert (data.order, data.order_window) == ("window", 2)
    data = parse([f"--recipe={recipe}", "--data.order=permutation", "--data.order_window=0"]).data
    assert (data.order, data.order_window) == ("permutation", 0)


def test_the_old_spelling_in_the_configuration_of_a_run() -> None:
    """As reports and sweeps read `config.yaml`."""
    old = {"data": {"mode": "replacement", "window": 0}, "eval": {"mode": "full"}}
    assert dict(dotted(old)) == {
        "data.order": "replacement", "data.order_window": 0, "eval.mode": "full"
    }  # fmt: skip


def test_the_old_spelling_among_the_settings_that_may_change() -> None:
    assert CheckpointConfig(allow_changes=("data.mode", "data.order")).problems() == []
