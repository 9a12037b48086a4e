"""Lists of samples to leave out, or to keep, when a set is read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from shards import DataConfig, open_shards
from shards.errors import DamagedDataError, DataConfigError
from shards.read.index import ShardIndex
from shards.read.subset import read_subset
from shards.stream.split import split_indices
from tests.shards.stream.test_evaluation import load
from tests.support.shards_fixtures import make_set, stream_of

Write = Callable[..., str]
LISTED = {0: (2, 3, 11), 1: (), 3: (0, 20)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subset")
    make_set(folder, domains=("art", "car-toon", "photo", "sketch"))
    return folder / "shards"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*lines: str) -> str:
        (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in lines))
        return str(tmp_path / "list.txt")

    return write


def keys(index: ShardIndex) -> list[str]:
    return [index.key(env, rank) for env, ranks in LISTED.items() for rank in ranks]


def paths(index: ShardIndex) -> list[str]:
    """From the images on disk, in the order of their sorted list."""
    found = []
    for env, ranks in LISTED.items():
        root = index.root.parent / "images"
        files = sorted((root / index.domains[env]).rglob("im*"))
        found += [str(files[rank].relative_to(root)) for rank in ranks]
    return found


@pytest.mark.parametrize("names", [keys, paths])
def test_keys_and_paths_name_the_same_samples(
    folder: Path, write: Write, names: Callable[[ShardIndex], list[str]]
) -> None:
    index = ShardIndex.load(folder)
    subset = read_subset(index, write("", *names(index), " ./" + names(index)[0] + " "), None)
    assert subset is not None
    for env in range(4):
        assert np.flatnonzero(~subset.kept[env]).tolist() == list(LISTED.get(env, ()))
    opposite = read_subset(index, None, write(*names(index)))
    assert opposite is not None
    for one, other in zip(subset.kept, opposite.kept, strict=True):
        assert (one == ~other).all()
    assert subset.fingerprint != opposite.fingerprint
    assert read_subset(index, None, None) is None


def opened(folder: Path, **lists: str) -> ShardIndex:
    return open_shards(DataConfig(dataset="folder", root=str(folder), **lists))


def test_training_never_meets_what_is_left_out(folder: Path, write: Write) -> None:
    whole = ShardIndex.load(folder)
    index = opened(folder, exclude_list=write(*keys(whole)))
    stream, all_of_it = stream_of(index, batch_per_domain=1), stream_of(whole)
    seen = {key for step in range(60) for key in stream.keys(step)}
    inside = {
        whole.key(env, int(rank))
        for env in (0, 1, 3)
        for rank in split_indices(whole.num_samples(env), 1, env)[0]
    }
    assert set(keys(whole)) & inside, "some of the listed ones would be trained on"
    assert seen == inside - set(keys(whole))
    assert stream.fingerprint()["subset"] != all_of_it.fingerprint()["subset"] is None
    assert stream.num_train(1) == all_of_it.num_train(1)


@pytest.mark.parametrize("which", ["exclude_list", "include_list"])
def test_every_sample_is_evaluated_in_one_place(folder: Path, write: Write, which: str) -> None:
    whole = ShardIndex.load(folder)
    index = opened(folder, **{which: write(*keys(whole))})
    listed = {whole.read(0, rank).label * 1000 + rank for rank in LISTED[0]}
    assert listed

    def images(split: str) -> list[bytes]:
        return [image.numpy().tobytes() for b in load(index, 0, split) for image in b.images]

    rest = [rank for rank in range(18) if rank not in LISTED[0]]
    ranks = {True: list(LISTED[0]), False: rest}[which == "exclude_list"]
    everything = [i.numpy().tobytes() for b in load(whole, 0, "all") for i in b.images]
    assert images("left_out") == [everything[rank] for rank in ranks]
    together = images("in") + images("out")
    assert sorted(together) == sorted(images("all"))
    assert sorted(together + images("left_out")) == sorted(everything)
    inside = [i.numpy().tobytes() for b in load(whole, 0, "in") for i in b.images]
    assert set(images("in")) <= set(inside), "a list moves nothing across the split"


def test_without_a_list_nothing_is_left_out(folder: Path) -> None:
    assert list(load(ShardIndex.load(folder), 0, "left_out")) == []


def test_accuracy_of_what_is_left_out_has_its_own_column(folder: Path, write: Write) -> None:
    from trainer.evaluate.evaluator import Evaluator, accuracies
    from trainer.process.world import ALONE

    class Cat(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0]]).expand(len(images), 2)

    whole = ShardIndex.load(folder)
    index = opened(folder, exclude_list=write(*keys(whole)))
    settings = {
        "data_config": {"input_size": (3, 8, 8), "mean": (0, 0, 0), "std": (1, 1, 1)},
        "trial_seed": 2, "holdout_fraction": 0.2, "batch_size": 4, "workers": 0, "world": ALONE,
        "device": torch.device("cpu"), "dtype": torch.float32, "sum_over_ranks": lambda x: x,
    }  # fmt: skip
    row = accuracies(Evaluator(index=index, **settings)(Cat()))  # type: ignore[arg-type]
    for env in range(4):
        labels = whole.labels(env)[list(LISTED.get(env, ()))]
        expected = float((labels == 0).mean()) if len(labels) else 0.0
        assert row[f"moa/env{env}_left_out_acc"] == expected
        shares = [label == 0 for label in set(labels)]
        assert row[f"moa/env{env}_left_out_class_mean"] == (np.mean(shares) if shares else 0)
        inside, _ = split_indices(whole.num_samples(env), 2, env)
        rest = [rank for rank in inside if rank not in LISTED.get(env, ())]
        assert row[f"env{env}_in_acc"] == pytest.approx(
            float((whole.labels(env)[rest] == 0).mean())
        )
    usual = accuracies(Evaluator(index=whole, **settings)(Cat()))  # type: ignore[arg-type]
    assert len(usual) == 16
    assert not any("left_out" in key for key in usual)


def test_entries_that_name_nothing(
    folder: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    index = ShardIndex.load(folder)
    wrong = ("art-0000018", "art-2", "art-00000002", "art/cat/none.png", "photo")
    subset = read_subset(index, write("art-0000002", *wrong), None)
    assert subset is not None
    assert sum(int((~kept).sum()) for kept in subset.kept) == 1
    assert "data.exclude_list: 5 of 6 entries name no sample of the set ('art-" in caplog.text
    with pytest.raises(DataConfigError, match=r"names no sample of .*keys such as 'art-0000000'"):
        read_subset(index, None, write(*wrong))
    with pytest.raises(DataConfigError, match="names no sample"):
        read_subset(index, write(), None)


def test_lists_that_cannot_work(folder: Path, write: Write, tmp_path: Path) -> None:
    index = ShardIndex.load(folder)
    with pytest.raises(DataConfigError, match=r"data.include_list = '.*': cannot be read"):
        read_subset(index, None, str(tmp_path))
    (problem,) = DataConfig(exclude_list="a", include_list="b").problems()
    assert problem.startswith("data.include_list = 'b': not together with data.exclude_list")
    only_art = opened(folder, include_list=write("art-0000002"))
    with pytest.raises(DataConfigError, match=r"domain 'sketch': none of its \d+ training images"):
        stream_of(only_art, sources=[3])
    remote = ShardIndex.load(folder.as_uri(), DataConfig(cache_dir=str(tmp_path / "cache")))
    assert read_subset(remote, write("art-0000002"), None) is not None
    with pytest.raises(DataConfigError, match=r"names samples by path .* name them by key"):
        read_subset(remote, write("art/cat/im002.png"), None)


def test_damaged_shard_is_not_searched_in_silence(tmp_path: Path, write: Write) -> None:
    index = make_set(tmp_path)
    path = index.root / index.shards[0].file
    path.write_bytes(bytes([255]) * path.stat().st_size)
    with pytest.raises(
        DamagedDataError, match=rf"cannot be searched for .*--out {index.root} --verify`"
    ):
        read_subset(index, write("art/cat/im002.png"), None)
