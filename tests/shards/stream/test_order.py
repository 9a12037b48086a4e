import hashlib

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import shards.stream.order
from shards.randomness import hash64, permutation, random_words, sorting_order, splitmix64
from shards.stream.order import DomainOrder, substitute_index

LAST = 2**63 - 1  # position that a stream can have
MASK = 2**64 - 1
GOLDEN = {
    "hash": 16649622176124849992,
    "words": "7a6b54f6fb09b395",
    "permutation": "7f86404ea1d3ded6",
    "stream": "a8554a27f03f2d2f",
    "replacement": "e91aa1f842bc379e",
}


def scalar_splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def scalar_hash(*parts: object) -> int:
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return sum(byte << (8 * place) for place, byte in enumerate(digest))


def scalar_permutation(key: int, n: int) -> list[int]:
    salt = scalar_splitmix64(key)
    return sorted(range(n), key=lambda i: (scalar_splitmix64(i ^ salt), i))


def elements(seed: int, domain: str, n: int, k: object, mode: str = "permutation") -> np.ndarray:
    return DomainOrder(seed, domain, n, mode).elements(k)  # type: ignore[arg-type]


def test_splitmix64_known_values() -> None:
    # Steele's generator with seed 1234567; published with the algorithm
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * golden) & MASK for i in range(3)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(st.lists(st.integers(0, MASK), min_size=1, max_size=20))
def test_splitmix64_equals_scalar(values: list[int]) -> None:
    result = splitmix64(np.array(values, dtype=np.uint64))
    assert result.tolist() == [scalar_splitmix64(value) for value in values]


@settings(deadline=None)
@given(st.integers(0, MASK), st.integers(1, 60))
def test_permutation_equals_scalar(key: int, n: int) -> None:
    assert permutation(key, n).tolist() == scalar_permutation(key, n)


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(1, 25), st.integers(0, 200) | st.integers(LAST - 200, LAST))
def test_stream_equals_scalar(seed: int, n: int, k: int) -> None:
    epoch, place = divmod(k, n)
    key = scalar_hash(seed, "ärt", epoch)
    assert int(elements(seed, "ärt", n, k)) == scalar_permutation(key, n)[place]
    word = scalar_splitmix64(k ^ scalar_splitmix64(scalar_hash(seed, "ärt", "replacement")))
    assert int(elements(seed, "ärt", n, k, "replacement")) == word % n


def test_vector_equals_one_by_one_across_epochs() -> None:
    k = np.array([[0, 6, 7], [13, 14, 700]])
    whole = elements(3, "photo", 7, k)
    assert whole.shape == k.shape
    assert whole.tolist() == [[int(elements(3, "photo", 7, x)) for x in row] for row in k]


@pytest.mark.parametrize("n", [1, 5, 240])
def test_every_sample_once_per_epoch(n: int) -> None:
    epochs = elements(0, "photo", n, np.arange(4 * n)).reshape(4, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    if n > 1:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def scalar_window(seed: int, domain: str, shards: list[int], epoch: int, window: int) -> list[int]:
    """One epoch of mode `window`, from its description."""
    present = sorted(set(shards))
    taken = [
        present[place]
        for place in scalar_permutation(scalar_hash(seed, domain, "shards", epoch), len(present))
    ]
    whole = scalar_permutation(scalar_hash(seed, domain, epoch), len(shards))
    result = []
    for first in range(0, len(taken), window):
        result += [i for i in whole if shards[i] in taken[first : first + window]]
    return result


@settings(deadline=None)
@given(
    st.integers(0, 9),
    st.lists(st.integers(0, 7), min_size=1, max_size=40),
    st.integers(0, 3) | st.integers(LAST // 40 - 3, LAST // 40 - 1),
    st.integers(1, 9),
)
def test_windows_equal_scalar(seed: int, shards: list[int], epoch: int, window: int) -> None:
    n = len(shards)
    order = DomainOrder(seed, "ärt", n, "window", window, shards)
    found = order.elements(np.arange(epoch * n, (epoch + 1) * n)).tolist()
    assert found == scalar_window(seed, "ärt", shards, epoch, window)
    assert sorted(found) == list(range(n))
    for place, element in enumerate(found):
        assert shards[element] in order.windows(epoch * n + place, epoch * n + place).live


def test_a_window_of_all_shards_is_the_permutation() -> None:
    k = np.arange(100)
    shards = np.arange(30) % 5
    assert (
        DomainOrder(1, "a", 30, "window", 5, shards).elements(k).tolist()
        == elements(1, "a", 30, k).tolist()
    )


def test_next_window_is_known_before_it_is_read() -> None:
    order = DomainOrder(0, "a", 60, "window", 2, np.arange(60) % 7)
    last = order.windows(0, 0)
    for k in range(1, 150):
        now = order.windows(k, k)
        assert now == last or now.live == last.following
        last = now


def test_equal_words_keep_their_order() -> None:
    words = np.array([5, 1, 5, 0, 1, 5], dtype=np.uint64)
    assert sorting_order(words).tolist() == [3, 1, 4, 0, 2, 5]


def test_few_epochs_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.stream.order, "_CACHED_ELEMENTS", 50)
    order = DomainOrder(0, "a", 10)
    whole = order.elements(np.arange(200)).tolist()
    assert len(order._epochs) == 5
    large = DomainOrder(0, "a", 40)
    large.elements(np.arange(400))
    assert list(large._epochs) == [8, 9]
    assert [int(order.elements(k)) for k in range(200)] == whole


def test_replacement_is_uniform_and_repeats() -> None:
    drawn = elements(0, "photo", 10, np.arange(20_000), "replacement")
    counts = np.bincount(drawn, minlength=10)
    assert counts.min() > 1800
    assert counts.max() < 2200


def test_streams_differ_by_seed_domain_and_mode() -> None:
    k = np.arange(50)
    streams = {
        tuple(elements(0, "a", 50, k)),
        tuple(elements(1, "a", 50, k)),
        tuple(elements(0, "b", 50, k)),
        tuple(elements(0, "a", 50, k, "replacement")),
    }
    assert len(streams) == 4


def test_substitutes_depend_on_place_and_attempt() -> None:
    found = [substitute_index(0, "a", 10**6, k, attempt) for k in range(3) for attempt in (1, 2)]
    assert len(set(found)) == 6
    assert all(0 <= value < 10**6 for value in found)


def test_permutation_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(ValueError, match="read-only"):
        permutation(1, 5)[0] = 3


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.astype("<i8").tobytes()).hexdigest()[:16]


def test_golden_digests() -> None:
    """Fixed for ever: a change here changes every running experiment's order of data."""
    assert hash64(0, "photo", 0) == GOLDEN["hash"]
    assert digest(random_words(7, np.arange(1000, dtype=np.uint64))) == GOLDEN["words"]
    assert digest(permutation(hash64(0, "photo", 0), 48129)) == GOLDEN["permutation"]
    k = np.arange(1000, 3000)
    assert digest(elements(5, "real", 777, k)) == GOLDEN["stream"]
    assert digest(elements(5, "real", 777, k, "replacement")) == GOLDEN["replacement"]
