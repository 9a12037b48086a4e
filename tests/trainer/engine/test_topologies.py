"""One run carried from one arrangement of processes to another, as its users would."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.trainer_fixtures import arguments, launch, rows
from trainer.train.session import main

# Steps to reach, processes (0: one plain process), settings. Where a forward is a collective, the
# evaluation batches are such that ranks have a batch more or less of some split.
CHAIN = (
    ("3", 4, {"ds_config": "ds_configs/zero2.json", "moa__ep_size": "2"}),
    ("6", 2, {"ds_config": "ds_configs/zero3.json", "train__eval_batch": "15"}),
    ("9", 0, {"ds_config": "ds_configs/zero2_offload.json"}),
    (
        "12",
        4,
        {
            "ds_config": "ds_configs/zero1.json",
            "moa__ep_size": "4",
            "moa__transport": "all_to_all",
            "train__eval_batch": "14",
        },
    ),
)


@pytest.mark.timeout(900)
def test_a_chain_of_topologies_equals_one_run(few: dict[str, str], tmp_path: Path) -> None:
    chained, whole = tmp_path / "chained", tmp_path / "whole"
    for steps, processes, settings in CHAIN:
        result = launch(
            *arguments(chained, train__steps=steps, train__eval_every="50", **few, **settings),
            processes=processes,
        )
        assert result.returncode == 0, result.stderr
    result = launch(*arguments(whole, train__steps="12", train__eval_every="50", **few))
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
    bits, expected_bits = routing_bits(chained), routing_bits(whole)
    assert len(bits) == 6
    for tag, by_step in bits.items():  # whatever ranks share out, they count the same tokens
        assert list(by_step) == [0, 2, 5, 8, 11]
        assert by_step[11] == pytest.approx(expected_bits[tag][11], rel=1e-2)
        assert by_step[11] > 0
    assert (chained / "routing.png").stat().st_size > 0


def routing_bits(folder: Path) -> dict[str, dict[int, float]]:
    """What the experts tell of domain and class, by TensorBoard tag and step."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "/bits_" in tag]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


@pytest.mark.parametrize(
    ("world", "settings", "message"),
    [
        (1, {"moa__ep_size": "2"}, "moa.ep_size: 2 does not divide the 1 processes; legal are 1"),
        (
            1,
            {"moa__ep_size": "2", "moa__method": "lora"},
            "moa.ep_size: 2 with lora; must be >= 1, and above 1 only",
        ),
        (
            2,
            {"moa__ep_size": "2", "ds_config": "ds_configs/zero3.json"},
            "use --moa.ep_size 1, or --ds_config ds_configs/zero2.json",
        ),
        (
            1,
            {"moa__diversity": "0.1", "ds_config": "ds_configs/zero3.json"},
            "moa.diversity: 0.1 with ZeRO-3, which holds no expert whole",
        ),
    ],
)
def test_expert_parallelism_that_cannot_be_is_refused(
    world: int, settings: dict[str, str], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Before the processes of the world meet."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert main(arguments(tmp_path / "run", **settings)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
