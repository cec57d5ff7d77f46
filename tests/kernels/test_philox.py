"""Philox words against the published vectors; normals against the normal distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from fastdiff import kernels
from fastdiff.kernels import extension, philox4x32, philox_normal
from fastdiff.kernels.philox import _normals_of_blocks
from tests.kernels.cases import recording

ONES = 0xFFFFFFFF
# Random123, tests/kat_vectors: "philox4x32 10", counter, key, result
VECTORS = [
    ("zeros", (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ("ones", (ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        "digits of pi",
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("name", "counter", "key", "words"), VECTORS)
def test_known_answers(name: str, counter: tuple, key: tuple, words: tuple) -> None:
    assert philox4x32(torch.tensor(counter), torch.tensor(key)).tolist() == list(words)


def test_words_equal_arbitrary_precision_arithmetic() -> None:
    """Ten rounds in Python integers, which have no width to get wrong."""
    rng = np.random.default_rng(0)
    counters, keys = rng.integers(0, 2**32, (50, 4)), rng.integers(0, 2**32, (50, 2))
    for counter, key, actual in zip(
        counters.tolist(),
        keys.tolist(),
        philox4x32(torch.tensor(counters), torch.tensor(keys)).tolist(),
        strict=True,
    ):
        (c0, c1, c2, c3), (k0, k1) = counter, key
        for _ in range(10):
            high0, low0 = divmod(0xD2511F53 * c0, 2**32)
            high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        assert actual == [c0, c1, c2, c3]


def test_counters_and_keys_broadcast() -> None:
    counter, key = torch.randint(2**32, (5, 1, 4)), torch.randint(2**32, (3, 2))
    words = philox4x32(counter, key)
    assert words.shape == (5, 3, 4)
    assert torch.equal(words[4, 1], philox4x32(counter[4, 0], key[1]))


def test_the_normals_follow_the_counter_scheme() -> None:
    """Counter (block_lo, block_hi, step, stream), key (seed_lo, seed_hi), Box-Muller on pairs."""
    seed, step, stream = 0x123456789ABCDEF, 7, 2
    z = philox_normal(torch.tensor([seed]), (11,), step=step, stream=stream)[0].tolist()
    key = torch.tensor([seed & ONES, seed >> 32])
    for element in range(11):
        words = philox4x32(torch.tensor([element // 4, 0, step, stream]), key).tolist()
        pair = element % 4 // 2 * 2
        u0, u1 = (((w >> 9) + 0.5) / 2**23 for w in words[pair : pair + 2])
        radius, angle = math.sqrt(-2 * math.log(u0)), 2 * math.pi * u1
        expected = radius * (math.sin(angle) if element % 2 else math.cos(angle))
        assert z[element] == np.float32(expected)


def test_blocks_beyond_32_bits_count_on_in_the_second_word() -> None:
    """Element 2^34 and those after it: an image too large to draw here."""
    block, seed = 2**32 + 5, torch.tensor([11])
    z = _normals_of_blocks(seed, torch.tensor([block, 5]), 3, 1)[0].tolist()
    words = philox4x32(torch.tensor([5, 1, 3, 1]), torch.tensor([11, 0])).tolist()
    u0, u1 = (((w >> 9) + 0.5) / 2**23 for w in words[:2])
    assert z[0] == np.float32(math.sqrt(-2 * math.log(u0)) * math.cos(2 * math.pi * u1))
    assert z[4:] == philox_normal(seed, (24,), step=3, stream=1)[0, 20:].tolist()


def test_the_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    seeds = torch.tensor([5, 0, 2**63 - 1, 2**32, 5, 1, 77])
    for shape in ((4, 8, 8), (1, 5, 7), (3,)):
        together = philox_normal(seeds, shape, step=3, stream=1)
        for i, seed in enumerate(seeds):
            assert torch.equal(together[i], philox_normal(seed[None], shape, step=3, stream=1)[0])
        assert torch.equal(together[0], together[4])


def test_a_longer_image_begins_with_the_shorter_one() -> None:
    seeds = torch.tensor([3, 4])
    assert torch.equal(philox_normal(seeds, (1001,))[:, :18], philox_normal(seeds, (18,)))
    assert torch.equal(philox_normal(seeds, (3, 6)).flatten(1), philox_normal(seeds, (18,)))


def test_step_may_be_a_tensor() -> None:
    seeds = torch.tensor([3, 4])
    assert torch.equal(
        philox_normal(seeds, (9,), step=torch.tensor(6)), philox_normal(seeds, (9,), step=6)
    )


def test_a_negative_seed_is_read_by_its_bits() -> None:
    low, high = -5 & ONES, (-5 >> 32) & ONES
    words = philox4x32(torch.zeros(4, dtype=torch.int64), torch.tensor([low, high])).tolist()
    word, second, *_ = words
    assert all(0 <= w <= ONES for w in words)
    u0, u1 = (((w >> 9) + 0.5) / 2**23 for w in (word, second))
    z = philox_normal(torch.tensor([-5, 5]), (64,))
    assert z[0, 0] == np.float32(math.sqrt(-2 * math.log(u0)) * math.cos(2 * math.pi * u1))
    assert abs(np.corrcoef(z)[0, 1]) < 0.5


def draws() -> dict[str, torch.Tensor]:
    """400,000 numbers each, along every direction the numbers can be taken."""
    few, many = torch.tensor([123]), torch.arange(400)
    return {
        "one image": philox_normal(few, (400_000,)),
        "many seeds": philox_normal(many, (1000,)),
        "one element of 400,000 seeds": philox_normal(torch.arange(400_000), (1,)),
        "many steps": torch.stack([philox_normal(few, (2000,), step=s) for s in range(200)]),
        "seeds that differ in the high word": philox_normal(many << 32, (1000,)),
    }


@pytest.mark.parametrize("name", draws())
def test_the_normals_are_normal(name: str) -> None:
    z = draws()[name].double().flatten().numpy()
    n = z.size
    # five standard errors of each moment
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert stats.kstest(z, "norm").pvalue > 1e-4
    assert np.abs(z).max() <= math.sqrt(-2 * math.log(2**-24))


def test_nothing_correlates() -> None:
    n = 100_000
    base = philox_normal(torch.tensor([11]), (n,))[0]
    others = {
        "next seed": philox_normal(torch.tensor([12]), (n,))[0],
        "next step": philox_normal(torch.tensor([11]), (n,), step=1)[0],
        "next stream": philox_normal(torch.tensor([11]), (n,), stream=1)[0],
        "step and stream swapped": philox_normal(torch.tensor([11]), (n,), step=1, stream=0)[0],
        "shifted by one": base.roll(1),
        "shifted by a pair": base.roll(2),
        "shifted by a block": base.roll(4),
    }
    for name, other in others.items():
        for a, b in ((base, other), (base.square(), other.square())):
            correlation = np.corrcoef(a, b)[0, 1]
            assert abs(correlation) < 5 / math.sqrt(n), name


def test_shapes_and_backend() -> None:
    with recording("philox_normal") as ran:
        z = philox_normal(torch.tensor([1, 2]), (3, 0, 5))
    assert ran == ["cpu" if extension.native else "reference"]
    assert z.shape == (2, 3, 0, 5)
    assert philox_normal(torch.zeros(0, dtype=torch.int64), (4,)).shape == (0, 4)
    assert philox_normal(torch.tensor([1]), ()).shape == (1,)
    z = philox_normal(torch.tensor([1, 2]), (3, 5))
    assert z.dtype == torch.float32
    assert z.is_contiguous()


def test_streams_have_names() -> None:
    assert (kernels.INITIAL_NOISE, kernels.SAMPLER_NOISE, kernels.POSTERIOR_NOISE) == (0, 1, 2)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"seeds must be .* int64, got torch.int32"):
        philox_normal(torch.zeros(2, dtype=torch.int32), (3,))
    with pytest.raises(ValueError, match="seeds must be"):
        philox_normal(torch.tensor(1), (3,))
    with pytest.raises(ValueError, match="sizes must be >= 0"):
        philox_normal(torch.tensor([1]), (3, -1))
    with pytest.raises(ValueError, match=r"step must be in \[0, 2\^32\), got -1"):
        philox_normal(torch.tensor([1]), (3,), step=-1)
    with pytest.raises(ValueError, match="stream must be"):
        philox_normal(torch.tensor([1]), (3,), stream=2**32)
    with pytest.raises(ValueError, match="counter must be int64"):
        philox4x32(torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
