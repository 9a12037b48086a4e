"""What a run tells: console, curves, warnings, figures; read back as a user's tools would."""

import io
import math
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.textpath import TextPath
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.hparams.metadata import PLUGIN_NAME

from trainer.config.run_config import RunConfig
from trainer.evaluate.drawing import confusion_figure, png
from trainer.monitor.console import Standing, evaluation_line, plain_line
from trainer.monitor.curves import RESULTS, Curves
from trainer.monitor.efficiency import WINDOW, DataWait, hint, peak_flops
from trainer.monitor.heat_maps import expert_heat_maps, mutual_information, specialisation
from trainer.monitor.monitor import on_host
from trainer.monitor.router_health import PATIENCE, RouterHealth
from trainer.monitor.routing_maps import GAP, TILE, Shown, expert_colours, routing_figure

DOMAINS = {"plain": {"in": 0.934, "out": 0.901}, "a_much_longer_name": {"out": 0.5}}
ROW = {"step": 41, "loss": 1.25, "ce": 1.2, "aux_loss": 0.05, "grad_norm": 2.0, "lr": 1e-3}


def test_mutual_information_is_scikit_learns_in_bits() -> None:
    from sklearn.metrics import mutual_info_score

    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.integers(0, 30, (5, 4)).astype(float)
        counts[rng.integers(5)] = 0
        wanted = mutual_info_score(None, None, contingency=counts) / math.log(2)
        assert mutual_information(counts) == pytest.approx(wanted, abs=1e-12)
        assert (specialisation(counts) >= 0).all()
    assert mutual_information(np.eye(4)) == pytest.approx(2)
    assert mutual_information(np.outer([1.0, 2, 3], [4, 5])) == pytest.approx(0)
    assert mutual_information(np.zeros((3, 2))) == 0


