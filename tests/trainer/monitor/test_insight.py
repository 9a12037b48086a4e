"""What an evaluation shows, against one image at a time; on one rank and on two."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import moa
import trainer.prepare.vit_embedded  # noqa: F401  (registers the embedded backbone)
from moa.layers.layer import moa_layers
from shards import DataConfig, Decoder, ShardIndex, eval_transform, evaluation_loader, open_shards
from tests.support.moa_fixtures import stir
from trainer.config.run_config import RunConfig
from trainer.evaluate.evaluator import Evaluator
from trainer.evaluate.fixed_images import fixed_images
from trainer.monitor.curves import Curves
from trainer.monitor.insight import MAPPED, Insight, Seen
from trainer.monitor.pages import Pages
from trainer.process.stopping import EvaluationBrokenOff
from trainer.process.world import World

pytestmark = pytest.mark.usefixtures("few_embedded")
HELD_OUT, LAST = 5, 8
RANKS = (1, 2, 4)


def vit(**settings: object) -> tuple[nn.Module, dict[str, object]]:
    torch.manual_seed(0)
    model = timm.create_model("vit_embedded.glyphs", pretrained=False, num_classes=10)
    moa.inject(model, moa.MoAConfig(**settings))  # type: ignore[arg-type]
    stir(model, scale=0.1)
    return model, timm.data.resolve_model_data_config(model)


@pytest.fixture(scope="module")
def index() -> ShardIndex:
    return open_shards(DataConfig())


def evaluator(index: ShardIndex, config: dict[str, object], world: World) -> Evaluator:
    return Evaluator(
        index=index, data_config=config, trial_seed=0, holdout_fraction=0.2, batch_size=50,
        workers=0, world=world, device=torch.device("cpu"), dtype=torch.float32,
        sum_over_ranks=lambda x: x,
    )  # fmt: skip


def evaluated(insight: Insight, step: int) -> Seen:
    with insight.watching(insight.model, step) as seen:
        seen.evaluator(insight.model)
    return seen


def test_counts_maps_and_features_are_those_of_single_images(index: ShardIndex) -> None:
    from sklearn.metrics import confusion_matrix

    model, config = vit(method="moa_lora", ranks=RANKS)
    names = [name for name, _ in moa_layers(model)]
    whole, parts = Insight(evaluator(index, config, World(0, 1, 0, 1)), model, [HELD_OUT], LAST), []
    for rank in range(2):
        one = evaluator(index, config, World(rank, 2, rank, 2))
        parts.append(evaluated(Insight(one, model, [HELD_OUT], LAST), step=0))
    seen = evaluated(whole, step=LAST)
    for name in ("counts", "confusion"):
        total = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(total, getattr(seen, name), rtol=0, atol=0)
    for name, tokens in seen.maps.items():
        assert all(torch.equal(part.maps[name], tokens) for part in parts)

    counts = np.zeros((len(names), 6, 10, len(RANKS)))
    true, said = [], []
    for env in range(6):
        loader = evaluation_loader(
            index, env, "all", trial_seed=0, holdout_fraction=0.2,
            transform=eval_transform(config), batch_size=30,
        )  # fmt: skip
        for batch in loader:
            with torch.no_grad(), moa.recorded_routes(model.eval()) as routes:
                scores = model(batch.images)
            for layer, name in enumerate(names):
                for label, experts in zip(batch.labels, routes[name].argmax(-1), strict=True):
                    for expert in experts.tolist():
                        counts[layer, env, int(label), expert] += 1
            if env == HELD_OUT:
                true += batch.labels.tolist()
                said += scores.argmax(1).tolist()
    assert seen.layers == names
    np.testing.assert_allclose(seen.counts.numpy(), counts, atol=1e-9)
    assert (counts.sum((0, 1, 2)) > 0).all(), "an unused expert would show nothing"
    assert (seen.confusion.numpy() == confusion_matrix(true, said, labels=range(10))).all()

    fixed = whole.mapped
    assert 6 <= len(fixed.labels) <= MAPPED
    assert set(fixed.domains) == set(range(6))
    with torch.no_grad(), moa.recorded_routes(model) as routes:
        model(fixed.images)
        features = model.forward_head(model.forward_features(whole.projected.images), True)
        model(fixed.images)
    for name in names:
        assert torch.equal(seen.maps[name], routes[name].argmax(-1))
    assert seen.features is not None
    torch.testing.assert_close(seen.features, features, rtol=1e-4, atol=1e-5)
    assert parts[0].features is None, "only after the last step"
    assert model.training is False


def test_shared_tokens_count_with_their_shares(index: ShardIndex) -> None:
    seen = Seen(
        evaluator(index, {}, World(0, 1, 0, 1)), [1], ["layer"], torch.zeros(1, 2, 3, 2).double(),
        torch.zeros(3, 3, dtype=torch.int64),
    )  # fmt: skip
    seen.routes["layer"] = torch.tensor([[[0.5, 0.0], [0.2, 0.6]], [[0.0, 0.3], [0.0, 0.1]]])
    seen.note(1, torch.tensor([0, 2]), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    wanted = torch.zeros(1, 2, 3, 2).double()
    wanted[0, 1, 0] = torch.tensor([1.25, 0.75])
    wanted[0, 1, 2] = torch.tensor([0.0, 2.0])
    torch.testing.assert_close(seen.counts, wanted)
    assert seen.confusion.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_an_evaluation_that_is_broken_off_leaves_without_a_collective(index: ShardIndex) -> None:
    model, config = vit(method="moa_lora", ranks=RANKS)

    def broken() -> None:
        raise EvaluationBrokenOff

    def never(_: Tensor) -> Tensor:
        raise AssertionError("other ranks are not here")

    part = replace(evaluator(index, config, World(0, 1, 0, 1)), pause=broken, sum_over_ranks=never)
    with pytest.raises(EvaluationBrokenOff):
        evaluated(Insight(part, model, [HELD_OUT], LAST), step=0)
    assert all(layer.record_gates is None for _, layer in moa_layers(model))


def test_a_single_image_is_projected(index: ShardIndex, tmp_path: Path) -> None:
    model, config = vit(method="lora")
    insight = Insight(evaluator(index, config, World(0, 1, 0, 1)), model, [HELD_OUT], LAST)
    insight.projected = fixed_images(index, [(HELD_OUT, 0)], config, Decoder())
    curves = Curves(RunConfig(), tmp_path, 0, [])
    Pages(curves, insight, (), tmp_path / "routing.png")._projector(LAST, torch.ones(1, 4))
    curves.close(whole=False)
    assert list(tmp_path.glob("*/features/sprite.png"))


@pytest.mark.parametrize("method", ["moa_kron", "lora"])
def test_pages_are_written_for_what_the_method_has(
    index: ShardIndex, tmp_path: Path, method: str
) -> None:
    model, config = vit(method=method)
    insight = Insight(evaluator(index, config, World(0, 1, 0, 1)), model, [HELD_OUT], LAST)
    curves = Curves(RunConfig(), tmp_path / "tensorboard", 0, [])
    ranks = moa.MoAConfig(method=method).resolved().ranks  # type: ignore[arg-type]
    pages = Pages(curves, insight, ranks or (), tmp_path / "routing.png")
    seen = evaluated(insight, LAST)
    pages.add(LAST, seen, best=False)
    assert not (tmp_path / "routing.png").exists(), "only of the best adapter so far"
    pages.add(LAST, seen, best=True)
    curves.close(whole=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    images, scalars = set(events.Tags()["images"]), set(events.Tags()["scalars"])
    assert "confusion/held_out" in images
    routed = {"routing/maps", "routing/expert_by_domain", "routing/expert_by_class"}
    assert images & routed == (routed if method == "moa_kron" else set())
    assert (tmp_path / "routing.png").exists() == (method == "moa_kron")
    assert any(tag.endswith("/bits_domain") for tag in scalars) == (method == "moa_kron")
    (folder,) = (tmp_path / "tensorboard").glob("*/features")
    table = (folder / "metadata.tsv").read_text().splitlines()
    assert table[0].split("\t") == ["domain", "part", "class"]
    assert (
        len(table)
        == 1 + len(insight.projected.labels)
        == 1 + len((folder / "tensors.tsv").read_text().splitlines())
    )
    assert {row.split("\t")[1] for row in table[1:]} == {"source", "held out"}
    assert (folder / "sprite.png").exists()
