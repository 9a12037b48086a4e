"""Heads made from text against open_clip itself, on small random models; nothing is downloaded."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import moa
from moa.files.reading import AdapterInfo, read_adapter
from moa.files.saving import save_adapter
from moa.layers.head import CosineHead
from moa.model.heads import fit_head
from shards import DataConfig, Decoder, eval_transform, evaluation_loader, open_shards
from tests.support import warm
from tests.support.trainer_fixtures import arguments, environment, launch, rows
from trainer.checkpoint import checkpoint
from trainer.config.class_texts import (
    in_words,
    known_words,
    read_class_names,
    read_templates,
    shipped,
    spoken_names,
)
from trainer.config.command_line import parse
from trainer.engine.engine import restore_weights
from trainer.evaluate.combine import models_on, soup
from trainer.evaluate.interpolation import interpolated, start_of
from trainer.evaluate.members import Member, base_of, read_members
from trainer.export.__main__ import main as export
from trainer.flatness.surface import Surface
from trainer.predict import predict
from trainer.prepare.parts import Parts, build
from trainer.prepare.text_head import (
    TextModel,
    fill_cosine_head,
    fill_head,
    load_text_model,
    mean_length,
    text_model_of,
)
from trainer.process.errors import ConfigError
from trainer.process.world import World

WIDTH, SPACE = 64, 32
NAMES = ["dog", "hot air balloon", "Eiffel Tower", "t-shirt", "scene without animals"]

pytestmark = pytest.mark.usefixtures("few_embedded")


def small_clip(
    width: int = WIDTH, layers: int = 2, space: int = SPACE, no_ln_pre: bool = False
) -> dict[str, Any]:
    """Configuration of an open_clip model for images of 32 x 32 with patches of 8 x 8."""
    return {
        "embed_dim": space,
        "vision_cfg": {"image_size": 32, "layers": layers, "width": width, "patch_size": 8,
                       "head_width": width // 4, "no_ln_pre": no_ln_pre},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2,
                     "layers": 2},
    }  # fmt: skip


def random_clip(seed: int = 0, **sizes: Any) -> nn.Module:
    """Such a model with weights far from each other, so that images and texts differ clearly."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**small_clip(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.visual.proj.mul_(3)
        model.text_projection.mul_(20)
        model.logit_scale.fill_(3.0)
        model.visual.conv1.weight.mul_(6)
        model.token_embedding.weight.mul_(100)
    return model


