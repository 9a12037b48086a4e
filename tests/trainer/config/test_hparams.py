"""Drawn settings against DomainBed's rule written anew, and what wins over a draw."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from numpy.random import RandomState

from trainer.config.command_line import parse, parse_without_data, setting_type
from trainer.config.hparams import DRAWS, drawn, in_words
from trainer.config.run_config import RunConfig, as_plain, flat
from trainer.process.errors import ConfigError

OBJECTIVES = get_args(setting_type("objective.name"))


def random(number: int, name: str) -> RandomState:
    text = str((number, name))
    return RandomState(int(hashlib.md5(text.encode()).hexdigest(), 16) % 2**31)


DOMAINBED: dict[str, tuple[str, Callable[[RandomState], Any]]] = {
    "optim.lr": ("lr", lambda r: 10 ** r.uniform(-5, -3.5)),
    "optim.weight_decay": ("weight_decay", lambda r: 10 ** r.uniform(-6, -2)),
    "train.batch_per_domain": ("batch_size", lambda r: int(2 ** r.uniform(3, 5.5))),
    "domainnet": ("batch_size", lambda r: int(2 ** r.uniform(3, 5))),
    "model.dropout": ("vit_dropout", lambda r: r.choice([0.0, 0.1, 0.5])),
    "objective.groupdro_eta": ("groupdro_eta", lambda r: 10 ** r.uniform(-3, -1)),
    "objective.irm_lambda": ("irm_lambda", lambda r: 10 ** r.uniform(-1, 5)),
    "objective.irm_anneal": ("irm_penalty_anneal_iters", lambda r: int(10 ** r.uniform(0, 4))),
    "objective.vrex_lambda": ("vrex_lambda", lambda r: 10 ** r.uniform(-1, 5)),
    "objective.vrex_anneal": ("vrex_penalty_anneal_iters", lambda r: int(10 ** r.uniform(0, 4))),
    "objective.coral_gamma": ("mmd_gamma", lambda r: 10 ** r.uniform(-1, 1)),
    "objective.mmd_gamma": ("mmd_gamma", lambda r: 10 ** r.uniform(-1, 1)),
    "objective.mixup_alpha": ("mixup_alpha", lambda r: 10 ** r.uniform(-1, 1)),
}


@pytest.mark.parametrize("number", [1, 2, 19])
def test_every_draw_is_domainbeds(number: int) -> None:
    seen = set()
    for draw in DRAWS:
        if draw.setting.startswith("moa."):
            continue  # DomainBed has no adapters
        place = "domainnet" if draw.only == ("domainnet",) else draw.setting
        name, value = DOMAINBED[place]
        assert draw.name == name
        assert draw.value(random(number, draw.name)) == value(random(number, name))
        seen.add(place)
    assert seen == DOMAINBED.keys()
    of_objectives = {draw.setting for draw in DRAWS if {*draw.only} & {*OBJECTIVES}}
    assert of_objectives <= flat(RunConfig()).keys()


def test_a_run_has_what_its_number_draws() -> None:
    for recipe, batch in (("pacs", "train.batch_per_domain"), ("domainnet_vitl", "domainnet")):
        config = parse_without_data([f"--recipe={recipe}", "--hparams_seed=3"])
        found = flat(config)
        for setting in ("optim.lr", "optim.weight_decay"):
            name, value = DOMAINBED[setting]
            assert found[setting] == value(random(3, name))
        assert found["train.batch_per_domain"] == DOMAINBED[batch][1](random(3, "batch_size"))
        assert found["hparams_seed"] == 3
        assert config.run_folder("art").name.endswith("-trial0-hparams3")
    ranks = ([1, 2, 4, 8], [2, 4, 8, 16], [2, 2, 2, 2], [4, 4, 4, 4])
    assert found["moa.ranks"] == ranks[random(3, "adapter_ranks").randint(4)]
    assert drawn(3, "pacs", "linear", "erm").keys() == {
        "optim.lr", "optim.weight_decay", "train.batch_per_domain", "model.dropout",
    }  # fmt: skip


def test_what_is_given_wins_over_a_draw(tmp_path: Path) -> None:
    usual = parse([])
    assert parse(["--hparams_seed=0"]) == usual
    config = parse(["--hparams_seed=3", "--train.batch_per_domain", "8", "--moa.method=lora"])
    assert config.train.batch_per_domain == 8
    assert config.optim.lr != usual.optim.lr, "the recipe's gives way"
    assert "; given: train.batch_per_domain 8" in in_words(config)
    assert f"drew optim.lr {config.optim.lr}, " in in_words(config)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(as_plain(config)))
    again = f"--recipe={tmp_path / 'config.yaml'}"
    assert parse([again]) == config, "a run's own file makes it again"
    assert parse([again, "--hparams_seed=4"]).train.batch_per_domain != 8
    (tmp_path / "mine.yaml").write_text("hparams_seed: 3\noptim: {lr: 0.5}")
    mine = parse([f"--recipe={tmp_path / 'mine.yaml'}", "--moa.method=lora"])
    assert (mine.optim.lr, mine.moa.ranks) == (0.5, config.moa.ranks)


@pytest.mark.parametrize("wrong", ["-1", "x", "1.5", str(2**63)])
def test_what_is_no_number_of_a_set(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"hparams_seed.*a whole number"):
        parse([f"--hparams_seed={wrong}"])
