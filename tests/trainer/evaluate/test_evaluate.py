"""Evaluation of one adapter and of several together: figures, splits, memory, refusals."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moa
from moa.files.card import creation
from moa.files.reading import read_adapter
from moa.files.saving import WEIGHTS_FILE, write_adapter
from shards import DataConfig, eval_transform, evaluation_loader, open_shards
from shards.datasets import dataset_spec
from shards.embedded.digits import embedded_shards
from shards.stream.evaluation import split_places
from shards.write.conversion import write_shards
from shards.write.set_name import name_set
from tests.support import warm
from tests.support.shards_fixtures import few_digits
from tests.support.trainer_fixtures import environment
from trainer.checkpoint import checkpoint
from trainer.config.command_line import parse
from trainer.config.model import ModelConfig
from trainer.evaluate import plots
from trainer.evaluate.__main__ import main, parser
from trainer.evaluate.combine import models_on
from trainer.evaluate.drawing import png
from trainer.evaluate.evaluator import Evaluator
from trainer.evaluate.job import prepare
from trainer.evaluate.members import labels, read_members
from trainer.evaluate.output import domain_title
from trainer.evaluate.predictions import collect
from trainer.plan.data import Request, known_data
from trainer.prepare.backbone import create_backbone
from trainer.prepare.parts import build
from trainer.process.errors import ConfigError
from trainer.process.world import World

pytestmark = pytest.mark.usefixtures("few_embedded")
METHODS = ("moa_kron", "moa_kron", "lora", "bias", "full")


def make(folder: Path, seed: int, *flags: str) -> Path:
    """An adapter as a run would write it, with what trains far from where it starts."""
    parts = build(parse([f"--train.seed={seed}", *flags]), World(0, 1, 0, 1))
    torch.manual_seed(seed)
    tensors = moa.adapter_state_dict(parts.model)
    trained = dict(parts.model.named_parameters())
    moved = {
        n: t + 0.05 * torch.randn(t.shape).to(t.dtype) if n in trained else t
        for n, t in tensors.items()
    }
    moa.save_adapter(parts.model, folder, parts.info, moved)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five adapters of different methods and seeds, all with `rotated` held out, trial seed 3."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        make(root / f"a{seed}", seed, f"--moa.method={method}", "--train.trial_seed=3")
        for seed, method in enumerate(METHODS)
    ]


def rows(capsys: pytest.CaptureFixture[str], *command: object) -> list[dict[str, Any]]:
    """The JSON lines that a command prints."""
    assert main([*map(str, command), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def expected(
    folders: list[Path], domain: int, average: str, trial_seed: int = 3
) -> tuple[Tensor, Tensor]:
    """Mean scores on the domain's `out` split and labels: each adapter in a backbone of its own."""
    total: list[Tensor] = []
    for folder in folders:
        backbone = create_backbone(ModelConfig(), 10, seed=9)
        moa.load_adapter(backbone.model, folder)
        batches = list(
            evaluation_loader(
                open_shards(DataConfig()), domain, "out", trial_seed=trial_seed,
                holdout_fraction=0.2, transform=eval_transform(backbone.data_config),
            )
        )  # fmt: skip
        with torch.no_grad():
            scores = backbone.model.eval()(torch.cat([b.images for b in batches])).double()
        total.append(scores.softmax(1) if average == "probabilities" else scores)
    mean = torch.stack(total).mean(0)
    mean = mean if average == "probabilities" else mean.softmax(1)
    return mean, torch.cat([b.labels for b in batches])


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_ensemble_is_the_mean_of_five_separate_evaluations(
    adapters: list[Path], average: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(
        capsys, "--adapter", *adapters, "--domains", "rotated", "--split", "out",
        "--average", average,
    )  # fmt: skip
    assert [row["moa/result"] for row in found] == ["a0", "a1", "a2", "a3", "a4", "ensemble"]
    for row, folders in zip(found, [*([a] for a in adapters), adapters], strict=True):
        probabilities, truth = expected(folders, 5, average)
        right = (probabilities.argmax(1) == truth).double().mean()
        nll = -probabilities[torch.arange(len(truth)), truth].log().mean()
        assert row["env5_out_acc"] == pytest.approx(float(right))
        assert row["moa/env5_out_nll"] == pytest.approx(float(nll), rel=1e-4)
        assert row["moa/env5_out_samples"] == 10
    assert len({row["moa/env5_out_nll"] for row in found}) == 6


def test_two_processes_count_as_one_does(
    adapters: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--adapter", *map(str, adapters[:2]), "--domains", "rotated", "plain"]
    one = rows(capsys, *command)
    more = ("--json", "--batch", "7")
    launched = warm.run("-m", "trainer.evaluate", *command, *more, processes=2, env=environment())
    assert launched.returncode == 0, launched.stderr
    two = [json.loads(line) for line in launched.stdout.splitlines() if line.startswith("{")]
    assert len(two) == len(one) == 3
    for row, other in zip(one, two, strict=True):
        assert row.keys() == other.keys()
        assert row["moa/result"] == other["moa/result"]
        for name in row.keys() - {"moa/result"}:
            assert other[name] == pytest.approx(row[name], rel=1e-4), name
    assert one[0]["moa/env5_in_samples"] + one[0]["moa/env5_out_samples"] == 50


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made in the block held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                self.live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {k: (ref, n) for k, (ref, n) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.live.values()))
        return result


def evaluated_bytes(folders: list[Path]) -> int:
    """Peak of making the models of some adapters and running each on one batch of 128."""
    with PeakBytes() as measured:
        backbone = create_backbone(ModelConfig(), 10, seed=0).model
        models = models_on(backbone, read_members(list(map(str, folders)))).eval()
        images = torch.randn(128, 3, 32, 32)
        with torch.inference_mode():
            for model in models:
                model(images)
    return measured.peak


def test_five_adapters_need_little_more_memory_than_one(tmp_path: Path) -> None:
    folders = [make(tmp_path / f"a{seed}", seed) for seed in range(5)]
    one, five = evaluated_bytes(folders[:1]), evaluated_bytes(folders)
    assert one > 4.5 * 2**20  # the backbone is in the measurement
    assert five < 1.2 * one


def test_adapters_leave_the_backbone_and_each_other_alone(adapters: list[Path]) -> None:
    backbone = create_backbone(ModelConfig(), 10, seed=0)
    models = models_on(backbone.model, read_members(list(map(str, adapters))))
    assert moa.base_hash(backbone.model) == backbone.sha256
    for model, folder in zip(models, adapters, strict=True):
        _, tensors = read_adapter(folder)
        held = moa.adapter_state_dict(model)
        assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())
    shared = models[0].get_parameter("blocks.0.mlp.fc1.weight")
    assert shared is backbone.model.get_parameter("blocks.0.mlp.fc1.weight")


