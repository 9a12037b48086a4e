"""Every shipped recipe: parsed, planned at the size its template asks for, and tried on small data.

The trial builds the run as the recipe says, on a set of its dataset's domains and classes, with the
embedded backbone for the large one, and takes a step's forward and backward.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

import moa
from shards import finish_images
from shards.datasets import DATASETS
from shards.writer import write_shards
from tests.support.shards_fixtures import make_folder
from tests.support.trainer_fixtures import ROOT
from trainer.config.command_line import RECIPES, parse
from trainer.config.model import ModelConfig
from trainer.plan.__main__ import read_command_line
from trainer.plan.planning import make_plan
from trainer.prepare.parts import build
from trainer.process.world import World

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
SIZES = {"domainnet_vitl": 8, "domainnet_vitl_frontier": 8, "domainnet_vitg": 16}
"""Processes of the template that uses a recipe; the others are for 4."""
PAPER = {"domainnet": (15001, 1000)}
"""Steps of the paper's code, and how many lie between two evaluations; elsewhere 5001 and 200."""


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_planned_as_its_comments_say(name: str) -> None:
    processes = SIZES.get(name, 4)
    arguments = [f"--recipe={name}", f"--world_size={processes}", "--gpu_memory=24"]
    config, request = read_command_line(arguments)
    plan = make_plan(config, request)
    assert plan.batches.per_process * processes == plan.batches.global_batch
    assert not plan.warnings, "fits on a GPU of 24 GiB"
    spec, text = DATASETS[config.data.dataset], (RECIPES / f"{name}.yaml").read_text()
    if name != "embedded":
        schedule = PAPER.get(spec.name, (5001, 200))
        assert (config.train.steps, config.train.eval_every) == schedule
        assert config.train.batch_per_domain == 32
    if said := re.search(r"(\d+\.\d) GiB a GPU as planned", text):
        assert f"{plan.gpu_bytes / 2**30:.1f}" == said[1]
    said = re.search(r"plan predicts (\d+\.\d+) ms a step", text)
    assert said or spec.name != "domainnet"
    if said:
        (step,) = (p for p in plan.predictions if p.world == processes)
        assert f"{1000 * step.seconds:.1f}" == said[1]
        assert ("host-bound" in text) == (step.bound == "host")
        assert f"{plan.batches.steps * step.seconds / 60:.0f} minutes for all steps" in text
    if said := re.search(r"every: \d+ +# (\d+) MB", text):
        assert round(plan.checkpoint_bytes / 1e6) == int(said[1])


@pytest.mark.parametrize("name", NAMES)
def test_every_line_of_a_recipe_says_why(name: str) -> None:
    for line in (RECIPES / f"{name}.yaml").read_text().splitlines():
        key = line.strip().partition(":")[0]
        sections = (
            "data", "model", "moa", "objective", "average", "optim", "train", "checkpoint", "eval",
        )  # fmt: skip
        explains_itself = (*sections, "dataset", "backbone", "ranks", "name", "weight_decay")
        if name != "embedded" and key not in ("", *explains_itself):
            assert "#" in line, line


def test_templates_use_recipes_of_their_own_name() -> None:
    for template in ROOT.glob("slurm/domainnet_*.sh"):
        text = template.read_text()
        assert f"complete {template.stem} " in text
        assert f"--job-name={template.stem}\n" in text
        tasks = [int(n) for n in re.findall(r"--(?:nodes|ntasks-per-node)=(\d+)", text)]
        assert tasks[0] * tasks[1] == SIZES.get(template.stem, 4)
        assert template.stem in NAMES


def test_all_datasets_have_a_recipe() -> None:
    content = [yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in NAMES]
    assert {c["data"]["dataset"] for c in content} == set(DATASETS) - {"folder"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small shard set of each dataset that a recipe names, with all its domains and classes."""
    root = tmp_path_factory.mktemp("sets")
    for name, spec in DATASETS.items():
        if spec.domains is not None and name != "digits":
            classes = tuple(f"class {number:03d}" for number in range(spec.num_classes or 0))
            make_folder(root / "images" / name, spec.domains, classes, per_class=1)
            write_shards(root / "images" / name, root / name, spec)
    return root


@pytest.mark.parametrize("name", [name for name in NAMES if name != "embedded"])
def test_recipe_takes_a_step(name: str, sets: Path) -> None:
    dataset = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["data"]["dataset"]
    config = parse([f"--recipe={name}", f"--data.root={sets / dataset}", "--data.workers=0"])
    config = replace(config, model=ModelConfig(backbone="vit_embedded.glyphs"))
    world = World(0, 1, 0, 1)
    parts = build(config, world)
    assert parts.withheld_names[0] == (DATASETS[dataset].domains or ())[-1]
    batch = next(iter(parts.stream.loader(0, 1, world.rank, world.size)))
    images = finish_images(batch, torch.device("cpu"), parts.info.data_config)
    model = parts.model.train()
    loss = F.cross_entropy(model(images), batch.labels) + moa.aux_loss(model)
    loss.backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}
    assert torch.isfinite(loss)
    assert parts.ds_json["train_batch_size"] == 32 * (len(parts.index.domains) - 1)
