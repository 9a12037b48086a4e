"""The model card of an adapter, as hubs read it."""

from dataclasses import replace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from moa import AdapterError, MoAConfig, Origin
from moa.files.card import creation, model_card
from moa.files.origin import origin_from
from moa.files.reading import AdapterInfo
from moa.files.saving import check_base

ORIGIN = Origin(
    dataset="officehome", domains=("Art", "Clipart", "Product", "Real World"),
    held_out="Real World", trial_seed=2, holdout_fraction=0.25, seed=7, data_hash="ab" * 8,
    split_hash="cd" * 8,
    command="python trainer/run.py --data.held_out 'Real World'", processes=8,
)  # fmt: skip
RESULTS = {"step": 400, "env0_in_acc": 0.5, "env0_out_acc": 0.25}
RESULTS |= {"env3_in_acc": 0.87654, "env3_out_acc": 0.75, "moa/env3_left_out_acc": 0.125}
BASE = "vit_base_patch16_clip_224.laion2b"
INFO = AdapterInfo(
    BASE, "0f" * 32, MoAConfig(method="moa_kron"), ("a", "b"), {}, RESULTS, ORIGIN
)  # fmt: skip


def test_front_matter_is_what_hubs_read() -> None:
    card = ModelCard(model_card(INFO))
    front = yaml.safe_load(model_card(INFO).split("---\n")[1])
    assert front["library_name"] == "moa-trainer"
    assert front["base_model"] == f"timm/{BASE}"
    assert front["datasets"] == ["officehome"]
    assert {"domain-generalization", "mixture-of-adapters"} <= set(front["tags"])
    (entry,) = front["model-index"]
    assert {r["dataset"]["config"] for r in entry["results"]} == {"Real World"}
    found = {r.dataset_split: r.metric_value for r in card.data.eval_results}
    assert found == {"in": 87.65, "out": 75.0, "left_out": 12.5}
    assert card.data.eval_results[0].dataset_args == {
        "trial_seed": 2, "holdout_fraction": 0.25, "data_hash": "ab" * 8,
        "split_hash": "cd" * 8,
    }  # fmt: skip


def test_card_tells_results_command_and_identities() -> None:
    text = ModelCard(model_card(INFO)).text
    for part in (
        "| **Real World** (held out) | 87.7 | 75.0 | 12.5 |", "| Art | 50.0 | 25.0 | - |",
        "| step | 400 |", ORIGIN.command, "ab" * 8, "cd" * 8, "0f" * 32, "8 processes",
        "Trial seed 2",
    ):  # fmt: skip
        assert part in text
    compiled = replace(INFO, origin=replace(ORIGIN, compiled="blocks"))
    assert "ran on 8 processes with compiled blocks." in ModelCard(model_card(compiled)).text
    assert "compiled" not in text
    assert "compiled" not in ORIGIN.plain()


@pytest.mark.parametrize("info", [replace(INFO, origin=None), replace(INFO, results={})])
def test_card_of_an_adapter_of_which_little_is_known(info: AdapterInfo) -> None:
    card = ModelCard(model_card(info))
    assert card.data.eval_results is None
    assert "0f" * 32 in card.text


def test_embedded_base_is_not_looked_for_on_the_hub() -> None:
    import trainer.prepare.vit_embedded  # noqa: F401  (registers it)

    card = ModelCard(model_card(replace(INFO, base_model="vit_embedded.glyphs")))
    assert card.data.base_model == "vit_embedded.glyphs"
    assert "import trainer.prepare.vit_embedded\n" in card.text
    with pytest.raises(
        AdapterError, match=r"with: import trainer\.prepare\.vit_embedded; model = "
    ):
        check_base("mine", replace(INFO, base_model="vit_embedded.glyphs"), "", torch.float32)


def test_safetensors_for_a_base_that_timm_ships_otherwise() -> None:
    name, origin = "vit_tiny_r_s16_p8_224.augreg_in21k", replace(ORIGIN, weights="a.safetensors")
    (line,) = creation(replace(INFO, base_model=name, origin=origin))
    assert 'pretrained_cfg_overlay={"file": "a.safetensors", "custom_load": False}' in line


def test_origin_survives_its_plain_form() -> None:
    assert origin_from(ORIGIN.plain()) == ORIGIN


@pytest.mark.parametrize(
    "change",
    [
        {"decode": 1},
        {"weights": None},
        {"trial_seed": "0"},
        {"seed": True},
        {"colour": 1},
        {"holdout_fraction": "a"},
        {"domains": 3},
        {"domains": "photo"},
        {"trial_seed": -1},
        {"processes": 2**63},
    ],
)
def test_origin_that_is_not_legal_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="origin"):
        origin_from(ORIGIN.plain() | change)