def test_soup_is_the_fp32_mean_and_can_be_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [make(tmp_path / f"a{seed}", seed, "--moa.method=moa_lora") for seed in range(3)]
    command = ["--adapter", *folders, "--domains", "plain", "--combine", "soup"]
    assert main([*map(str, command), "--json", "--save", str(tmp_path / "soup")]) == 0
    printed = capsys.readouterr()
    (row,) = [json.loads(line) for line in printed.out.splitlines()]
    assert "different seeds (0, 1, 2)" in printed.err
    info, mean = read_adapter(tmp_path / "soup")
    given = [read_adapter(folder)[1] for folder in folders]
    for name, tensor in mean.items():
        total = torch.stack([tensors[name] for tensors in given]).double().sum(0)
        assert torch.equal(tensor, (total / 3).float()), name
    assert mean.keys() == given[0].keys()
    assert info.origin is not None
    assert info.origin.averaged == ("a0", "a1", "a2")
    assert info.results == {k: v for k, v in row.items() if k.endswith("_acc")}
    assert "`a0`, `a1`, `a2`" in (tmp_path / "soup" / "README.md").read_text()
    (again,) = rows(capsys, "--adapter", tmp_path / "soup", "--domains", "plain")
    assert {**again, "moa/result": "soup"} == row


