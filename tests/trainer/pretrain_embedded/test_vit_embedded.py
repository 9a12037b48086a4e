"""The embedded backbone: registration, shipped weights, and the code that makes them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from trainer.prepare.vit_embedded import GLYPH_CLASSES, WEIGHTS_PATH
from trainer.pretrain_embedded.__main__ import PretrainConfig, model_card, pretrain, save
from trainer.pretrain_embedded.glyphs import HELD_OUT_FONTS, TRAIN_FONTS, GlyphBank, GlyphSampler

FEW_STEPS = PretrainConfig(steps=12, batch_size=32, warmup_steps=2, easy_until=0.9, full_from=1.0)


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def load(**kwargs: object) -> nn.Module:
    model: nn.Module = timm.create_model("vit_embedded", pretrained=True, **kwargs)
    return model.eval()


@pytest.fixture(scope="module")
def letters() -> tuple[Tensor, Tensor]:
    """Fresh images of the classes in a font that training never saw, medium difficulty."""
    return GlyphSampler(GlyphBank(HELD_OUT_FONTS[:1]), 123).batch(300, 0.5)


def test_is_registered_with_its_tag() -> None:
    assert timm.is_model("vit_embedded")
    assert timm.list_pretrained("vit_embedded*") == ["vit_embedded.glyphs"]
    tagged = timm.create_model("vit_embedded.glyphs", pretrained=True)
    assert torch.equal(tagged.head.weight, load().head.weight)


@pytest.mark.parametrize(
    ("num_classes", "width"), [(10, 10), (0, 128), (50, 50), (None, len(GLYPH_CLASSES))]
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_output_shape(num_classes: int | None, width: int, pretrained: bool) -> None:
    model = timm.create_model("vit_embedded", pretrained=pretrained, num_classes=num_classes)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, width)
    assert model.num_features == 128


def test_is_timms_own_vision_transformer() -> None:
    model = timm.create_model("vit_embedded")
    assert type(model) is timm.models.vision_transformer.VisionTransformer
    assert len(model.blocks) == 6
    assert model.blocks[0].attn.num_heads == 4
    assert model.patch_embed.num_patches == 16
    assert 1.1e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.3e6


def test_data_config() -> None:
    config = timm.data.resolve_model_data_config(load(num_classes=10))
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert config["interpolation"] == "bicubic"
    assert config["crop_pct"] == 1.0


def test_loaded_backbone_is_the_same_every_time_and_the_head_is_fresh(
    letters: tuple[Tensor, Tensor],
) -> None:
    first, second = load(num_classes=10), load(num_classes=10)
    full = load()
    with torch.no_grad():
        features = [
            model.forward_head(model.forward_features(letters[0][:8]), pre_logits=True)
            for model in (first, second, full)
        ]
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])
    assert first.head.weight.shape == (10, 128)
    assert torch.isfinite(first.head.weight).all()
    fresh = timm.create_model("vit_embedded", num_classes=0)
    assert not torch.equal(fresh.patch_embed.proj.weight, first.patch_embed.proj.weight)


def test_missing_weights_name_the_file_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_hub(*_: object, **__: object) -> None:
        pytest.fail("timm tried to reach the hub")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_hub)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", no_hub)
    gone = tmp_path / "gone.safetensors"
    overlay = {"file": str(gone)}
    with pytest.raises(FileNotFoundError, match=r"python -m trainer\.pretrain_embedded") as error:
        timm.create_model("vit_embedded", pretrained=True, pretrained_cfg_overlay=overlay)
    assert str(gone) in str(error.value)
    timm.create_model("vit_embedded", pretrained=False, pretrained_cfg_overlay=overlay)


def test_shipped_files_are_small_and_described() -> None:
    assert WEIGHTS_PATH.stat().st_size <= 6_000_000
    card = (WEIGHTS_PATH.parent / "README.md").read_text(encoding="utf-8")
    assert "python -m trainer.pretrain_embedded" in card
    assert "| full range |" in card


def test_shipped_head_reads_letters_of_an_unseen_font(letters: tuple[Tensor, Tensor]) -> None:
    images, labels = letters
    with torch.no_grad():
        predicted = load()(images).argmax(-1)
    assert not any(character.isdigit() for group in GLYPH_CLASSES for character in group)
    assert (predicted == labels).float().mean() > 0.7


def test_features_group_letters_better_than_random_ones(letters: tuple[Tensor, Tensor]) -> None:
    images, labels = letters

    def centroid_accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            features = nn.functional.normalize(model(images), dim=-1)
        centroids = torch.stack(
            [features[:150][labels[:150] == d].mean(0) for d in range(len(GLYPH_CLASSES))]
        )
        return float(((features[150:] @ centroids.T).argmax(-1) == labels[150:]).float().mean())

    trained = centroid_accuracy(load(num_classes=0))
    untrained = centroid_accuracy(timm.create_model("vit_embedded", num_classes=0).eval())
    assert trained > 0.7
    assert trained > untrained + 0.3


def test_glyph_images_are_in_range_and_repeat_under_a_seed() -> None:
    bank = GlyphBank(HELD_OUT_FONTS[:1], ("ab", "c"))
    images, labels = GlyphSampler(bank, 7).batch(64, 1.0)
    again, _ = GlyphSampler(bank, 7).batch(64, 1.0)
    other, _ = GlyphSampler(bank, 8).batch(64, 1.0)
    assert images.shape == (64, 3, 32, 32)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert images.isfinite().all()
    assert images.abs().max() <= 1
    assert 16 <= int((labels == 0).sum()) <= 48, "classes are balanced, not characters"


def test_distance_field_is_positive_inside_and_about_the_right_size() -> None:
    bank = GlyphBank(["DejaVuSans-Bold"], ("l",))
    inside = bank.fields[0] > 0
    rows = inside.any(1).nonzero()[:, 0]
    assert abs(int(rows[-1] - rows[0]) + 1 - 44) <= 1, "the longest side fills 11/16 of the field"
    assert 0.05 < bank.fields.max() < 0.2
    assert bank.fields.min() < -0.3


def test_held_out_fonts_are_not_trained_on() -> None:
    assert not set(HELD_OUT_FONTS) & set(TRAIN_FONTS)


@pytest.mark.parametrize(
    ("wrong", "knob"),
    [({"warmup_steps": 50, "steps": 50}, "warmup_steps"), ({"easy_until": 0.5}, "easy_until")],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float], knob: str) -> None:
    with pytest.raises(ValueError, match=knob):
        PretrainConfig(**wrong)  # type: ignore[arg-type]


def test_schedules_start_and_end_where_they_should() -> None:
    config = PretrainConfig()
    assert config.lr(config.warmup_steps) == pytest.approx(config.peak_lr)
    assert config.lr(config.steps - 1) < 1e-3 * config.peak_lr
    assert config.difficulty(0) == 0.0
    assert config.difficulty(config.steps - 1) == 1.0


def test_a_few_steps_lower_the_loss_and_repeat_under_a_seed(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    first = pretrain(FEW_STEPS, ["DejaVuSans"], [])
    second = pretrain(FEW_STEPS, ["DejaVuSans"], [])
    assert first.losses == second.losses
    assert sum(first.losses[-3:]) < sum(first.losses[:3])

    path = save(FEW_STEPS, first, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", path.name]
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == model_card(FEW_STEPS, first)
    model = load(pretrained_cfg_overlay={"file": str(path)})
    assert torch.equal(model.head.weight, first.model.get_parameter("head.weight"))