def drawn(figure: Figure) -> npt.NDArray[np.uint8]:
    """The figure's own area, without the texts that widen it: uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def test_every_patch_has_its_experts_colour_beside_its_image() -> None:
    grids = {
        "blocks.0.attn.qkv": np.array([[[0, 1], [2, 1]], [[1, 1], [0, 2]]]),
        "head": np.array([[[2, 2], [0, 0]], [[0, 1], [1, 2]]]),
    }
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:, 4:] = (10, 200, 30)
    shown = [Shown(pixels, "sketch", "cat", held_out=True)] * 2
    picture = drawn(routing_figure(shown, grids, ["a", "b", "c"], "title"))
    colours = [tuple(np.round(255 * np.array(to_rgb(c))).astype(int)) for c in expert_colours(3)]
    assert len(set(colours)) == 3
    assert tuple(picture[9, TILE // 4]) == (0, 0, 0)
    assert tuple(picture[9, 3 * TILE // 4]) == (10, 200, 30)
    for column, grid in enumerate(grids.values(), start=1):
        for (image, row, place), expert in np.ndenumerate(grid):
            x = column * (TILE + GAP) + TILE // 4 + place * TILE // 2
            y = image * (TILE + GAP) + TILE // 4 + row * TILE // 2
            assert tuple(picture[y, x]) == colours[expert]
    assert len(set(expert_colours(24))) == 24


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_cells_have_the_shares_of_their_row_in_per_cent() -> None:
    counts = np.zeros((1, 3, 2))
    counts[0, :2] = [[30, 10], [0, 5]]
    figure = expert_heat_maps(counts, ["block 0"], ["a", "b", "unseen"], "Experts by class")
    (cells,) = figure.findobj(QuadMesh)
    assert np.asarray(cells.get_array()).tolist() == [[0.75, 0.25], [0, 1]]
    (numbers,) = figure.findobj(PathCollection)
    assert len(numbers.get_paths()) == 3, "a share of 0 goes without"
    assert {"Experts by class", "block 0", "a", "b", "e0", "e1"} <= set(texts(figure))
    assert "unseen" not in texts(figure)


NAMES = ["$a_1$ and $b$", "two\nlines", "Жук", "x" * 99]


def test_names_are_drawn_as_they_are_written_and_a_long_title_is_not_cut() -> None:
    confusion = np.arange(16).reshape(4, 4)
    pictures = [
        confusion_figure({title: confusion}, NAMES, "title")
        for title in ("short", "$sketch$ (held out): " + "long " * 40)
    ]
    short, long = (Image.open(io.BytesIO(png(picture))) for picture in pictures)
    assert long.width > short.width + 500
    for image in (short, long):
        edge = np.asarray(image.convert("L"))
        assert (edge[:, [0, -1]] == 255).all(), "nothing reaches the edge"
    assert not any(t.get_parse_math() for t in pictures[1].findobj(Text) if "$" in t.get_text())
    assert {"$a_1$ and $b$", "two\\nlines", "Жук", "x" * 23 + "…"} <= set(texts(pictures[1]))
    assert [len(p.findobj(PathCollection)[0].get_paths()) for p in pictures] == [15, 15]
    many = confusion_figure({"": np.eye(345, dtype=np.int64)}, ["class"] * 345, "title")
    assert not many.findobj(PathCollection), "no room for numbers"
    assert "class" not in texts(many)


def stats(load: list[float], entropy: float) -> dict[str, dict[str, list[float]]]:
    return {"blocks.0": {"load": load, "entropy": [entropy]}}


def test_a_router_is_warned_of_when_its_sign_lasts_and_once() -> None:
    health = RouterHealth("--moa.balance bias")
    good = stats([0.4, 0.3, 0.2, 0.1], 1.2)
    dead = stats([0.5, 0.3, 0.2, 0.0], 1.2)
    for _ in range(PATIENCE - 1):
        assert health.note(dead) == []
    assert health.note(good) == [], "a sign that went away starts anew"
    assert [health.note(dead) for _ in range(PATIENCE - 1)] == [[]] * (PATIENCE - 1)
    (warning,) = health.note(dead)
    assert "blocks.0: expert 3 gets no token" in warning
    assert "--moa.balance bias" in warning
    assert len(health.active) == 1
    assert health.note(dead) == [], "not again while it lasts"
    assert health.note(good) == []
    assert not health.active


@pytest.mark.parametrize(
    ("load", "entropy", "words"),
    [
        ([0.995, 0.002, 0.002, 0.001], 1.2, ["expert 0 gets 99.5 % of the tokens"]),
        ([0.4, 0.3, 0.2, 0.1], 0.001, ["entropy is 0.0010 of at most 1.386", "gate_noise"]),
        ([0.7, 0.1, 0.1, 0.1], 0.1, []),
        ([1.0], 0.0, []),
    ],
)
def test_concentration_and_saturation_are_told_from_a_lively_router(
    load: list[float], entropy: float, words: list[str]
) -> None:
    health = RouterHealth("--moa.balance bias")
    lines = [line for _ in range(PATIENCE) for line in health.note(stats(load, entropy))]
    assert len(lines) == bool(words)
    assert all(word in lines[0] for word in words)


def test_the_stall_hint_comes_when_waiting_dominates_and_again_only_after_recovery() -> None:
    wait = DataWait()
    assert wait.share == 0
    told = [wait.note(waited=80, took=100) for _ in range(WINDOW + 5)]
    assert told.index(True) == WINDOW - 1, "a few slow steps are no stall"
    assert sum(told) == 1
    assert wait.share == pytest.approx(0.8)
    assert not any(wait.note(waited=1, took=100) for _ in range(WINDOW))
    assert any(wait.note(waited=80, took=100) for _ in range(WINDOW))
    text = hint(0.8, RunConfig(), cores=6)
    assert "80 % of the step time" in text
    assert "--data.workers (now 0 per process, on 6 CPU cores)" in text


def test_letters_beyond_ascii_are_drawn() -> None:
    letters = [TextPath((0, 0), letter).vertices.tobytes() for letter in "éñüЖω"]
    assert len(set(letters)) == len(letters), "no box that stands for all of them"


def standing() -> Standing:
    return Standing(
        100, 0, ("a_much_longer_name",), done=42, row=ROW, img_s=512.0, wait_share=0.25,
        peak_gib=1.5, phase="training", accuracies=DOMAINS, evaluated=40,
    )  # fmt: skip


@pytest.mark.parametrize("width", [30, 60, 120])
def test_the_display_fits_any_width_and_keeps_every_number(width: int) -> None:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(standing())
    text = file.getvalue()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width
    for piece in ("42/100", "loss 1.2500", "512 img/s", "data wait 25 %", "1.50 GiB", "ETA"):
        assert piece in text
    assert re.search(r"plain +93\.4/ 90\.1", text)
    if width >= 60:
        assert "a_much_longer_name (held out)     -/ 50.0" in text


def test_plain_lines_give_up_their_numbers_to_grep() -> None:
    line = plain_line(standing())
    found = re.fullmatch(
        r"step 41/100 loss 1\.2500 ce 1\.2000 aux 0\.0500 grad_norm 2\.000 512 img/s wait 25 % "
        r"mem 1\.50 GiB ETA \d\d:\d\d",
        line,
    )
    assert found, line
    assert evaluation_line(40, DOMAINS) == (
        "eval step 40 (in/out) plain 0.934/0.901 a_much_longer_name -/0.500"
    )


def curves(folder: Path, first_step: int) -> Curves:
    return Curves(RunConfig(), folder, first_step, ["blocks.0.attn.qkv"])


def test_a_resume_purges_what_it_does_again(tmp_path: Path) -> None:
    for start, end, value in ((0, 10, 1.0), (5, 8, 2.0)):
        writer = curves(tmp_path, start)
        for step in range(start, end):
            writer.scalars({"train/loss": value, "train/ce": math.nan}, step)
            writer.picture("routing/maps", png(Figure(figsize=(1, 1))), step)
        writer.close(whole=end == 8)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(8))
    assert [e.value for e in events.Scalars("train/loss")] == [1.0] * 5 + [2.0] * 3
    images = events.Images("routing/maps")
    assert [e.step for e in images] == list(range(8))
    assert Image.open(io.BytesIO(images[0].encoded_image_string)).size == (
        images[0].width,
        images[0].height,
    )
    assert "train/ce" not in events.Tags()["scalars"], "what is not finite leaves a gap"
    config = events.Tensors("run/config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "```yaml" in config
    assert "aux_weight: 0.01" in config


def test_the_hparams_page_names_settings_and_results(tmp_path: Path) -> None:
    curves(tmp_path, 0).close(whole=True)
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(content)
        for tag, content in events.PluginTagToContent(PLUGIN_NAME).items()
    }
    experiment = found["_hparams_/experiment"].experiment
    assert [info.name.tag for info in experiment.metric_infos] == list(RESULTS)
    settings = found["_hparams_/session_start_info"].session_start_info.hparams
    assert settings["moa.method"].string_value == RunConfig().moa.method
    assert settings["optim.lr"].number_value == RunConfig().optim.lr
    assert found["_hparams_/session_end_info"].session_end_info.status == 1


def test_router_figures_come_from_the_device_as_they_were() -> None:
    given = {
        "a": {"load": torch.tensor([0.25, 0.75]), "entropy": torch.tensor(0.5)},
        "b": {"load": torch.tensor([1.0, 0.0])},
    }
    assert on_host(given) == {
        "a": {"load": [0.25, 0.75], "entropy": [0.5]},
        "b": {"load": [1.0, 0.0]},
    }


def test_peaks_are_found_by_whole_words() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA A10", "bf16") == 125e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_flops("NVIDIA RTX A4000", "bf16") is None
    assert peak_flops("", "bf16") is None
