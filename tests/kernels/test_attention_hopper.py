"""attention's kernel for sm_90a: results, bits and routes, and what happens without each of its
barriers. On a GPU, or under the host emulation."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff.bench.watch import watched
from fastdiff.kernels import attention
from fastdiff.kernels.attention import cuda as attention_cuda
from tests import cuda_host
from tests.kernels import cases
from tests.kernels.test_attention_cuda import (
    EXACT,
    HALF,
    ORDERS,
    SERVED,
    check,
    cuda,
    grown,
    in_turn,
    log_sum,
    machine_code,
    packed,
    with_sums,
)

pytestmark = [
    cases.needs_cuda,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]


def plain(case: cases.Case) -> bool:
    """Whether there is neither a mask nor are there extra keys."""
    _, options = case.inputs(torch.float16)
    return not {"mask", "extra_k"} & options.keys()


PLAIN = list(filter(plain, SERVED))


@pytest.fixture(autouse=True)
def hopper_from_the_first_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cuda, "HOPPER_FROM", 1)
    monkeypatch.setattr(attention_cuda, "ON_CHIP", 0)


@contextmanager
def on_hopper() -> Iterator[None]:
    with watched() as seen:
        yield
    assert seen
    assert all("attention_hopper" in launch.kernel for launch in seen)


@pytest.mark.parametrize(("case", "dtype", "order"), in_turn(PLAIN), ids=str)
def test_parity(case: cases.Case, dtype: torch.dtype, order: str) -> None:
    check(case, dtype, order)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 128, 129, 300, 450])
@pytest.mark.parametrize("d", EXACT)
def test_parity_at_exact_head_dims(d: int, keys: int) -> None:
    """Up to eight tiles of keys in two stages; the last tiles of queries and keys are partial."""
    for length, dtype, order in ((130, HALF[0], "reverse"), (17, HALF[1], "shuffled")):
        case = cases.attention_case("exact", "ragged tiles", (1, length, keys, 2, d), packed=False)
        check(case, dtype, order)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_parity_at_drawn_shapes(data: st.DataObject) -> None:
    d = 8 * data.draw(st.integers(1, 20))
    shape = (*(data.draw(st.integers(1, top)) for top in (2, 200, 400, 3)), d)
    # the largest error of a few numbers is chance
    assume(shape[0] * shape[1] * shape[3] * shape[4] >= 100)
    case = cases.attention_case("drawn", "any shape", shape, packed=data.draw(st.booleans()))
    check(case, data.draw(st.sampled_from(HALF)), data.draw(st.sampled_from(list(ORDERS))))


@pytest.mark.parametrize("where", [[3, 170, 335, 499], [499, 335, 170, 3], [128], [127]], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_parity_where_the_largest_score_moves_from_tile_to_tile(
    where: list[int], dtype: torch.dtype
) -> None:
    case = cases.Case("grown", "the sum is rescaled", lambda draw: grown(draw, 500, where, 130))
    check(case, dtype, "shuffled again")


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts calls of the emulated runtime")
def test_a_device_is_asked_once() -> None:
    """Not in every call, and of each dtype's kernel on its own."""
    asked = cuda_host.library().emulation_times_asked
    for dtype in HALF:
        q, k, v = packed(1, 20, 1, 40, dtype=dtype)
        with cuda("forward"), on_hopper():
            attention(q, k, v)
            once = asked()
            attention(q, k, v)
        assert asked() == once > 0


@pytest.mark.parametrize("d", [40, 64])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_log_sum_exp(dtype: torch.dtype, d: int) -> None:
    """Also with the polynomial, which every eighth tile of d = 40 uses."""
    q, k, v = packed(2, 277, 3, d, dtype=dtype)
    with cuda("reverse"), on_hopper():
        for scale in (d**-0.5, 2.5):
            lse = with_sums(q, k, v, None, None, None, scale)[1]
            torch.testing.assert_close(lse.double(), log_sum(q, k, scale), rtol=2e-6, atol=1e-5)


