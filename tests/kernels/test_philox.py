"""Philox words against published vectors, and normals against the normal distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from scipy import stats

from fastdiff import kernels
from fastdiff.kernels import philox4x32, philox_normal
from fastdiff.kernels import triton as _triton
from fastdiff.kernels.philox_normal import normals_of_blocks
from fastdiff.kernels.philox_normal.triton import circle, philox_words, radius
from fastdiff.kernels.triton import jit, tl
from tests import cuda_host
from tests.kernels import cases
from tests.kernels.cases import recording
from tests.kernels.interpreter import counting_traffic

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
    """Ten rounds in Python integers, which cannot overflow."""
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


def test_block_numbers_beyond_32_bits_carry_into_the_second_word() -> None:
    """Elements from 2^34 on, of an image too large to draw as a whole."""
    block, seed = 2**32 + 5, torch.tensor([11])
    z = normals_of_blocks(seed, torch.tensor([block, 5]), 3, 1)[0].tolist()
    words = philox4x32(torch.tensor([5, 1, 3, 1]), torch.tensor([11, 0])).tolist()
    u0, u1 = (((w >> 9) + 0.5) / 2**23 for w in words[:2])
    assert z[0] == np.float32(math.sqrt(-2 * math.log(u0)) * math.cos(2 * math.pi * u1))
    assert z[4:] == philox_normal(seed, (24,), step=3, stream=1)[0, 20:].tolist()


def drawn(
    seeds: list[int],
    shape: tuple[int, ...],
    *,
    backend: str,
    step: int | torch.Tensor = 0,
    stream: int = 0,
) -> torch.Tensor:
    device = cases.device_of(backend)
    with kernels.backend(backend):
        seed = torch.tensor(seeds, dtype=torch.int64, device=device)
        return philox_normal(seed, shape, step=step, stream=stream).cpu()


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_the_noise_of_an_image_does_not_depend_on_its_batch(backend: str) -> None:
    seeds = [5, 0, 2**63 - 1, 2**32, 5, 1, 77]
    for shape in ((4, 8, 8), (1, 5, 7), (3,)):
        together = drawn(seeds, shape, backend=backend, step=3, stream=1)
        for i, seed in enumerate(seeds):
            alone = drawn([seed], shape, backend=backend, step=3, stream=1)
            assert torch.equal(together[i], alone[0])
        assert torch.equal(together[0], together[4])


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_a_longer_image_begins_with_the_shorter_one(backend: str) -> None:
    z = drawn([3, 4], (18,), backend=backend)
    assert torch.equal(drawn([3, 4], (1001,), backend=backend)[:, :18], z)
    assert torch.equal(drawn([3, 4], (3, 6), backend=backend).flatten(1), z)


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_step_may_be_a_tensor(backend: str) -> None:
    step = torch.tensor(6, device=cases.device_of(backend))
    z = drawn([3, 4], (9,), backend=backend, step=6)
    assert torch.equal(drawn([3, 4], (9,), backend=backend, step=step), z)
    assert not torch.equal(drawn([3, 4], (9,), backend=backend, step=1), z)


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_a_negative_seed_is_read_by_its_bits(backend: str) -> None:
    low, high = -5 & ONES, (-5 >> 32) & ONES
    words = philox4x32(torch.zeros(4, dtype=torch.int64), torch.tensor([low, high])).tolist()
    word, second, *_ = words
    assert all(0 <= w <= ONES for w in words)
    u0, u1 = (((w >> 9) + 0.5) / 2**23 for w in (word, second))
    z = drawn([-5, 5], (64,), backend=backend)
    expected = np.float32(math.sqrt(-2 * math.log(u0)) * math.cos(2 * math.pi * u1))
    assert abs(z[0, 0] - expected) <= 2 * np.spacing(abs(expected))
    assert abs(np.corrcoef(z)[0, 1]) < 0.5


def draws() -> dict[str, torch.Tensor]:
    """400,000 numbers along each direction: elements, seeds, steps, the high word of seeds."""
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


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_shapes_and_backend(backend: str) -> None:
    with recording("philox_normal") as ran:
        z = drawn([1, 2], (3, 0, 5), backend=backend)
    assert ran == [backend]
    assert z.shape == (2, 3, 0, 5)
    assert drawn([], (4,), backend=backend).shape == (0, 4)
    assert drawn([1], (), backend=backend).shape == (1,)
    z = drawn([1, 2], (3, 5), backend=backend)
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


# The Triton kernels


@jit
def words_kernel(words: tl.tensor, out: tl.tensor, BLOCK: tl.constexpr) -> None:
    """words: (BLOCK, 6) int64, the counter and the key; out: (BLOCK, 4) int64."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source, target = words + 6 * place, out + 4 * place
    w0, w1, w2, w3 = philox_words(
        tl.load(source).to(tl.uint32),
        tl.load(source + 1).to(tl.uint32),
        tl.load(source + 2).to(tl.uint32),
        tl.load(source + 3).to(tl.uint32),
        tl.load(source + 4).to(tl.uint32),
        tl.load(source + 5).to(tl.uint32),
    )
    tl.store(target, w0.to(tl.int64))
    tl.store(target + 1, w1.to(tl.int64))
    tl.store(target + 2, w2.to(tl.int64))
    tl.store(target + 3, w3.to(tl.int64))