def as_timm(visual: nn.Module) -> dict[str, Tensor]:
    """open_clip's visual tower under timm's names, the projection as the classifier."""
    names = {
        "class_embedding": "cls_token", "positional_embedding": "pos_embed",
        "conv1.weight": "patch_embed.proj.weight", "proj": "head.weight",
    }  # fmt: skip
    inside = {
        "ln_1": "norm1", "ln_2": "norm2", "attn.in_proj_": "attn.qkv.", "attn.out_proj":
        "attn.proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    found = {}
    for name, value in visual.state_dict().items():
        value = value.clone()
        if name in names:
            name = names[name]
        name = name.replace("transformer.resblocks", "blocks")
        name = name.replace("ln_pre", "norm_pre").replace("ln_post", "norm")
        for theirs, ours in inside.items():
            name = name.replace(theirs, ours)
        if name in ("cls_token", "pos_embed"):
            value = value.reshape(1, -1, value.shape[-1])
        found[name] = value.T.contiguous() if name == "head.weight" else value
    return found | {"head.bias": torch.zeros(len(found["head.weight"]))}


def text_of(model: nn.Module) -> TextModel:
    return TextModel(model, open_clip.get_tokenizer("ViT-B-16"))


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    return random_clip()


def timm_tower(clip: nn.Module) -> nn.Module:
    model = timm.create_model(
        "vit_base_patch16_clip_224", img_size=32, patch_size=8, embed_dim=WIDTH, depth=2,
        num_heads=4, num_classes=SPACE,
    ).eval()  # fmt: skip
    model.load_state_dict(as_timm(clip.visual))
    return model


def test_scores_are_clips_up_to_a_factor_per_image(clip: nn.Module) -> None:
    images = torch.randn(40, 3, 32, 32) + 4 * torch.randn(40, 3, 1, 1)
    model, text = timm_tower(clip), text_of(clip)
    templates = ("a photo of a {}.", "a sketch of a {}.")
    projection = model.head
    length = mean_length(model, images, projection)
    model.reset_classifier(len(NAMES))
    embeddings = text.embed(NAMES, templates)
    fill_head(model.head, embeddings, projection, text.scale() / length)
    with torch.no_grad():
        ours = model(images)
        # open_clip's own way, sentence by sentence.
        features = clip.encode_image(images)
        reference = []
        for name in NAMES:
            tokens = text.tokenizer([t.format(name) for t in templates])
            mean = nn.functional.normalize(clip.encode_text(tokens), dim=1).mean(0)
            reference.append(mean / mean.norm())
        cosines = nn.functional.normalize(features, dim=1) @ torch.stack(reference).T
        theirs = clip.logit_scale.exp() * cosines
    assert torch.allclose(ours.argmax(1), theirs.argmax(1))
    assert len(ours.argmax(1).unique()) > 1, "the images are told apart at all"
    factor = features.norm(dim=1, keepdim=True) / length
    assert torch.allclose(ours, theirs * factor, rtol=1e-3, atol=1e-4)
    assert factor.mean() == pytest.approx(1, rel=1e-5), "right on average"
    assert factor.std() > 0.01, "and not on each image"


def test_scores_of_a_cosine_head_are_clips_own(clip: nn.Module) -> None:
    images = torch.randn(40, 3, 32, 32) + 4 * torch.randn(40, 3, 1, 1)
    model, text = timm_tower(clip), text_of(clip)
    projection, templates = model.head, ("a photo of a {}.", "a sketch of a {}.")
    model.reset_classifier(len(NAMES))
    fit_head(model, len(NAMES), {"kind": "cosine", "space": SPACE, "frozen": True})
    fill_cosine_head(model.head, text.embed(NAMES, templates), projection, text.scale())
    with torch.no_grad():
        weights = open_clip.build_zero_shot_classifier(clip, text.tokenizer, NAMES, templates)
        theirs = clip.logit_scale.exp() * clip.encode_image(images, normalize=True) @ weights
        assert torch.allclose(model(images), theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="embeddings have 5 numbers, the backbone's own head"):
        fill_cosine_head(model.head, torch.randn(3, 5), projection, 1.0)


def test_biases_of_projection_and_scores_are_kept() -> None:
    torch.manual_seed(1)
    projection, head = nn.Linear(6, 4), nn.Linear(6, 3)
    text, features = torch.randn(3, 4), torch.randn(5, 6)
    fill_head(head, text, projection, 2.5, bias=-7.0)
    expected = 2.5 * projection(features) @ text.T - 7
    assert torch.allclose(head(features), expected, atol=1e-5)
    with pytest.raises(ConfigError, match="embeddings have 5 numbers, the backbone's own head"):
        fill_head(head, torch.randn(3, 5), projection, 1.0)


@pytest.mark.parametrize("method", ["linear", "bias", "lora", "moa_lora"])
def test_methods_start_at_the_zero_shot_scores_and_reload(
    method: str, clip: nn.Module, tmp_path: Path
) -> None:
    images, config = torch.randn(8, 3, 32, 32), moa.MoAConfig(method=method, blocks="all")
    model, text = timm_tower(clip), text_of(clip)
    projection = model.head
    model.reset_classifier(len(NAMES))
    fill_head(model.head, text.embed(NAMES, ("a {}",)), projection, 1.0)
    before = model(images).detach()
    base = moa.base_hash(model)
    moa.inject(model, config)
    assert torch.allclose(model.eval()(images), before, atol=1e-5)
    info = AdapterInfo(
        "vit_base_patch16_clip_224", base, config, tuple(NAMES), {}, head={"init": "text"}
    )
    save_adapter(model, tmp_path / "adapter", info)
    fresh = timm_tower(clip)
    assert moa.load_adapter(fresh, tmp_path / "adapter").head == {"init": "text"}
    assert torch.equal(fresh.eval()(images), model(images))


def test_text_models_load_from_a_folder_or_a_file(clip: nn.Module, tmp_path: Path) -> None:
    folder = save_clip(clip, small_clip(), tmp_path / "clip")
    loaded = load_text_model(f"local-dir:{folder}")
    assert torch.equal(loaded.embed(NAMES, ("a {}",)), text_of(clip).embed(NAMES, ("a {}",)))
    assert loaded.scale() == pytest.approx(torch.tensor(3.0).exp().item())
    assert loaded.bias() == 0
    for source, words in {
        f"local-dir:{tmp_path / 'none'}": "cannot be had",
        "ViT-B-61:openai": "did you mean 'ViT-B-16",
        "ViT-B-16": "names no weights; give ViT-B-16:TAG with a tag of openai",
        f"ViT-B-16:{tmp_path / 'none.safetensors'}": "cannot be had",
    }.items():
        with pytest.raises(ConfigError, match=words):
            load_text_model(source)


def save_clip(clip: nn.Module, config: dict[str, Any], folder: Path) -> Path:
    """A folder that open_clip reads as `local-dir:`."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_known_backbones_name_their_own_clip_model() -> None:
    pairs = {f"{name}:{tag}" for name, tag in open_clip.list_pretrained()}
    known = {n: text_model_of(n) for n in timm.list_pretrained() if text_model_of(n)}
    assert len(known) > 40
    for backbone, source in known.items():
        assert source in pairs
        config = open_clip.get_model_config(str(source).partition(":")[0])
        assert config["embed_dim"] == timm.get_pretrained_cfg(backbone).num_classes
        flag = open_clip.get_pretrained_cfg(*str(source).split(":")).get("quick_gelu")
        assert bool(flag) == ("quickgelu" in str(source))
    assert known["vit_large_patch14_clip_224.laion2b"] == "ViT-L-14:laion2b_s32b_b82k"
    assert known["vit_large_patch14_clip_quickgelu_224.openai"] == "ViT-L-14-quickgelu:openai"
    assert text_model_of("vit_large_patch14_clip_224.laion2b_ft_in1k") is None
    assert text_model_of("vit_embedded.glyphs") is None


CLASSES = {
    "pacs": "dog elephant giraffe guitar horse house person",
    "vlcs": "bird car chair dog person",
    "terraincognita": "bird bobcat cat coyote dog empty opossum rabbit raccoon squirrel",
    "officehome": """Alarm_Clock Backpack Batteries Bed Bike Bottle Bucket Calculator Calendar
        Candles Chair Clipboards Computer Couch Curtains Desk_Lamp Drill Eraser Exit_Sign Fan
        File_Cabinet Flipflops Flowers Folder Fork Glasses Hammer Helmet Kettle Keyboard Knives
        Lamp_Shade Laptop Marker Monitor Mop Mouse Mug Notebook Oven Pan Paper_Clip Pen Pencil
        Postit_Notes Printer Push_Pin Radio Refrigerator Ruler Scissors Screwdriver Shelf Sink
        Sneakers Soda Speaker Spoon TV Table Telephone ToothBrush Toys Trash_Can Webcam""",
    "domainnet": """
        aircraft_carrier airplane alarm_clock ambulance angel animal_migration ant anvil apple arm
        asparagus axe backpack banana bandage barn baseball baseball_bat basket basketball bat
        bathtub beach bear beard bed bee belt bench bicycle binoculars bird birthday_cake
        blackberry blueberry book boomerang bottlecap bowtie bracelet brain bread bridge broccoli
        broom bucket bulldozer bus bush butterfly cactus cake calculator calendar camel camera
        camouflage campfire candle cannon canoe car carrot castle cat ceiling_fan cello cell_phone
        chair chandelier church circle clarinet clock cloud coffee_cup compass computer cookie
        cooler couch cow crab crayon crocodile crown cruise_ship cup diamond dishwasher
        diving_board dog dolphin donut door dragon dresser drill drums duck dumbbell ear elbow
        elephant envelope eraser eye eyeglasses face fan feather fence finger fire_hydrant
        fireplace firetruck fish flamingo flashlight flip_flops floor_lamp flower flying_saucer
        foot fork frog frying_pan garden garden_hose giraffe goatee golf_club grapes grass guitar
        hamburger hammer hand harp hat headphones hedgehog helicopter helmet hexagon hockey_puck
        hockey_stick horse hospital hot_air_balloon hot_dog hot_tub hourglass house house_plant
        hurricane ice_cream jacket jail kangaroo key keyboard knee knife ladder lantern laptop
        leaf leg light_bulb lighter lighthouse lightning line lion lipstick lobster lollipop
        mailbox map marker matches megaphone mermaid microphone microwave monkey moon mosquito
        motorbike mountain mouse moustache mouth mug mushroom nail necklace nose ocean octagon
        octopus onion oven owl paintbrush paint_can palm_tree panda pants paper_clip parachute
        parrot passport peanut pear peas pencil penguin piano pickup_truck picture_frame pig
        pillow pineapple pizza pliers police_car pond pool popsicle postcard potato power_outlet
        purse rabbit raccoon radio rain rainbow rake remote_control rhinoceros rifle river
        roller_coaster rollerskates sailboat sandwich saw saxophone school_bus scissors scorpion
        screwdriver sea_turtle see_saw shark sheep shoe shorts shovel sink skateboard skull
        skyscraper sleeping_bag smiley_face snail snake snorkel snowflake snowman soccer_ball sock
        speedboat spider spoon spreadsheet square squiggle squirrel stairs star steak stereo
        stethoscope stitches stop_sign stove strawberry streetlight string_bean submarine suitcase
        sun swan sweater swing_set sword syringe table teapot teddy-bear telephone television
        tennis_racquet tent The_Eiffel_Tower The_Great_Wall_of_China The_Mona_Lisa tiger toaster
        toe toilet tooth toothbrush toothpaste tornado tractor traffic_light train tree triangle
        trombone truck trumpet t-shirt umbrella underwear van vase violin washing_machine
        watermelon waterslide whale wheel windmill wine_bottle wine_glass wristwatch yoga zebra
        zigzag""",
}


@pytest.mark.parametrize(
    ("dataset", "count"),
    [("pacs", 7), ("vlcs", 5), ("terraincognita", 10), ("officehome", 65), ("domainnet", 345)],
)
def test_class_names_are_words(dataset: str, count: int) -> None:
    classes = CLASSES[dataset].split()
    names = spoken_names(classes, dataset)
    assert len(set(names)) == len(classes) == count
    assert not any("_" in name or name != name.strip() for name in names)
    assert set(known_words(dataset)) <= set(classes), "an entry for a class that does not exist"


def test_class_names_are_cleaned_where_the_folder_misleads() -> None:
    office = dict(zip(CLASSES["officehome"].split(), spoken_names(
        CLASSES["officehome"].split(), "officehome"), strict=True))  # fmt: skip
    assert office["Mouse"] == "computer mouse"
    assert office["Alarm_Clock"] == "alarm clock"
    assert office["ToothBrush"] == "toothbrush"
    assert spoken_names(["empty"], "terraincognita") == ["natural scene without animals"]
    net = ["The_Eiffel_Tower", "animal_migration", "hot_air_balloon", "see_saw", "t-shirt"]
    assert spoken_names(net, "domainnet") == [
        "Eiffel Tower", "animal migration", "hot air balloon", "seesaw", "T-shirt",
    ]  # fmt: skip
    assert spoken_names(["3", "0"], "digits") == ["digit three", "digit zero"]
    assert [in_words(n) for n in ("003.backpack", " Real  World ", "The_Big_Ben", "12")] == [
        "backpack", "real world", "big ben", "12",
    ]  # fmt: skip


def test_names_of_ones_own_replace_and_collisions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "names.yaml"
    path.write_text("bat: bat, the animal\n")
    replaced = read_class_names(str(path))
    assert spoken_names(["bat", "cat"], "domainnet", replaced) == ["bat, the animal", "cat"]
    with pytest.raises(ConfigError, match="'bat' is no class"):
        spoken_names(["cat"], "domainnet", replaced)
    with pytest.raises(ConfigError, match="'A_b' and 'a b' would both be called 'a b'"):
        spoken_names(["A_b", "a b"], "folder")
    path.write_text("- bat\n")
    with pytest.raises(ConfigError, match="must hold lines of"):
        read_class_names(str(path))


def test_prompts_are_a_name_a_file_or_a_template(tmp_path: Path) -> None:
    assert shipped() == ["photo", "styles"]
    assert read_templates("photo") == ("a photo of a {}.",)
    assert read_templates("art of a {}") == ("art of a {}",)
    styles = read_templates("styles")
    assert len(set(styles)) == len(styles) == 12
    path = tmp_path / "mine.txt"
    path.write_text("# mine\n\na {} here\n  the {}\n")
    assert read_templates(str(path)) == ("a {} here", "the {}")
    for text, words in {
        "a dog": "must hold {} once",
        "{} {}": "must hold",
        "# no": "no template",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_templates(str(path))
    with pytest.raises(ConfigError, match="legal are photo, styles, a file"):
        read_templates("stiles")


def test_settings_that_cannot_work_are_found_at_once() -> None:
    with pytest.raises(ConfigError, match=r"not model\.weights random"):
        parse(["--model.head_init=text", "--model.weights=random"])
    with pytest.raises(ConfigError) as caught:
        parse(["--model.prompts=styles", "--model.text_model=ViT-B-16:openai"])
    assert str(caught.value).count("has no effect without --model.head_init text") == 2
    with pytest.raises(ConfigError) as caught:
        parse(["--model.head_init=text", "--model.prompts=stiles", "--model.class_names=none"])
    assert "model.prompts" in str(caught.value)
    assert "model.class_names" in str(caught.value)
    text, cosine = "--model.head_init=text", "--model.head=cosine"
    needs_text = r"margin: 0\.3 needs embeddings of the classes; add --model\.head cosine --model"
    frozen = "--model.head_frozen=true"
    for flags, words in (
        ([frozen], "head_frozen: true .* add --model.head cosine --model.head_init text"),
        ([frozen, text], "head_frozen: true keeps a head as it starts"),
        ([frozen, cosine], "head_frozen: true keeps a head as it starts"),
        (
            [frozen, cosine, text, "--moa.method=linear"],
            "head_frozen: true leaves nothing to train",
        ),
        (["--objective.margin=0.3"], needs_text),
        (["--objective.margin=0.3", text], needs_text),
        (["--objective.margin=0.3", cosine], needs_text),
        (["--objective.margin=-1", text, cosine], "margin: -1.0; must be a finite number >= 0"),
        (["--model.head=angles"], "model.head"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            parse(flags)
        assert len(str(caught.value).splitlines()) == 1, flags
    assert parse([frozen, cosine, text, "--objective.margin=0.3"]).objective.margin == 0.3


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, list[str]]:
    """A CLIP model of the embedded backbone's shape, and the flags that train from its weights."""
    folder = tmp_path_factory.mktemp("embedded")
    sizes = {"width": 128, "layers": 6, "space": 15, "no_ln_pre": True}
    clip = random_clip(3, **sizes)
    for module in clip.visual.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6  # that of timm's plain transformers
    tower = as_timm(clip.visual) | {"patch_embed.proj.bias": torch.zeros(128)}
    save_file(tower, folder / "tower.safetensors")
    save_clip(clip, small_clip(**sizes), folder / "clip")
    flags = [
        f"--model.weights={folder / 'tower.safetensors'}",
        "--model.head_init=text",
        f"--model.text_model=local-dir:{folder / 'clip'}",
        "--model.prompts=styles",
    ]
    return clip, flags


def stock_accuracies(clip: nn.Module) -> dict[str, float]:
    """open_clip's own zero-shot accuracy on the embedded data, domain by domain."""
    index, text = open_shards(DataConfig()), text_of(clip)
    names = [f"digit {n}" for n in "zero one two three four five six seven eight nine".split()]
    weights = open_clip.build_zero_shot_classifier(
        clip, text.tokenizer, names, read_templates("styles")
    )
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3,
              "interpolation": "bicubic"}  # fmt: skip
    found = {}
    for env in range(6):
        for split in ("in", "out"):
            loader = evaluation_loader(
                index, env, split, trial_seed=0, holdout_fraction=0.2,
                transform=eval_transform(config), batch_size=300,
            )  # fmt: skip
            (batch,) = loader
            with torch.no_grad():
                scores = clip.encode_image(batch.images, normalize=True) @ weights
            right = scores.argmax(1) == batch.labels
            found[f"env{env}_{split}_acc"] = float(right.double().mean())
    return found