def test_soup_of_other_shapes_is_refused_with_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make(tmp_path / "one", 0, "--moa.ranks=[1,2]")
    two = make(tmp_path / "two", 0, "--moa.ranks=[1,4]", "--moa.router=linear")
    assert main(["--adapter", str(one), str(two), "--combine", "soup"]) == 2
    message = capsys.readouterr().err
    assert "moa.ranks: (1, 4) and (1, 2)" in message
    assert "moa.router: 'linear' and 'cosine'" in message
    assert "--combine ensemble" in message


def test_split_is_the_adapters_own(
    adapters: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--adapter", str(adapters[0]), "--domains", "plain", "--split", "out"]
    (own,) = rows(capsys, *command)
    probabilities, truth = expected(adapters[:1], 0, "probabilities", trial_seed=3)
    nll = -probabilities[torch.arange(len(truth)), truth].log().mean()
    assert own["moa/env0_out_nll"] == pytest.approx(float(nll), rel=1e-4)
    assert main([*command, "--json", "--train.trial_seed", "0"]) == 0
    printed = capsys.readouterr()
    assert "another split (trial seed 3, 0.2 held back)" in printed.err
    assert json.loads(printed.out)["moa/env0_out_nll"] != own["moa/env0_out_nll"]


def test_a_split_of_groups_is_the_adapters_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, pattern = few_digits(tmp_path, per_class=5), r"([0-9])\.png"
    spec = dataset_spec("digits")
    grouped = write_shards(tmp_path / "images", tmp_path / "grouped", spec, group_by=pattern)
    adapter = make(tmp_path / "adapter", 0, f"--data.root={grouped.root}", "--moa.method=lora")
    assert f"by groups that `{pattern}` names and holds 0.2" in (adapter / "README.md").read_text()
    command = ["--adapter", str(adapter), "--domains", "plain", "--split", "out", "--json"]
    counts = []
    for index in (grouped, plain):
        assert main([*command, "--data.root", str(index.root)]) == 0
        printed = capsys.readouterr()
        counts.append(json.loads(printed.out)["moa/env0_out_samples"])
        other = f"a split of other groups (groups of {pattern!r}; here none): its training images"
        assert (other in printed.err) == (index is plain), printed.err
    held_back = split_places(grouped, 0, "out", trial_seed=0, holdout_fraction=0.2)
    assert counts == [len(held_back), 10]
    kept = known_data(parse([f"--data.root={grouped.root}"]), Request())[3]
    assert kept["plain"] == 50 - len(held_back)


def test_a_list_is_not_taken_for_another_split(
    adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever of training and evaluation has it: the `out` images stay unseen."""
    index, list_file = open_shards(DataConfig()), tmp_path / "some.txt"
    list_file.write_text(
        "".join(f"{index.key(0, rank)}\n" for rank in range(0, index.num_samples(0), 3))
    )
    flag = f"--data.exclude_list={list_file}"
    listed = make(tmp_path / "listed", 0, flag, "--train.trial_seed=3")
    for command in ([adapters[0], flag], [listed], [listed, flag, "--train.trial_seed=4"]):
        assert main(["--adapter", *map(str, command), "--domains", "plain", "--json"]) == 0
        errors = capsys.readouterr().err
        leaks = "--train.trial_seed=4" in command
        assert ("training images are in both" in errors) == leaks
        assert ("was trained with other lists (data.exclude_list" in errors) != leaks
        assert ("those of `out` are still unseen" in errors) != leaks
    for command in ([listed, flag], [adapters[0], "--data.holdout_fraction=0.2001"]):
        assert main(["--adapter", *map(str, command), "--domains", "plain", "--json"]) == 0
        assert not capsys.readouterr().err, "the very images of the training"


@pytest.mark.parametrize(
    ("before", "told"),
    [
        ((), "; it was not trained on plain"),
        (("simple",), "; it was not trained on plain; simple is missing: if that is only another"),
    ],
)
def test_a_domain_that_came_after_training_is_no_source(
    before: tuple[str, ...], told: str, adapters: list[Path], tmp_path: Path
) -> None:
    info, tensors = read_adapter(adapters[0])
    assert info.origin is not None
    domains = (*before, *(name for name in info.origin.domains if name != "plain"))
    origin = replace(info.origin, domains=domains, data_hash="0" * 16)
    (tmp_path / "old").mkdir()
    write_adapter(tmp_path / "old", tensors, replace(info, origin=origin))
    for others in ([], adapters[1:2]):
        found = prepare(parser().parse_args(["--adapter", *map(str, [tmp_path / "old", *others])]))
        mark = f"not trained on by {found.members[0].label}" if others else "not trained on"
        titles = [domain_title(found, env) for env in found.data.envs]
        assert [title for title in titles if "(" in title] == [
            f"plain ({mark})",
            "rotated (held out)",
        ]
        assert told in found.warnings[0]
        assert found.shown_splits(0) == (("out",) if others else ("in", "out"))


def test_output_folder_tells_everything(
    adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--adapter", *map(str, adapters[:2]), "--domains", "rotated", "plain"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert "rotated (held out)" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["trial_seed"] == 3
    assert [a["origin"]["held_out"] for a in found["adapters"]] == ["rotated"] * 2
    assert found["results"].keys() == {"a0", "a1", "ensemble"}
    for by_domain in found["results"].values():
        assert by_domain.keys() == {"rotated", "plain"}
        for cell in (by_domain["rotated"]["in"], by_domain["plain"]["out"]):
            confusion, shares = cell["confusion"], list(cell["class_accuracy"].values())
            assert sum(map(sum, confusion)) == cell["samples"]
            assert sum(confusion[i][i] for i in range(10)) == cell["correct"]
            right = [row[i] / sum(row) if sum(row) else None for i, row in enumerate(confusion)]
            assert shares == pytest.approx(right)
            assert sum(cell["reliability"]["samples"]) == cell["samples"]
    for name in ("accuracy.png", "confusion.png", "reliability.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    assert "\n| ensemble " in (tmp_path / "out" / "tables.md").read_text()


def test_a_set_is_called_by_its_own_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "png", lambda figure: [figures.append(figure), png(figure)][1])
    root = shutil.copytree(embedded_shards(), tmp_path / "set")
    name_set(root, "my-digits")
    folder = make(tmp_path / "adapter", 0, f"--data.root={root}", "--moa.method=bias")
    card = (folder / "README.md").read_text()
    assert "\nDataset `my-digits` (data hash" in card
    assert "\ndatasets:\n- my-digits\n" in card
    flags = ["--adapter", str(folder), "--domains", "plain", "--split", "out"]
    assert main([*flags, "--data.root", str(root), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("my-digits: ")
    drawn = [t.get_text() for figure in figures for t in figure.findobj(Text)]
    assert sum(text.startswith("my-digits: ") for text in drawn) == 3
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (told["dataset"], told["dataset_name"]) == ("digits", "my-digits")
    assert "**my-digits: " in (tmp_path / "out" / "tables.md").read_text()


@pytest.mark.parametrize(
    ("split", "domains", "title"),
    [
        ("both", [], "unseen images: all of held-out domains, `out` of the others"),
        ("out", [], "unseen images: the `out` split"),
        ("in", [], "the `in` split, with images of the training"),
        ("all", [], "the `all` split, with images of the training"),
        ("in", ["--domains", "rotated"], "unseen images: the `in` split"),
    ],
)
def test_pictures_say_which_images_they_show(
    split: str, domains: list[str], title: str, adapters: list[Path]
) -> None:
    command = ["--adapter", str(adapters[0]), "--split", split, *domains]
    found = prepare(parser().parse_args(command))
    assert found.shown_images() == title
    sources = {
        found.shown_splits(env)
        for env in found.data.envs
        if found.data.index.domains[env] != "rotated"
    }
    assert sources <= {("out",) if split == "both" else (split,)}


def test_the_mean_ece_is_over_the_domains_that_have_samples(
    adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, list_file = open_shards(DataConfig()), tmp_path / "some.txt"
    list_file.write_text(
        "".join(f"{index.key(0, rank)}\n" for rank in range(0, index.num_samples(0), 3))
    )
    found = rows(
        capsys, "--adapter", *adapters[:2], "--domains", "plain", "rotated", "--data.exclude_list",
        list_file, "--output", tmp_path / "out",
    )  # fmt: skip
    text = re.sub(" +", " ", (tmp_path / "out" / "tables.md").read_text())
    table = text.partition("**accuracy %, left out split**")[2]
    lines = [line for line in table.splitlines() if line.startswith("| a0 |")]
    ece, accuracy = (100 * found[0][f"moa/env0_left_out_{name}"] for name in ("ece", "acc"))
    assert found[0]["moa/env5_left_out_samples"] == 0
    assert lines[0] == f"| a0 | {accuracy:.1f} | - | {ece:.1f} |"


def other_info(folder: Path, into: Path, **changes: Any) -> Path:
    info, tensors = read_adapter(folder)
    moa.save_adapter(nn.Module(), into, replace(info, **changes), tensors)
    return into


def averaged(folder: Path, into: Path) -> Path:
    origin = read_adapter(folder)[0].origin
    assert origin is not None
    return other_info(folder, into, origin=replace(origin, averaged=("a", "b")))


def damaged(folder: Path, into: Path) -> Path:
    shutil.copytree(folder, into)
    weights = into / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-50])
    return into


def bad_checkpoint(folder: Path, into: Path) -> Path:
    info, tensors = read_adapter(folder)
    found = checkpoint.save(into, info, tensors, {}, {"step": 1}, keep=1)
    (found / "state.json").write_text("{}")
    return found


CLASSES = tuple("0123456798")
REFUSALS: dict[str, tuple[Any, int, str]] = {
    "missing": (lambda a, t: [a, t / "nowhere"], 2, "no such folder"),
    "empty": (lambda a, t: [t], 2, "no adapter_config.json"),
    "run folder": (lambda a, t: [shutil.copytree(a, t / "adapter").parent], 2, "best adapter is"),
    "twice": (lambda a, t: [a, a], 2, "given twice"),
    "base": (lambda a, t: [a, other_info(a, t / "b", base_sha256="ff")], 2, "different bases"),
    "weights": (lambda a, t: [other_info(a, t / "b", base_sha256="ff")], 2, "--model.weights"),
    "classes": (lambda a, t: [a, other_info(a, t / "b", classes=CLASSES)], 2, "class 8, not '8'"),
    "data": (lambda a, t: [other_info(a, t / "b", classes=CLASSES)], 2, "'9' as class 8"),
    "domain": (lambda a, t: [a, "--domains", "rotatd"], 2, "did you mean 'rotated'"),
    "alone": (lambda a, t: [a, "--combine", "ensemble"], 2, "two adapters"),
    "save": (lambda a, t: [a, "--save", t / "soup"], 2, "--combine soup"),
    "alpha": (lambda a, t: [a, "--alpha", "0,1.5"], 2, "'1.5' is no number from 0"),
    "no number": (lambda a, t: [a, "--alpha", "half"], 2, "'half' is no number from 0"),
    "nan": (lambda a, t: [a, "--alpha", "nan"], 2, "'nan' is no number from 0"),
    "alpha twice": (lambda a, t: [a, "--alpha", "0.5,0,.50"], 2, "0.5 is given twice"),
    "alphas of two": (lambda a, t: [a, a.parent / "a1", "--alpha", "0"], 2, "one adapter, not 2"),
    "alpha soup": (lambda a, t: [a, "--alpha=0", "--combine=soup"], 2, "leave --combine soup out"),
    "no out": (lambda a, t: [a, "--alpha=0", "--split=in"], 2, "use both or out"),
    "no source": (
        lambda a, t: [a, "--alpha=0", "--domains=rotated"], 2, "no validation to choose by; give",
    ),
    "no origin": (
        lambda a, t: [other_info(a, t / "b", origin=None), "--alpha=0"], 2, "trained on none of",
    ),
    "mean": (
        lambda a, t: [averaged(a, t / "b"), "--alpha=0"], 2, "is the mean of several, so the seed",
    ),
    "text model": (lambda a, t: [a, "--model.text_model=x"], 2, "only with --alpha"),
    "fraction": (lambda a, t: [a, "--data.holdout_fraction", "1"], 2, r"\[0, 1\)"),
    "hub name": (lambda a, t: ["hf-hub:a/b/c"], 2, "organisation/name"),
    "damaged": (lambda a, t: [a, damaged(a, t / "b")], 65, "damaged adapter"),
    "checkpoint": (lambda a, t: [bad_checkpoint(a, t / "b")], 65, "state.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_in_words(
    case: str, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code, message = REFUSALS[case]
    assert main(["--adapter", *map(str, arguments(adapters[0], tmp_path))]) == code
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert printed.startswith("error: ")


def test_random_base_is_drawn_again(
    adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the run's seed, without a word; and by the card."""
    folder = make(tmp_path / "random", 7, "--model.weights=random")
    for flags in ([], ["--model.weights", "random"]):
        assert len(rows(capsys, "--adapter", folder, "--domains", "plain", *flags)) == 1
    assert main(["--adapter", str(folder), "--model.weights", "pretrained"]) == 2
    assert "drawn at random: leave --model.weights out" in capsys.readouterr().err
    info = read_adapter(folder)[0]
    card, made = (folder / "README.md").read_text(), "\n".join(creation(info))
    assert "torch.manual_seed(7)" in made
    assert made in card
    names: dict[str, Any] = {"timm": timm}
    exec(made, names)
    moa.load_adapter(names["model"], folder)
    assert info.origin is not None
    other = other_info(folder, tmp_path / "other", origin=replace(info.origin, seed=8))
    assert main(["--adapter", str(other)]) == 2
    assert "other versions of torch or timm draw others" in capsys.readouterr().err


def test_base_from_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = create_backbone(ModelConfig(weights="random"), 10, seed=5).model
    file = tmp_path / "base.safetensors"
    save_file(base.state_dict(), file)
    folder = make(tmp_path / "filed", 0, f"--model.weights={file}")
    assert len(rows(capsys, "--adapter", folder, "--domains", "plain")) == 1
    assert main(["--adapter", str(folder), "--model.weights", "pretrained"]) == 2
    assert f"give the file it was trained on ({file})" in capsys.readouterr().err
    names: dict[str, Any] = {"timm": timm}
    exec("\n".join(creation(read_adapter(folder)[0])), names)
    moa.load_adapter(names["model"], folder)
    fresh = create_backbone(ModelConfig(), 10, seed=0).model
    with pytest.raises(moa.AdapterError, match=r"pretrained_cfg_overlay=\{.file.: .*base.safet"):
        moa.load_adapter(fresh, folder)
    file.rename(tmp_path / "elsewhere.safetensors")
    assert main(["--adapter", str(folder)]) == 2
    assert f"was trained on {file}, which is not here; give" in capsys.readouterr().err
    given = ("--model.weights", tmp_path / "elsewhere.safetensors")
    assert len(rows(capsys, "--adapter", folder, "--domains", "plain", *given)) == 1


def test_images_are_decoded_as_in_training(
    adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    used: list[tuple[str, str]] = []

    def noting(evaluator: Evaluator, *rest: Any) -> Any:
        used.append((evaluator.decoder.decode, evaluator.decoder.truncated))
        return collect(evaluator, *rest)

    monkeypatch.setattr("trainer.evaluate.job.collect", noting)
    strict = make(tmp_path / "strict", 0, "--data.decode=pil", "--data.truncated=substitute")
    command = ["--adapter", str(strict), "--domains", "plain", "--split", "out"]
    for flags in ([], ["--data.decode", "auto"]):
        assert main([*command, *flags]) == 0
    assert used == [("pil", "substitute"), ("auto", "substitute")]
    assert "strict was trained with data.decode pil" in capsys.readouterr().err
    assert main(["--adapter", str(adapters[0]), "--domains", "plain"]) == 0
    assert used[-1] == ("auto", "keep")
    assert not capsys.readouterr().err


@pytest.fixture
def checkpoint_folder(adapters: list[Path], tmp_path: Path) -> Path:
    info, tensors = read_adapter(adapters[0])
    return checkpoint.save(tmp_path, info, tensors, {}, {"step": 1}, keep=1)


def test_checkpoint_is_evaluated_like_its_adapter(
    adapters: list[Path], checkpoint_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--domains", "plain", "--split", "all")
    (one,) = rows(capsys, "--adapter", adapters[0], *flags)
    (two,) = rows(capsys, "--adapter", checkpoint_folder, *flags)
    assert {**two, "moa/result": one["moa/result"]} == one
    assert one["moa/env0_all_samples"] == 50


@pytest.mark.parametrize(
    ("sources", "short"),
    [
        (["out/run/adapter/"], ["run/adapter"]),
        (["out/a/adapter", "out/b/adapter"], ["a", "b"]),
        (["out/a/adapter", "out/a/adapter-last"], ["adapter", "adapter-last"]),
        (["hf-hub:x/a", "hf-hub:x/b@v1"], ["a", "b@v1"]),
        (["a", "b/a"], ["a", "b/a"]),
        (["out/soup"], ["out/soup"]),
        (["out/soup", "out/a"], ["out/soup", "out/a"]),
        (["out/ensemble/adapter", "out/a/adapter"], ["out/ensemble/adapter", "out/a/adapter"]),
        (["./soup", "a"], ["./soup", "a"]),
    ],
)
def test_labels_are_short_and_different(sources: list[str], short: list[str]) -> None:
    assert labels(sources) == short


@pytest.mark.parametrize("name", ["soup", "ensemble"])
def test_an_adapter_is_not_taken_for_what_is_made_of_several(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--adapter {name}: .* write \./{name}"):
        labels(["a", name])


def test_a_member_named_soup_keeps_its_figures(
    adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, folder in zip(("soup", "ensemble", "b"), adapters, strict=False):
        shutil.copytree(folder, tmp_path / name)
    flags = ("--domains", "plain", "plain", "--split", "out", "--adapter")
    own = rows(capsys, *flags, *adapters[:3])
    found = rows(capsys, *flags, *(tmp_path / name for name in ("soup", "ensemble", "b")))
    names = [str(tmp_path / "soup"), str(tmp_path / "ensemble"), str(tmp_path / "b"), "ensemble"]
    assert [row.pop("moa/result") for row in found] == names
    assert found == [{k: v for k, v in row.items() if k != "moa/result"} for row in own]


def test_one_adapter_written_in_several_ways_is_given_twice(
    adapters: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(adapters[0].parent)
    assert main(["--adapter", "a0", "a1", "./a0", "a0/"]) == 2
    assert "a0 and ./a0 and a0/: one adapter, given twice" in capsys.readouterr().err


def test_a_domain_named_twice_is_evaluated_once(
    adapters: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--adapter", str(adapters[0]), "--domains", "plain", "plain", "--split", "all"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if "plain" in line]) == 1
    assert "50 images," in printed
