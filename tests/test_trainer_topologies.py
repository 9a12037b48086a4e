"""One run carried from one arrangement of processes to another, as its users would."""

from pathlib import Path

import pytest
from trainer_fixtures import arguments, launch, rows

# Steps to reach, processes (0: one plain process), settings.
CHAIN = (
    ("3", 4, {"ds_config": "ds_configs/zero2.json", "moa__ep_size": "2"}),
    ("6", 2, {"ds_config": "ds_configs/zero3.json"}),
    ("9", 0, {"ds_config": "ds_configs/zero2_offload.json"}),
    (
        "12",
        4,
        {
            "ds_config": "ds_configs/zero1.json",
            "moa__ep_size": "4",
            "moa__transport": "all_to_all",
        },
    ),
)


@pytest.mark.timeout(900)
def test_a_chain_of_topologies_equals_one_run(tmp_path: Path) -> None:
    chained, whole = tmp_path / "chained", tmp_path / "whole"
    for steps, processes, settings in CHAIN:
        result = launch(
            *arguments(chained, train__steps=steps, train__eval_every="50", **settings),
            processes=processes,
        )
        assert result.returncode == 0, result.stderr
    result = launch(*arguments(whole, train__steps="12", train__eval_every="50"))
    assert result.returncode == 0, result.stderr
    found, wanted = rows(chained / "metrics.jsonl"), rows(whole / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(12))
    assert [row["batch_digest"] for row in found] == [row["batch_digest"] for row in wanted]
    for name, relative, absolute in (
        ("loss", 1e-6, 0),
        ("grad_norm", 2e-6, 0),
        ("aux_loss", 0, 1e-8),  # a small difference of large counts
    ):
        values = [row[name] for row in found]
        expected = pytest.approx([row[name] for row in wanted], rel=relative, abs=absolute)
        assert values == expected, name


def test_expert_parallelism_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for settings, message in (
        ({"moa__ep_size": "2"}, "moa.ep_size: 2 does not divide the 1 processes; legal are 1"),
        (
            {"moa__ep_size": "2", "moa__method": "lora"},
            "moa.ep_size: 2 with lora; must be >= 1, and above 1 only",
        ),
    ):
        result = launch(*arguments(tmp_path / "run", **settings))
        assert result.returncode == 2
        assert message in result.stderr
        assert not (tmp_path / "run").exists()
    result = launch(
        *arguments(tmp_path / "run", moa__ep_size="2", ds_config="ds_configs/zero3.json"),
        processes=2,
    )
    assert "use --moa.ep_size 1, or --ds_config ds_configs/zero2.json" in result.stderr
    assert not (tmp_path / "run").exists()