def test_a_run_reports_clips_zero_shot_accuracy_and_its_adapter_loads(
    embedded: tuple[nn.Module, list[str]], tmp_path: Path
) -> None:
    clip, flags = embedded
    size = {"train__steps": "3", "train__eval_every": "2", "checkpoint__every": "3"}
    settings = arguments(tmp_path / "run", moa__method="moa_lora", **size)
    settings += [*flags, "--model.head=cosine", "--objective.margin=0.3", "--average.ema=true"]
    settings.append("--ds_config=ds_configs/zero3.json")  # which evaluates before it has trained
    result = launch(*settings, processes=2)
    assert result.returncode == 0, result.stderr
    row = json.loads((tmp_path / "run" / "zero_shot.json").read_text())
    expected = stock_accuracies(clip)
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, abs=1e-6), key
    assert max(expected.values()) > 0.12, "some are right"
    assert [r["step"] for r in rows(tmp_path / "run" / "results.jsonl")] == [0, 2]
    head = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["head"]
    assert head["init"] == "text"
    assert (head["kind"], head["space"], head["frozen"]) == ("cosine", 15, False)
    assert len(head["templates"]) == 12
    assert head["class_texts"][3] == "digit three"
    assert head["scale"] == pytest.approx(torch.tensor(3.0).exp().item())
    assert f"before training: {row['env5_in_acc']:.3f} on held-out rotated" in result.stdout
    check_what_moved(settings, tmp_path / "run", clip)
    weights = flags[0]
    adapter = str(tmp_path / "run" / "adapter-last")
    command = ["-m", "trainer.evaluate", "--adapter", adapter, weights, "--json"]
    evaluated = warm.run(*command, env=environment())
    assert evaluated.returncode == 0, evaluated.stderr
    last = rows(tmp_path / "run" / "results.jsonl")[-1]
    again = json.loads(evaluated.stdout.splitlines()[-1])
    for env in range(6):
        assert again[f"env{env}_in_acc"] == pytest.approx(last[f"env{env}_in_acc"], abs=0.005)