def test_rows_are_read_where_they_are() -> None:
    """Tokens before heads, heads before tokens, every second token, one token, one sample."""
    base = packed(2, 260, 2, 40)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in base]
    for q, k, v in (
        base, turned, [x[:, ::2] for x in base], [x[:1] for x in base],
        (base[0][:, :1], *base[1:]), [x[:, :, :1] for x in base],
    ):  # fmt: skip
        with cuda("shuffled"), on_hopper():
            found = attention(q, k, v)
        expected = attention(*(x.float() for x in (q, k, v)))
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=4e-3)


def test_bits_do_not_depend_on_the_batch_or_the_run() -> None:
    for length, keys, d in ((150, 300, 40), (70, 200, 160)):
        q = torch.randn(3, length, 2, d, device=cases.device_of("cuda")).half()
        k, v = torch.randn(2, 3, keys, 2, d, device=q.device).half()
        with cuda("shuffled"), on_hopper():
            together = attention(q, k, v)
        with cuda("shuffled again"), on_hopper():
            assert torch.equal(attention(q, k, v), together)
            for i in range(3):
                alone = attention(*(t[i : i + 1] for t in (q, k, v)))
                assert torch.equal(together[i : i + 1], alone)


def kernels_of(*tensors: Tensor, **options: Tensor) -> str:
    with cuda(), watched(start=False) as seen:
        attention(*tensors, **options)
    return seen[0].kernel


def test_which_calls_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = packed(2, 20, 2, 40)
    assert "attention_hopper" in kernels_of(q, k, v)
    hidden = torch.ones(20, 20, dtype=torch.bool, device=q.device)
    assert "attention_streaming" in kernels_of(q, k, v, mask=hidden)
    assert "attention_streaming" in kernels_of(q, k, v, extra_k=k, extra_v=v)
    shared = k[:, :1].expand_as(k)  # TMA needs strides above 0
    assert "attention_streaming" in kernels_of(q, shared, v)
    monkeypatch.setattr(attention_cuda, "HOPPER_FROM", 21)
    assert "attention_streaming" in kernels_of(q, k, v)
    monkeypatch.setattr(attention_cuda, "HOPPER_FROM", -1)
    assert "attention_streaming" in kernels_of(q, k, v)
    monkeypatch.setattr(attention_cuda, "HOPPER_FROM", 1)
    monkeypatch.setattr(attention_cuda, "ON_CHIP", 160)
    assert "attention_context" in kernels_of(q, k, v)


# What each part is good for

MUTATIONS = {
    "keys are not waited for": ("    wait_for(tile, 0);\n", ""),
    "values are not waited for": ("    wait_for(tile - 1, 1);\n", ""),
    "queries are not waited for": ("  barrier_wait(barriers.queries, 0);\n", ""),
    "the first phase of an empty tile": ("barriers.parity(tile) ^ 1", "barriers.parity(tile)"),
    "a tile is filled before it is empty": ("barriers.parity(tile) ^ 1", "1"),
    "keys are let go of before the product": (
        "    products_wait<1>();\n    done_with(tile, 0);\n",
        "    done_with(tile, 0);\n    products_wait<1>();\n",
    ),
    "values are let go of before the product": (
        "    products_wait<0>();\n    done_with(tile - 1, 1);\n",
        "    done_with(tile - 1, 1);\n    products_wait<0>();\n",
    ),
    "scores are read before the product": ("    products_wait<1>();\n", ""),
    "weights change under the product": (
        "    products_wait<0>();\n    done_with(tile - 1, 1);\n    halve_tile();\n",
        "    halve_tile();\n    products_wait<0>();\n    done_with(tile - 1, 1);\n",
    ),
    "registers are not fenced": ("    products_begin();\n    start_scores", "    start_scores"),
    "fewer bytes are announced": ("Plan::kBoxes * Plan::kTile);\n    uns", "128);\n    uns"),
    "the output overwrites queries in use": ("  named_sync(3 + consumer, kWarpgroup);", "  //"),
    "a consumer passes its turn once too often": (
        "if (consumer == 0 || tile + 1 < tiles) named_arrive", "named_arrive"
    ),
    "groups of rows lie elsewhere": ("uint64_t(1024 >> 4) << 32", "uint64_t(512 >> 4) << 32"),
    "another swizzle": ("uint64_t{1} << 62", "uint64_t{2} << 62"),
}  # fmt: skip
SOURCES = cuda_host.ROOT / "csrc"