def many_words() -> torch.Tensor:
    """(4096, 6) counters and keys: the published ones first, then 32-bit extremes, then random."""
    known = torch.tensor([[*counter, *key] for _, counter, key, _ in VECTORS])
    edges = torch.tensor([0, 1, 2**31 - 1, 2**31, ONES - 1, ONES])
    edges = edges[torch.randint(6, (1000, 6))]
    return torch.cat([known, edges, torch.randint(2**32, (4096 - 1003, 6))])


@cuda_host.needs_compiler
def test_cuda_words_equal_the_published_and_the_reference_bit_for_bit() -> None:
    words = many_words()
    out = torch.zeros(4096, 4, dtype=torch.uint32)
    cuda_host.call("emulation_philox_words", words.to(torch.uint32), out, 4096)
    assert torch.equal(out.to(torch.int64), philox4x32(words[:, :4], words[:, 4:]))
    assert out[:3].tolist() == [list(words) for *_, words in VECTORS]


@cases.needs_triton
def test_triton_words_equal_the_published_and_the_reference_bit_for_bit() -> None:
    words = many_words()
    device = cases.device_of("triton")
    out = torch.zeros(4096, 4, dtype=torch.int64, device=device)
    _triton.launch(words_kernel, (4,), words.to(device), out, BLOCK=1024)
    assert torch.equal(out.cpu(), philox4x32(words[:, :4], words[:, 4:]))
    assert out[:3].tolist() == [list(words) for *_, words in VECTORS]