def check_what_moved(settings: list[str], run: Path, clip: nn.Module) -> None:
    """What does not train is CLIP's wherever it was written, and a start goes on from it."""
    parts = build(parse(settings), World(0, 1, 0, 1))
    start = dict(moa.adapter_state_dict(parts.model))
    still = {name: start[name].clone() for name in ("head.classes", "head.scale")}
    assert torch.equal(still["head.scale"], clip.logit_scale.detach().exp())
    folders = [run / name for name in ("adapter-last", "adapter-ema", "adapter")]
    folders.append(run / "checkpoints" / "step-00000003")
    for folder in folders:
        _, tensors = read_adapter(folder)
        assert all(torch.equal(tensors[name], value) for name, value in still.items())
    last = read_adapter(folders[0])[1]
    assert not torch.equal(last["head.weight"], start["head.weight"])
    restore_weights(parts.model, checkpoint.load(folders[-1]))
    assert all(torch.equal(last[n], t) for n, t in moa.adapter_state_dict(parts.model).items())


def made(folder: Path, *flags: str) -> tuple[Parts, str]:
    """A run's parts, its trainables moved a little, and its adapter as the run would save it."""
    parts = build(parse(["--moa.method=lora", *flags]), World(0, 1, 0, 1))
    torch.manual_seed(len(folder.name))
    for parameter in parts.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.01 * torch.randn_like(parameter))
    save_adapter(parts.model, folder, parts.info)
    return parts, str(folder)


