import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.errors import DataConfigError
from shards.pixels.decoding import decode_image
from shards.pixels.transforms import loader_transform
from shards.randomness import hash64
from shards.read.index import ShardIndex
from shards.stream.batches import finish_images
from shards.stream.mixup import labels_and_shares
from shards.stream.stream import DomainStream
from shards.writer import write_shards
from tests.support.shards_fixtures import (
    DATA_CONFIG,
    FOLDER,
    assert_equal,
    collect,
    image_bytes,
    make_folder,
    make_set,
    pixels_only,
    stream_of,
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("stream")
    return make_set(folder, domains=("art", "cartoon", "photo", "sketch"))


def test_batches_hold_what_the_keys_say(index: ShardIndex) -> None:
    stream = stream_of(index, transform=pixels_only)
    for step, batch in enumerate(stream.loader(2, 5), start=2):
        assert batch.images.dtype == torch.float32
        assert batch.labels.dtype == batch.domains.dtype == torch.int64
        assert batch.domains.tolist() == [0, 1, 3] * 4
        assert (batch.first_slot, batch.substituted) == (0, 0)
        for slot, key in enumerate(stream.keys(step)):
            domain, _, rank = key.rpartition("-")
            sample = index.read(index.domain_number(domain), int(rank))
            assert sample.label == batch.labels[slot]
            assert torch.equal(decode_image(sample.image).float(), batch.images[slot])


def test_any_world_size_gives_the_same_batches_and_pixels(index: ShardIndex) -> None:
    stream = stream_of(index)
    alone = collect(stream, 3, 7)
    for world in (2, 3, 4, 6, 12):
        assert_equal(collect(stream, 3, 7, world), alone)
    assert_equal(collect(stream, 3, 7, 2, accumulation=3), alone)
    assert_equal(collect(stream, 3, 7, 1, accumulation=12), alone)
    assert_equal(collect(stream, 3, 7, 2, workers=2, accumulation=2), alone)


def test_resume_is_a_later_start(index: ShardIndex) -> None:
    whole = collect(stream_of(index), 0, 12)
    assert_equal(collect(stream_of(index), 7, 12), whole[7:])
    assert_equal(collect(stream_of(index), 7, 7), [])


def test_stream_can_be_sent_to_a_spawned_process(index: ShardIndex) -> None:
    stream = stream_of(index)
    collect(stream, 0, 1)  # with files open and permutations cached
    copy = pickle.loads(pickle.dumps(stream))
    assert copy.fingerprint() == stream.fingerprint()
    assert_equal(collect(copy, 4, 6), collect(stream, 4, 6))


@pytest.mark.parametrize("mode", ["permutation", "replacement"])
def test_worker_count_changes_nothing(index: ShardIndex, mode: str) -> None:
    stream = stream_of(index, mode=mode)
    alone = collect(stream, 0, 5)
    for workers in (1, 2):
        assert_equal(collect(stream, 0, 5, workers=workers), alone)


def mean_level(image: torch.Tensor) -> torch.Tensor:
    """What contrast jitter computes; torch cuts this sum into one part per thread."""
    return (image.float() / 7).mean().reshape(1)


def test_thread_count_changes_nothing(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", domains=("a",), classes=("x",), per_class=6)
    for number, path in enumerate(sorted(root.rglob("im*"))):
        path.write_bytes(image_bytes(number, "PNG", (500, 400)))
    index = write_shards(root, tmp_path / "out", FOLDER)
    stream = stream_of(index, sources=[0], transform=mean_level)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(collect(stream, 0, 3))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


@pytest.mark.parametrize("workers", [0, 1])
def test_random_state_of_the_model_is_left_alone(index: ShardIndex, workers: int) -> None:
    torch.manual_seed(77)
    random.seed(77)
    expected = (torch.rand(3), random.random())
    torch.manual_seed(77)
    random.seed(77)
    iterator = iter(stream_of(index).loader(0, 3, workers=workers))
    next(iterator)
    next(iterator)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    del iterator


def test_same_sample_is_augmented_anew_each_epoch(index: ShardIndex) -> None:
    stream = stream_of(index, sources=[0], batch_per_domain=1)
    length = stream.num_train(0)
    first = {stream.keys(step)[0]: step for step in range(length)}
    second = {stream.keys(step)[0]: step for step in range(length, 2 * length)}
    key = stream.keys(0)[0]
    (one,), (other,) = collect(stream, 0, 1), collect(stream, second[key], second[key] + 1)
    assert first[key] == 0
    assert not torch.equal(one[0], other[0])


def test_bad_loader_arguments_are_refused(index: ShardIndex) -> None:
    with pytest.raises(DataConfigError, match=r"data.workers = -1"):
        stream_of(index).loader(0, 1, workers=-1)
    with pytest.raises(DataConfigError, match="steps 3 to 2"):
        stream_of(index).loader(3, 2)
    last = 2**63 // stream_of(index).global_batch - 1
    [batch] = stream_of(index).loader(last, last + 1)
    assert len(batch.labels) == 12
    with pytest.raises(DataConfigError, match=f"must stay below {last + 1}"):
        stream_of(index).loader(last, last + 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_colours_on_the_device_equal_colours_in_the_loader(index: ShardIndex, workers: int) -> None:
    half = stream_of(index, transform=loader_transform(DATA_CONFIG, "domainbed"))
    whole = collect(stream_of(index), 0, 6)
    finished = []
    for expected, batch in zip(whole, half.loader(0, 6, workers=workers), strict=True):
        assert batch.images.dtype == torch.uint8
        assert batch.colour is not None
        images = finish_images(batch, torch.device("cpu"), DATA_CONFIG)
        assert images.dtype == torch.float32
        finished.append((images - expected[0]).abs() * 255 * 0.2)  # in grey levels, or less
        assert torch.equal(batch.labels, expected[1])
    difference = torch.stack(finished)
    assert difference.max() <= 3.01
    assert (difference > 0.01).float().mean() < 0.001, "only where a rounding falls the other way"


def test_batches_travel_as_bytes_in_shared_memory(index: ShardIndex) -> None:
    levels = stream_of(index, transform=loader_transform(DATA_CONFIG, "domainbed", colours=True))
    whole = collect(stream_of(index), 0, 3)
    for expected, batch in zip(whole, levels.loader(0, 3, workers=1), strict=True):
        assert batch.images.nbytes == len(batch.labels) * 3 * 24 * 24
        assert batch.images.is_shared()
        for tensor in (batch.labels, batch.domains):
            assert not tensor.is_shared(), "each would cost a connection of its own"
        images = finish_images(batch, torch.device("cpu"), DATA_CONFIG)
        assert torch.equal(images, expected[0]), "bit for bit"


def test_batches_of_the_loader_are_finished(index: ShardIndex) -> None:
    (batch,) = stream_of(index).loader(0, 1)
    assert finish_images(batch, torch.device("cpu"), DATA_CONFIG) is batch.images


def mixed_slowly(plain: DomainStream, step: int, kind: str) -> tuple[torch.Tensor, ...]:
    """Images, labels mixed in and shares of a global batch, from a stream that mixes nothing."""
    (images, labels, _), m = collect(plain, step, step + 1)[0], plain.batch_per_domain
    sources, number = len(plain.sources), plain.global_batch
    draws = np.random.RandomState(hash64(plain.seed, "mix", step) % 2**32)
    shares = draws.beta(0.7, 0.7, number)
    centres = draws.random_sample((number, 2)) if kind == "cutmix" else []
    result, others = images.double(), []
    for slot in range(number):
        image, domain = divmod(slot, sources)
        pair = image + 1 if image % 2 == 0 else image - 1
        if m % 2 and image >= m - 3:
            pair = image + 1 if image < m - 1 else m - 3
        other, share = images[pair * sources + domain].double(), shares[slot]
        others.append(labels[pair * sources + domain])
        if kind == "mixup":
            result[slot] = share * result[slot] + (1 - share) * other
            continue
        box = []
        for centre, side in zip(centres[slot], images.shape[2:], strict=True):  # timm's rand_bbox
            middle, half = int(centre * side), int(side * (1 - share) ** 0.5) // 2
            box.append(slice(max(middle - half, 0), min(middle + half, side)))
        result[slot][:, box[0], box[1]] = other[:, box[0], box[1]]
        shares[slot] = 1 - other[0, box[0], box[1]].numel() / other[0].numel()
    return result, torch.stack(others), torch.from_numpy(shares)


@pytest.mark.parametrize(("kind", "each"), [("mixup", 3), ("cutmix", 4), ("cutmix", 5)])
def test_images_are_mixed_within_their_domain_whoever_holds_them(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch, kind: str, each: int
) -> None:
    levels = loader_transform(DATA_CONFIG, "domainbed", colours=True)
    expected = mixed_slowly(stream_of(index, batch_per_domain=each), 3, kind)
    stream = stream_of(index, batch_per_domain=each, transform=levels, mix=kind, mix_alpha=0.7)
    plain = collect(stream_of(index, batch_per_domain=each), 3, 4)[0]
    load = stream.load
    monkeypatch.setattr(stream, "load", lambda *slot: load(*slot)._replace(substituted=True))
    first: list[torch.Tensor] = []
    for world, pieces, workers in ((1, 1, 0), (1, 1, 1), (1, each, 0), (3, 1, 0), (3, each, 0)):
        options = {"accumulation": pieces, "workers": workers}
        held = [b for rank in range(world) for b in stream.loader(3, 4, rank, world, **options)]
        images = torch.cat([finish_images(b, torch.device("cpu"), DATA_CONFIG) for b in held])
        told = [labels_and_shares(b.mix) for b in held if b.mix is not None]
        labels, shares = (torch.cat(each) for each in zip(*told, strict=True))
        for name, tensor in zip(("labels", "domains"), plain[1:], strict=True):
            assert torch.cat([getattr(batch, name) for batch in held]).equal(tensor)
        assert labels.equal(expected[1])
        torch.testing.assert_close(shares.double(), expected[2], rtol=0, atol=1e-7)
        torch.testing.assert_close(images.double(), expected[0], rtol=0, atol=1e-5)
        first = first or [images, shares]
        assert images.equal(first[0]), "bit for bit"
        assert shares.equal(first[1])
        assert sum(batch.substituted for batch in held) == len(images), "each counted once"
    assert not images.equal(plain[0])
