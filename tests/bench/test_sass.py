"""Machine code is read correctly, and the kernels' counts stay within their limits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from fastdiff.bench import counts, disassembly, predict, sass
from fastdiff.bench.disassembly import NoToolError
from fastdiff.bench.record import ROOT
from tests.support.peers import import_diffusers

LOOP = """
	.section	.text.f,"ax",@progbits
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0020*/                   LDG.E.128.CONSTANT R8, [R2.64+0x10] ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/                   STG.E.128 [R20.64], R4 ;
        /*0050*/                   NOP ;
.L_x_2:
        /*0060*/                   FADD R1, R4, R8 ;
        /*0070*/              @!P0 LDG.E R12, [R2.64] ;
        /*0080*/                   ISETP.GE.AND P0, PT, R0, 0x4, PT ;
        /*0090*/              @!P0 BRA `(.L_x_1) ;
.L_x_3:
        /*00a0*/                   LDG.E.128.CONSTANT R4, [R2.64] ;
        /*00b0*/              @!P0 BRA `(.L_x_3) ;
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_1);
.L_x_5:
        /*00e0*/                   BRA `(.L_x_5);
"""
"""Two loads per iteration, a branch around a store, a copy of the loop for the last loads, and
behind the exit a way back into the loop."""
LIMITS = {
    ("GroupNorm+SiLU on chip", "CUDA"): 22,
    ("GroupNorm+SiLU in parts", "CUDA"): 26,
    ("GroupNorm+SiLU on chip, with a sum", "CUDA"): 22,
    ("GroupNorm+SiLU in parts, with a sum", "CUDA"): 26,
    ("GroupNorm+SiLU on chip", "Triton"): 22,
    ("GroupNorm+SiLU in parts", "Triton"): 26,
    ("GEGLU", "CUDA"): 37,
    ("GEGLU", "Triton"): 43,
    ("attention, d = 40", "CUDA"): 232,  # 200; one exponential in eight is a polynomial
    ("attention, d = 64", "CUDA"): 200,
    ("attention, d = 80", "CUDA"): 201,
    ("attention, d = 160", "CUDA"): 260,
    ("attention, d = 40, mma.sync", "CUDA"): 290,
    ("attention, d = 64, mma.sync", "CUDA"): 310,
    ("attention, d = 80, mma.sync", "CUDA"): 330,
    ("attention, d = 160, mma.sync", "CUDA"): 490,
    ("attention, d = 40", "Triton"): 320,  # 230
    ("attention, d = 64", "Triton"): 300,
    ("attention, d = 80", "Triton"): 350,
    ("attention, d = 160", "Triton"): 420,
    ("attention, d = 40, gradient of keys", "Triton"): 390,
    ("attention, d = 64, gradient of keys", "Triton"): 350,
    ("attention, d = 80, gradient of keys", "Triton"): 545,
    ("attention, d = 160, gradient of keys", "Triton"): 2010,
    ("attention, d = 40, gradient of queries", "Triton"): 330,
    ("attention, d = 64, gradient of queries", "Triton"): 305,
    ("attention, d = 80, gradient of queries", "Triton"): 465,
    ("attention, d = 160, gradient of queries", "Triton"): 1410,
}
"""Instructions per number, or per 64 keys. The comment is the aim that a kernel misses."""
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc", path="/usr/local/cuda/bin") is None and shutil.which("nvcc") is None,
    reason="nvcc is not installed",
)


def test_the_main_loop_is_the_one_with_the_most_work() -> None:
    code = disassembly.instructions(LOOP)
    assert [each.address for each in code] == [16 * i for i in range(15)]
    assert len(disassembly.loops(code)) == 2
    way = disassembly.main_loop(code, r"LDG.*\.128")
    assert (len(way.instructions), way.units) == (7, 2)  # past the store
    stores = disassembly.main_loop(code, "STG")
    assert (len(stores.instructions), stores.units) == (9, 1)
    with pytest.raises(ValueError, match="no loop contains 'MUFU'"):
        disassembly.main_loop(code, "MUFU")
    with pytest.raises(ValueError, match="no loop contains 'STG'"):
        disassembly.main_loop(code, "STG", avoid="NOP")


def test_a_kernel_ends_where_it_exits() -> None:
    way = disassembly.shortest_path(disassembly.instructions(LOOP), r"LDG.*\.128")
    assert way.units == 3
    assert [each.opcode for each in way.instructions][-1] == "EXIT"
    assert len(way.instructions) == 1 + 7 + 3


def test_loads_are_in_flight_until_one_is_used() -> None:
    code = disassembly.instructions(LOOP)
    assert disassembly.loads_in_flight(disassembly.main_loop(code, r"LDG.*\.128").instructions) == 2
    serial = [each for each in code if each.address in (0x10, 0x60, 0x20)]
    serial = [serial[0], serial[2], serial[1]]
    assert disassembly.loads_in_flight(serial) == 1


STRAIGHT = """
        /*0000*/              @!P0 BRA `(.L_x_1) ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   LDG.E.128 R8, [R2.64+0x10] ;