def test_commands_rebuild_every_head(
    embedded: tuple[nn.Module, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cosine, weights = [*embedded[1], "--model.head=cosine"], embedded[1][0]
    kinds = {
        "cosine": cosine, "frozen": [*cosine, "--model.head_frozen=true"],
        "random": [weights, "--model.head=cosine"], "linear": embedded[1],
    }  # fmt: skip
    runs = {name: made(tmp_path / name, *flags) for name, flags in kinds.items()}
    index = open_shards(DataConfig())
    samples = [(index.read(0, n).image, int(index.labels(0)[n])) for n in (0, 20, 45)]
    files = [tmp_path / f"{n}.png" for n in range(3)]
    for file, (content, _) in zip(files, samples, strict=True):
        file.write_bytes(content)
    members = read_members([folder for _, folder in runs.values()])
    look, labels = (
        eval_transform(members[0].info.data_config),
        torch.tensor([s[1] for s in samples]),
    )
    images = torch.stack([look(Decoder()(content)[0]) for content, _ in samples])
    together = models_on(base_of(members[0], None).model, members).eval()
    for model, (parts, folder) in zip(together, runs.values(), strict=True):
        own = parts.model.eval()
        assert torch.equal(model(images), own(images)), folder
        said = torch.tensor([row.probabilities for row in predict(files, folder, workers=0)])
        wanted = own(images).softmax(1).topk(5).values
        assert torch.allclose(said, wanted, rtol=0, atol=1e-5), folder
        surface = Surface(own, [(images, labels)])
        assert surface.curvature(torch.randn_like(surface.weights)).isfinite().all(), folder
    for name in ("cosine", "linear"):
        code = export(["--adapter", runs[name][1], "--peft", str(tmp_path / f"peft-{name}")])
        refused = "has a cosine head (model.head), for which" in capsys.readouterr().err
        assert (code, refused) == ((2, True) if name == "cosine" else (0, False))
    check_soups(members, cosine, tmp_path)


@pytest.mark.parametrize(
    ("kind", "method"), [("linear", "full"), ("cosine", "full"), ("frozen", "lora")]
)
def test_an_adapter_goes_back_to_the_zero_shot_model(
    kind: str, method: str, embedded: tuple[nn.Module, list[str]], tmp_path: Path
) -> None:
    """Bit for bit; only a linear head needs the text model again."""
    head = {"linear": [], "cosine": ["--model.head=cosine"]}.get(
        kind, ["--model.head=cosine", "--model.head_frozen=true"]
    )
    flags = [*embedded[1], *head, f"--moa.method={method}"]
    (member,) = read_members([made(tmp_path / "adapter", *flags)[1]])
    text_model = embedded[1][2].partition("=")[2] if kind == "linear" else None
    start = start_of(member, None, text_model).model
    at_0, half = (interpolated(member, start, alpha) for alpha in (0.0, 0.5))
    zero_shot = build(parse(flags), World(0, 1, 0, 1)).model.eval()
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(models_on(start, [at_0])[0].eval()(images), zero_shot(images))
    begun = zero_shot.get_parameter("head.weight") if kind != "frozen" else None
    if begun is not None:
        mean = (begun + member.tensors["head.weight"]) / 2
        assert torch.allclose(half.tensors["head.weight"], mean)


def test_what_an_adapter_says_of_its_texts_is_not_trusted(
    embedded: tuple[nn.Module, list[str]], tmp_path: Path
) -> None:
    folder = made(tmp_path / "adapter", *embedded[1])[1]
    (member,) = read_members([folder])
    with pytest.raises(ConfigError, match="none of open_clip's own models; if you trust it, give"):
        start_of(member, None, None)
    with pytest.raises(
        ConfigError, match=r"cannot be had .* give --model\.text_model NAME:FILE or"
    ):
        start_of(member, None, f"local-dir:{tmp_path / 'none'}")
    other = random_clip()
    other.logit_scale.data.fill_(2.0)
    scaled = f"local-dir:{save_clip(other, small_clip(), tmp_path / 'clip')}"
    with pytest.raises(ConfigError, match=r"has the scale 7\.389.* had 20\.08"):
        start_of(member, None, scaled)
    for wrong in (
        {"class_texts": ["one"]}, {"templates": ["a {0.__class__}"]}, {"templates": []},
        {"mean_length": 0.0}, {"scale": None}, {"text_model": 3},
    ):  # fmt: skip
        head = {**member.info.head, **wrong}
        odd = replace(member, info=replace(member.info, head=head))
        with pytest.raises(moa.AdapterError, match="does not say from which texts"):
            start_of(odd, None, None)


def check_soups(members: list[Member], flags: list[str], folder: Path) -> None:
    """The mean of a head's projections, with class vectors that are as they were; or a line."""
    cosine, frozen = members[:2]
    (twin,) = read_members([made(folder / "twin", *flags, "--train.seed=1")[1]])
    mean = soup([cosine, twin], "command").tensors
    for name in ("head.classes", "head.scale"):
        assert torch.equal(mean[name], cosine.tensors[name])
    average = (cosine.tensors["head.weight"] + twin.tensors["head.weight"]) / 2
    assert torch.allclose(mean["head.weight"], average)
    with pytest.raises(ConfigError, match=r"cosine differ in the head's frozen\n.*ensemble"):
        soup([cosine, frozen], "command")
    (other,) = read_members([made(folder / "other", *flags, "--model.prompts=photo")[1]])
    with pytest.raises(ConfigError, match="differ in the head's templates"):
        soup([cosine, other], "command")


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_run_starts_at_clips_scores(kind: str, embedded: tuple[nn.Module, list[str]]) -> None:
    clip, flags = embedded
    parts = build(parse([*flags, "--moa.method=lora", f"--model.head={kind}"]), World(0, 1, 0, 1))
    images, text = torch.randn(8, 3, 32, 32), text_of(clip)
    names = parts.info.head["class_texts"]
    with torch.no_grad():
        features = clip.encode_image(images)
        unit = nn.functional.normalize(features, dim=1)
        theirs = text.scale() * unit @ text.embed(names, parts.info.head["templates"]).T
        ours = parts.model.eval()(images)
    if kind == "linear":
        theirs = theirs * features.norm(dim=1, keepdim=True) / parts.info.head["mean_length"]
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 if kind == "linear" else 1e-5)
    assert isinstance(parts.model.get_classifier(), CosineHead) == (kind == "cosine")


def test_a_backbone_without_a_clip_model_is_refused(
    embedded: tuple[nn.Module, list[str]], tmp_path: Path
) -> None:
    siglip = ["--model.backbone=vit_base_patch16_siglip_224.webli", "--model.head_init=text"]
    with pytest.raises(ConfigError, match="comes without the projection that CLIP trained"):
        build(parse(siglip), World(0, 1, 0, 1))
    with pytest.raises(ConfigError, match=r"not known for vit_embedded\.glyphs; give"):
        build(parse(["--model.head_init=text"]), World(0, 1, 0, 1))
    wrong = save_clip(random_clip(), small_clip(), tmp_path / "clip")
    flags = [*embedded[1], f"--model.text_model=local-dir:{wrong}"]
    for kind in ("linear", "cosine"):
        with pytest.raises(ConfigError, match="32 numbers, the backbone's own head gives 15"):
            build(parse([*flags, f"--model.head={kind}"]), World(0, 1, 0, 1))