@jit
def functions_kernel(out: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    """`radius` and `circle` of all k, (6, count) fp32."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r, r_rest = radius(k)
    x, x_rest, y, y_rest = circle(k)
    tl.store(out + k, r)
    tl.store(out + count + k, r_rest)
    tl.store(out + 2 * count + k, x)
    tl.store(out + 3 * count + k, x_rest)
    tl.store(out + 4 * count + k, y)
    tl.store(out + 5 * count + k, y_rest)


def triton_parts(count: int) -> torch.Tensor:
    out = torch.zeros(6, count, device=cases.device_of("triton"))
    _triton.launch(functions_kernel, (128,), out, count, BLOCK=count // 128)
    return out.cpu()


def emulated_parts(count: int) -> torch.Tensor:
    out = torch.zeros(6, count)
    cuda_host.call("emulation_normal_parts", out, count)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(triton_parts, marks=cases.needs_triton),
        pytest.param(emulated_parts, marks=cuda_host.needs_compiler),
    ],
)
def test_normals_are_within_2_ulp_of_the_reference(parts: Callable[[int], torch.Tensor]) -> None:
    """Proven by enumerating the 2^23 values of u, which are all that radius and circle ever get.

    z is the product of r and a cos or sin, each a sum of two fp32 numbers. Both z and the reference
    are rounded once, which costs half an ulp each, so the errors of the factors may add up to one
    ulp. An ulp of z is at least 2^-24 |z|, so their relative errors may sum to 2^-24. The neglected
    products of two small parts are below 2^-46.
    """
    count = 2**23
    out = parts(count)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    # 1 - u is exact: log1p keeps the digits near u = 1; cos and sin of the angle from the nearest
    # quarter turn keep them near their zeros
    r = torch.sqrt(-2 * torch.log1p(-(1 - u)))
    quarter = torch.round(4 * u)
    angle = (u - quarter / 4) * (2 * math.pi)
    cos, sin, quarter = angle.cos(), angle.sin(), quarter.long() % 4
    table = torch.stack([cos, -sin, -cos, sin])
    exact = r, table.gather(0, quarter[None])[0], table.gather(0, (quarter[None] + 3) % 4)[0]
    worst = []
    for i, wanted in enumerate(exact):
        have, rest = out[2 * i].double(), out[2 * i + 1].double()
        worst.append(((have + rest - wanted) / wanted).abs().max().item())
        assert (rest.abs() <= 2.0**-23 * have.abs()).all()
    assert worst[0] + max(worst[1:]) < 0.4 * 2.0**-24, worst


@pytest.mark.parametrize("backend", cases.KERNELS)
@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 5, 7), (3,), (), (1027,)], ids=str)
def test_normals_against_the_reference(shape: tuple[int, ...], backend: str) -> None:
    seeds = [3, -5, 2**63 - 1, 2**32, 0]
    for step, stream in ((0, 0), (1, 1), (2**32 - 1, 2**32 - 1), (2**31, 2)):
        z, expected = (
            drawn(seeds, shape, backend=name, step=step, stream=stream)
            for name in (backend, "reference")
        )
        ulp = torch.from_numpy(np.spacing(expected.abs().numpy()))
        assert ((z - expected).abs() <= 2 * ulp).all()


@cases.needs_triton
@cases.needs_cuda
def test_triton_and_cuda_give_the_same_bits() -> None:
    seeds = list(range(-20, 20))
    with cuda_host.emulated() if not torch.cuda.is_available() else nullcontext():
        z = drawn(seeds, (1027,), backend="cuda", step=5, stream=1)
    assert torch.equal(z, drawn(seeds, (1027,), backend="triton", step=5, stream=1))


@cases.needs_triton
def test_triton_op_is_registered_right_and_compiles() -> None:
    device = cases.device_of("triton")
    seeds, step = torch.tensor([3, 4], device=device), torch.tensor(2, device=device)
    cases.check_registration("philox_normal", "triton", seeds, [3, 5], None, 7, 1)
    cases.check_registration("philox_normal", "triton", seeds[:0], [3, 5], step, 0, 1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def noise(seeds: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return philox_normal(seeds, (2, 7), step=step, stream=1)

    compiled = torch.compile(noise, fullgraph=True, dynamic=True, backend="aot_eager")
    with kernels.backend("triton"):
        for n in (2, 3, 7):
            seeds = torch.arange(n, device=device)
            assert torch.equal(compiled(seeds, step), noise(seeds, step))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@cases.needs_triton
def test_triton_objections() -> None:
    seeds = torch.empty(1, dtype=torch.int64, device="meta")
    objection = kernels.OPS["philox_normal"].backends["triton"].why_not
    assert objection(seeds, (2**33,), None, 0, 0) is None
    assert "2^33 elements" in objection(seeds, (2**33, 2), None, 0, 0)
    assert "got cpu" in objection(seeds, (3,), torch.tensor(0), 0, 0)


@cases.needs_interpreter
def test_traffic_is_what_the_docstring_says() -> None:
    with counting_traffic() as traffic:
        drawn(list(range(5)), (4, 16, 16), backend="triton", step=3)
    assert traffic.total == pytest.approx(5 * 4 * 16 * 16 * 4, rel=0.05)