@pytest.fixture(scope="module")
def unchanged_parts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Objects of the emulation itself."""
    folder = tmp_path_factory.mktemp("emulation")
    return [
        compiled(cuda_host.HERE / f"{name}.cpp", folder / f"{name}.o", "-c")
        for name in ("emulation", "hopper", "cuda_api")
    ]


def compiled(source: Path, target: Path, *more: str, first: Path | None = None) -> str:
    folders = [*([first] if first else []), SOURCES / "cuda", SOURCES / "common", cuda_host.HERE]
    command = [cuda_host.COMPILER, *cuda_host.FLAGS.split(), "-O0", "-DFASTDIFF_EMULATE_CUDA"]
    command += [*(f"-I{folder}" for folder in folders), *more, "-o", str(target)]
    done = subprocess.run(
        [*command, "-x", "c++", str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return str(target)


def attempt(library: ctypes.CDLL, order: str) -> str:
    """The fault of the kernel with 150 queries and 600 keys, or its error; empty if it is right."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, rows, 1, 40).half() for rows in (150, 600, 600))
    out, lse = torch.full_like(q, torch.nan), torch.zeros(150)
    kind, seed = cuda_host.ORDERS[order]
    library.emulation_set_order(kind, ctypes.c_uint64(seed))
    library.hopper_probe.restype = ctypes.c_char_p
    numbers = [ctypes.c_int64(n) for n in (1, 150, 600, 1)]
    fault = library.hopper_probe(
        *(ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, out, lse)), *numbers
    )
    if fault is not None:
        return str(fault.decode())
    expected = torch.softmax(
        (q * 0.2 * 0.6931471805599453)[0, :, 0].double() @ k[0, :, 0].double().mT, -1
    )
    wrong = (out[0, :, 0].double() - expected @ v[0, :, 0].double()).abs().max().item()
    return "" if wrong < 4e-3 else f"an error of {wrong}"


@pytest.mark.slow
@cuda_host.needs_compiler
@pytest.mark.parametrize("name", ["nothing", *MUTATIONS])
def test_without_one_of_its_parts_it_fails_in_some_order(
    name: str, unchanged_parts: list[str], tmp_path: Path
) -> None:
    old, new = MUTATIONS.get(name, ("nothing to replace", ""))
    names = ("attention_hopper.cuh", "hopper.cuh", "tensor_map.h")  # the last includes the second
    headers = [SOURCES / "cuda" / name for name in names]
    texts = {header.name: header.read_text() for header in headers}
    places = sum(text.count(old) for text in texts.values())
    assert places == (name != "nothing"), "the kernel has changed: mend the list"
    for header, text in texts.items():
        (tmp_path / header).write_text(text.replace(old, new))
    probe = compiled(cuda_host.HERE / "hopper_probe.cu", tmp_path / "probe.o", "-c", first=tmp_path)
    command = [cuda_host.COMPILER, "-shared", probe, *unchanged_parts, "-o", f"{tmp_path}/probe.so"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(f"{tmp_path}/probe.so")
    found = {order: attempt(library, order) for order in cuda_host.ORDERS}
    assert any(found.values()) == (name != "nothing"), found


@pytest.mark.slow
def test_the_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """wgmma of exactly W columns, TMA, and no product that waits for the one before it."""
    compiled, functions = machine_code("attention_hopper.cu", "sm_90a", monkeypatch)
    log = Path(f"{compiled}.log").read_text()
    assert "attention_hopper" in log
    assert "C75" not in log  # ptxas: "wgmma.mma_async instructions are serialized"
    assert len(functions) == 2 * len(EXACT)
    for function in functions:
        name = function.splitlines()[0]
        (width,) = (w for w in EXACT if f"Li{w}E" in name)
        for word in (f"HGMMA.64x{width}x16.F32", "UTMALDG.4D", "USETMAXREG", "SYNCS"):
            assert word in function, (name, word)
        assert "LDL" not in function, name  # no local memory