.L_x_1:
        /*0030*/               @P1 EXIT ;
        /*0040*/                   FADD R4, R4, R8 ;
        /*0050*/                   STG.E.128 [R20.64], R4 ;
        /*0060*/                   EXIT ;
"""
"""Loads, in a branch of their own, and the store of what they loaded."""


def test_a_kernel_without_a_loop_counts_its_loads_too() -> None:
    code = sass.Code(instructions=disassembly.instructions(STRAIGHT), registers=32)
    row = sass.straight("f", "CUDA", code)
    assert row.total == 7 / 8
    assert row.flight == 132 * 2048 * 2 * 16  # all threads that a multiprocessor holds, two loads


def test_residency() -> None:
    assert sass.resident(64, 256, 0) == 4  # 65,536 registers / (64 * 256)
    assert sass.resident(32, 256, 113 * 1024) == 2
    assert sass.resident(16, 64, 0) == 32


def test_without_nvcc_the_rows_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object) -> list[sass.Row]:
        return []

    def missing(*_: object) -> list[sass.Row]:
        raise NoToolError("nvcc was not found; install the CUDA toolkit")

    monkeypatch.setattr(sass, "triton_rows", nothing)
    monkeypatch.setattr(sass, "nvcc", missing)
    sass.cuda_code.cache_clear()
    sass.rows.cache_clear()
    found, why = sass.rows()
    assert found == []
    assert why == ["CUDA rows are left out: nvcc was not found; install the CUDA toolkit"]
    with pytest.raises(NoToolError, match="CUDA rows are left out"):
        sass.section()
    monkeypatch.setattr(sass, "triton_code", missing)  # as without nvdisasm
    _, (head, *sizes), _ = sass.counted()
    assert len(sizes) > 20
    assert all(cells[2:] == ("-",) * (len(head) - 2) for cells in sizes)
    sass.rows.cache_clear()


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """What the command counts, in a process without the interpreter of Triton."""
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff.bench.counts", "sass", "--json"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert not found["missing"]
    return found


@pytest.mark.slow
@needs_nvcc
def test_instructions_stay_within_their_limits(facts: dict[str, Any]) -> None:
    found = {(kernel, backend): total for kernel, backend, total, _ in facts["instructions"]}
    assert set(found) == set(LIMITS)
    assert not {key: total for key, total in found.items() if total > LIMITS[key]}


@pytest.mark.slow
@needs_nvcc
def test_an_evaluation_of_stable_diffusion_stays_within_its_launches() -> None:
    """Guided, 64 x 64, with the CUDA kernels of norms: ours, and accelerated diffusers."""
    import_diffusers("AutoencoderKL")
    ours, accelerated = sass.totals_with_cuda("SD 1.5 U-Net", sass.cuda_plan())
    assert ours <= 350
    assert accelerated <= 400


@needs_nvcc
def test_predictions_use_the_counts(facts: dict[str, Any]) -> None:
    """Those of the backend with the fewest instructions; another compiler may differ a little."""
    fewest: dict[str, float] = {}
    for kernel, _, total, _ in facts["instructions"]:
        fewest[kernel] = min(total, fewest.get(kernel, total))
    for kernel, instructions in predict.INSTRUCTIONS.items():
        assert instructions == pytest.approx(fewest[kernel], rel=0.03), kernel


@pytest.mark.slow
@needs_nvcc
def test_enough_loads_are_in_flight(facts: dict[str, Any]) -> None:
    found = {(row[0], row[1]): row[3] for row in facts["instructions"] if row[3] is not None}
    assert len(found) >= 4
    assert not {key: flight for key, flight in found.items() if flight < sass.FLIGHT}


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("backend", ["norms", "triton norms"])
def test_norms_fill_the_chip(facts: dict[str, Any], backend: str) -> None:
    assert len(facts[backend]) > 20
    for c, h, blocks, flight in facts[backend]:
        assert blocks >= sass.BLOCKS, (c, h)
        assert flight >= min(sass.FLIGHT, c * h * h * 2), (c, h)


@pytest.mark.slow
@needs_nvcc
def test_programs_that_share_a_sample_sum_in_the_same_order(facts: dict[str, Any]) -> None:
    """Else the bits of a sample would depend on its batch."""
    for start in range(0, len(facts["sums"]), 3):
        sums, of_two, of_four = (each for _, each in facts["sums"][start : start + 3])
        assert len(sums) >= 6
        assert sums == of_two == of_four


@pytest.mark.slow
@needs_nvcc
def test_the_page_equals_the_count(facts: dict[str, Any]) -> None:
    section = counts.sass_section()
    assert section
    if facts["versions"] not in section:
        pytest.skip(f"the page was made with other versions than {facts['versions']}")
    assert section == facts["section"], "run python -m fastdiff.bench.counts sass --docs"
