"""gather_rows: exact on every backend, layouts, dtypes, bad indices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdiff import kernels
from fastdiff.kernels.gather_rows import cuda, gather_rows, triton
from tests.kernels import cases
from tests.support.imports import ROOT


def arguments(
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    samples: int = 3,
    channels: int = 4,
    more: int = 0,
    sides: tuple[int, ...] = (9, 7),
    rows: int = 5,
    width: int = 37,
) -> dict[str, Tensor]:
    def index(limit: int) -> Tensor:
        return torch.randint(limit, (rows,)).to(device)

    given = {
        "x": torch.randn(samples, channels, *sides).to(device),
        "samples": index(samples),
        "embeddings": torch.randn(11, width).to(device, dtype),
        "places": index(11),
    }
    if more:
        given["extra"] = torch.randn(samples, more, *sides).to(device)
    return given


def exact(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Row by row, in Python."""
    x, dtype = given["x"], given["embeddings"].dtype
    rows = [
        torch.cat([t[int(s)] for t in (x, given.get("extra", x[:, :0]))]).to(dtype)
        for s in given["samples"]
    ]
    emb = [given["embeddings"][int(place)] for place in given["places"]]
    return torch.stack(rows), torch.stack(emb)


SIZES = {
    "sd": {"sides": (64, 64), "rows": 2, "width": 1280, "samples": 1},
    "odd": {},
    "inpainting": {"more": 5, "sides": (8, 8)},
    "one-channel": {"channels": 1, "sides": (5, 3)},
    "many-channels": {"channels": 33, "more": 40, "sides": (2, 3)},
    "long": {"sides": (1500,), "channels": 3},
    "video": {"sides": (2, 3, 5), "more": 1},
    "points": {"sides": (), "channels": 2},
    "no-rows": {"rows": 0},
    "narrow": {"width": 1, "sides": (1, 1)},
}


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_rows_are_copied_and_rounded(backend: str, dtype: torch.dtype, size: str) -> None:
    given = arguments(cases.device_of(backend), dtype, **SIZES[size])  # type: ignore[arg-type]
    with kernels.backend(backend), kernels.record_backends() as served:
        inputs, emb = gather_rows(**given)
    assert served == {"gather_rows": {backend}}
    if size == "no-rows":
        assert inputs.shape == (0, 4, 9, 7)
        assert emb.shape == (0, 37)
        return
    rows, embeddings = exact(given)
    assert torch.equal(inputs, rows)
    assert torch.equal(emb, embeddings)
    layout = torch.channels_last if inputs.ndim == 4 else torch.contiguous_format
    assert inputs.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_any_strides(backend: str) -> None:
    given = arguments(cases.device_of(backend), torch.bfloat16, more=2)
    apart = {
        name: torch.stack([t, t], dim=-1)[..., 0] if t.ndim else t for name, t in given.items()
    }
    apart["x"] = given["x"].contiguous(memory_format=torch.channels_last)
    with kernels.backend(backend):
        found = gather_rows(**apart)
    for have, want in zip(found, exact(given), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
@pytest.mark.parametrize(("name", "bad"), [("samples", 3), ("samples", -1), ("places", 11)])
def test_an_index_out_of_range(backend: str, name: str, bad: int) -> None:
    """An error on the CPU; kernels of a GPU give NaN in that row and leave the others alone."""
    given = arguments(cases.device_of(backend), more=1)
    good = exact(given)
    given[name][1] = bad
    with kernels.backend(backend):
        if backend in ("cpu", "reference"):
            with pytest.raises(IndexError, match="for row 1" if backend == "cpu" else "range"):
                gather_rows(**given)
            return
        found = gather_rows(**given)
    broken = ("samples", "places").index(name)
    assert found[broken][1].isnan().all()
    for part, want in zip(found, good, strict=True):
        others = [0, 2, 3, 4] if part is found[broken] else range(5)
        assert torch.equal(part[list(others)], want[list(others)])


def test_a_network_in_fp64_gets_fp64() -> None:
    given = arguments("cpu", torch.float64)
    given["x"] = given["x"].double()
    inputs, emb = gather_rows(**given)
    assert (inputs.dtype, emb.dtype) == (torch.float64, torch.float64)
    assert torch.equal(inputs, exact(given)[0])
    given["x"] = given["x"].float()
    assert gather_rows(**given)[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 4, 9, 7).half()}, "x must be .* fp32, got torch.float16"),
        ({"x": torch.zeros(3)}, "x must be"),
        ({"samples": torch.zeros(5)}, "samples must be .* int64, got torch.float32"),
        ({"places": torch.zeros(4, dtype=torch.int64)}, "places must have shape"),
        ({"embeddings": torch.zeros(5)}, "embeddings must be"),
        ({"extra": torch.zeros(3, 2, 9, 8)}, "extra must have shape"),
        ({"extra": torch.zeros(3, 2, 9, 7).half()}, "extra must have the dtype of x"),
    ],
)
def test_bad_arguments(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"gather_rows: {message}"):
        gather_rows(**{**arguments("cpu"), **changes})


@pytest.mark.parametrize(
    ("backend", "largest", "too_large", "reason"),
    [
        # 65,535 tiles, of which one is of the embedding
        ("cuda", (4, 65_534 * 256), (4, 65_534 * 256 + 1), "65,535 tiles, got 65,536"),
        ("triton", (4, 65_534 * 256), (4, 65_534 * 256 + 1), "65,535 tiles, got 65,536"),
        ("triton", (1024, 65_534 * 16), (1024, 65_534 * 16 + 1), "65,535 tiles, got 65,536"),
        ("triton", (65_536, 1), (65_537, 1), "65,536 channels, got 65,537"),
    ],
)
def test_what_a_grid_or_a_tile_cannot_hold_is_left_to_others(
    backend: str, largest: tuple[int, int], too_large: tuple[int, int], reason: str
) -> None:
    def why_not(channels: int, space: int, width: int = 37) -> str | None:
        index = torch.zeros(1, dtype=torch.int64, device="meta")
        x = torch.zeros(1, channels, space, device="meta")
        embeddings = torch.zeros(1, width, device="meta")
        return module.why_not(x, index, embeddings, index, None)

    module = {"cuda": cuda, "triton": triton}[backend]
    assert why_not(*largest) is None
    assert f"at most {reason}" in str(why_not(*too_large))
    unit = {"cuda": cuda.THREADS, "triton": triton.NUMBERS}[backend]
    assert why_not(1, 1, 65_534 * unit) is None
    assert "at most 65,535 tiles, got 65,536" in str(why_not(1, 1, 65_534 * unit + 1))


def test_the_tile_of_the_cuda_kernel() -> None:
    source = (ROOT / "csrc/cuda/gather_rows.cuh").read_text()
    assert f"kGatherThreads = {cuda.THREADS};" in source


@pytest.mark.parametrize("backend", cases.ALL_BACKENDS)
def test_it_compiles_without_break(backend: str) -> None:
    given = arguments(cases.device_of(backend), more=1)
    torch._dynamo.reset()
    compiled = torch.compile(gather_rows, fullgraph=True, backend="aot_eager")
    with kernels.backend(backend), torch.no_grad():
        for have, want in zip(compiled(**given), exact(given), strict=True):
            assert torch.equal(have, want)
    torch.library.opcheck(
        kernels.OPS["gather_rows"].known, tuple(given.values()), test_utils=("test_schema",)
    )
