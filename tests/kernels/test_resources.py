"""Every kernel in every shipped config, compiled ahead of time for GPUs this machine lacks."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.resources import ahead_of_time
from benchmarks.resources import record as resources_record
from benchmarks.resources import table as resources
from fastdiff.bench.tunables import TUNABLES
from fastdiff.kernels import triton as _triton
from fastdiff.kernels.attention import triton_forward
from fastdiff.kernels.tuning import configs

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
PRODUCTS = (
    "attention",
    "attention_backward_keys",
    "attention_backward_queries",
    "attention_context",
    *("cat_linear", "linear_add", "linear_geglu"),
)
"""Tunables whose kernels multiply tiles; all others are bound by memory."""

WRITING = ("philox_normal",)
"""Tunables that read nothing but a seed per image."""

pytestmark = pytest.mark.skipif(_triton.triton is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The kernels bound by memory, at the sizes of real models, and the kernels with products in a
    class of many pieces. Each config is compiled for one of the GPUs that use it; the record has
    the resources on all GPUs."""
    moving = ("--op", *(name for name in TUNABLES if name not in PRODUCTS))
    products = ("--op", *PRODUCTS, "--shape-class", "self/80", "80/80", "fp32/64", "small")
    some = (moving, (*moving, "--dtype", "float16"), products)
    return [row for options in some for row in compiled("--once", *options)]


def compiled(*options: str) -> list[dict[str, Any]]:
    return json.loads(run("--json", *options))


def run(*options: str, returns: int = 0) -> str:
    """`python -m benchmarks.resources`, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.resources", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == returns, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout


def failing(rows: list[dict[str, Any]], fails: Callable[[dict[str, Any]], bool]) -> list[str]:
    return [str(row) for row in rows if fails(row)]


def test_every_tunable_is_compiled_for_every_architecture(rows: list[dict[str, Any]]) -> None:
    assert {r["tunable"] for r in rows} == set(TUNABLES)
    assert {r["architecture"] for r in rows} == set(ARCHITECTURES)
    known = {tuple(key.split("/")[:3:2]) for key in resources_record.read_record().taken}
    assert known == {(chip, name) for name in TUNABLES for chip in ARCHITECTURES}


def test_every_dtype_is_compiled(rows: list[dict[str, Any]]) -> None:
    for name, tunable in TUNABLES.items():
        known = {str(dtype).removeprefix("torch.") for dtype in tunable.dtypes}
        missing = known - {r["dtype"] for r in rows if r["tunable"] == name}
        assert missing <= ({"float16"} if name in PRODUCTS else set()), name


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert not failing(rows, lambda r: r["spills"] > 0)


def test_shared_memory_fits(rows: list[dict[str, Any]]) -> None:
    assert not failing(rows, lambda r: r["shared"] > r["shared_limit"])


def test_products_of_half_precision_run_on_the_matrix_unit(rows: list[dict[str, Any]]) -> None:
    half = [r for r in rows if r["dots"] and r["dtype"] != "float32"]
    assert not failing(half, lambda r: not r["matrix"])
    assert {r["tunable"].removesuffix("_backward") for r in half} <= set(PRODUCTS)


def test_products_in_fp16_neither_spill_nor_leave_the_matrix_unit() -> None:
    known = resources_record.read_record()
    half = {key: row for key, row in known.taken.items() if "/float16/" in key}
    have = {tuple(key.split("/")[:3:2]) for key in half}
    assert have >= {(chip, name) for name in PRODUCTS for chip in ARCHITECTURES}
    assert resources_record.faults(replace(known, taken=half)) == []


def launched(name: str, dtype: torch.dtype) -> list[_triton.Launch]:
    """The launches that `--every` compiles for a tunable."""
    calls_of = TUNABLES[name].all_calls
    assert calls_of is not None
    with _triton.recording_launches("sm_90") as launches:
        for shape_class, known in TUNABLES[name].pairs():
            for call in calls_of(shape_class, dtype, "meta") if known == dtype else []:
                call()
    return launches


def test_every_compiles_every_head_dim() -> None:
    """All head dims that the kernels support, including those that share a config."""
    for name in ("attention", "attention_backward_keys", "attention_backward_queries"):
        for dtype in _triton.DTYPES:
            dims = {launch.arguments["D"] for launch in launched(name, dtype)}
            assert dims == {*range(8, 257, 8), 512}, (name, dtype)
    kept = [x for x in launched("attention_context", torch.bfloat16) if "programs" in x.arguments]
    assert {x.arguments["D"] for x in kept} == {*range(8, 161, 8)}
    keys = {(x.arguments["D"], x.arguments["keys"]) for x in kept}
    assert {(40, 77), (64, 144), (64, 288)} <= keys


def test_norm_and_pointwise_kernels_load_16_bytes(rows: list[dict[str, Any]]) -> None:
    others = (*PRODUCTS, *WRITING)
    moving = [r for r in rows if r["tunable"].removesuffix("_backward") not in others]
    # it reads the sums of a sample's tiles, a few kB
    moving = [r for r in moving if r["kernel"] != "_log_prob_kernel"]
    assert not failing(moving, lambda r: r["widest_load"] < 16)


def test_no_kernel_computes_in_double_precision(rows: list[dict[str, Any]]) -> None:
    # except the fp32 sum of dout * out, subtracted from dP, where digits cancel, and the
    # last sum of a log-probability, a few numbers per sample
    exact = [
        r
        for r in rows
        if (r["kernel"], r["dtype"]) == ("_row_sums_kernel", "float32")
        or r["kernel"] == "_log_prob_kernel"
    ]
    assert {r["kernel"] for r in exact} == {"_row_sums_kernel", "_log_prob_kernel"}
    assert not failing([r for r in rows if r not in exact], lambda r: r["doubles"] > 0)


def test_the_noise_is_computed_without_approximations(rows: list[dict[str, Any]]) -> None:
    """The hardware's lg2, sin and cos are not accurate to 2 ulp. sampler_step has a single exp, of
    the learned variance, which multiplies the noise."""
    noise = [r for r in rows if r["tunable"] == "philox_normal"]
    assert noise
    assert not failing(noise, lambda r: r["approximations"])
    steps = [r for r in rows if r["tunable"] == "sampler_step"]
    assert not failing(steps, lambda r: r["approximations"] not in ("", "ex2.approx"))
    plain = [r for r in steps if not r["constants"].get("LEARNED")]
    assert plain
    assert not failing(plain, lambda r: r["approximations"])


def test_the_document_matches_the_record() -> None:
    """Its head, which identifies the kernels in the tables, is generated from the record. A later
    test checks that the record matches the kernels."""
    head = "\n".join(resources.summary(resources_record.read_record())) + "\n"
    text = (ROOT / "docs" / "resources.md").read_text()
    assert text.startswith(head), f"run {resources_record.COMMAND}"
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) == set(TUNABLES)


def of_the_record(known: resources_record.Record) -> None:
    """Skip if the installed compiler is not that of the record, since its numbers would differ."""
    if known.triton != resources_record.triton_version():
        pytest.skip(f"the record was made with triton {known.triton}")


def test_the_record_is_of_the_pinned_triton() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    assert f"triton=={resources_record.read_record().triton}\n" in pins


def test_every_kernel_was_compiled_and_none_spills() -> None:
    """The record matches the current kernels and configs, for every head dim, and for every option
    at the head dims that name a class. After a change of a kernel or config, this test fails until
    everything affected has been compiled."""
    of_the_record(resources_record.read_record())
    assert run("--check") == "up to date\n"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])  # one of each compiler
def test_the_record_says_what_compilation_says(architecture: str) -> None:
    """Checked for the half-precision products that use the most registers."""
    known = resources_record.read_record()
    of_the_record(known)
    keys = resources_record.all_keys(PRODUCTS, ["float16", "bfloat16"], [architecture])
    key = max(keys, key=lambda key: (known.taken[str(key)].registers, key))
    which = ("--op", key.tunable, "--dtype", key.dtype, "--shape-class", key.shape_class)
    rows = compiled("--every", "--architecture", architecture, *which)
    found = [ahead_of_time.Resources(**row) for row in rows]
    expected = known.taken[str(key)]
    assert resources_record.most_of(expected.source, found) == expected, key


def taken(**changed: Any) -> resources_record.Taken:
    plain = {"kernels": 2, "registers": 90, "shared": 1024, "off_matrix": 0}
    return resources_record.Taken(
        **{"source": "0", **plain, "spilling": 0, "spills": 0, **changed}  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"spilling": 1, "spills": 8}, "8 bytes spilled"),
        ({"shared": 200 * 1024}, "the limit is 166912"),
        ({"off_matrix": 1}, "without matrix instructions"),
    ],
)
def test_faults_in_a_record_are_reported(changed: dict[str, int], message: str) -> None:
    key = "sm_80/bfloat16/attention/self/40"
    good = resources_record.Record(triton="3", taken={key: taken()})
    bad = resources_record.Record(triton="3", taken={key: taken(**changed)})
    assert resources_record.faults(good) == []
    (fault,) = resources_record.faults(bad)
    assert fault.startswith(key)
    assert message in fault


def test_a_record_is_written_as_it_is_read(tmp_path: Path) -> None:
    record = resources_record.Record(triton="3", taken={"sm_80/float16/geglu/rows": taken()})
    resources_record.write_record(record, tmp_path / "r.json")
    assert resources_record.read_record(tmp_path / "r.json") == record
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(ValueError, match=r"r\.json is not a valid record of res.*run python -m"):
        resources_record.read_record(tmp_path / "r.json")


def test_only_changes_of_code_need_a_compilation() -> None:
    """Comments and layout may change freely; a number, the control flow or a callee may not."""
    one = 'def f(x):\n    """Says."""\n    if x:\n        x = 1\n    return g(x)  # why\n'
    assert resources_record.plain(one) == resources_record.plain(
        'def f(x):\n    """Says\n    more."""\n\n    if x:\n        x = 1\n    return g(\n    x)\n'
    )
    for old, new in (("= 1", "= 2"), ("    return", "        return"), ("g(x)", "h(x)")):
        changed = one.replace(old, new)
        assert resources_record.plain(changed) != resources_record.plain(one), changed
    parts = resources_record.functions_of(triton_forward._forward_kernel)
    assert {part.partition(":")[0] for part in parts} >= {"_forward_kernel", "masked", "_begin"}


def test_every_file_of_configs_has_every_class() -> None:
    assert set(configs.architectures()) == set(ARCHITECTURES)
    for architecture in ARCHITECTURES:
        tuned = configs.read_tuned(configs.TUNED / f"{architecture}.json")
        for name, tunable in TUNABLES.items():
            for shape_class, dtype in tunable.pairs():
                assert tuned.find(name, dtype, shape_class), (architecture, name, shape_class)
        known = {
            f"{name}/{shape_class}"
            for name in TUNABLES
            for shape_class in TUNABLES[name].shape_classes
        }
        listed = {
            f"{name}/{key.partition('/')[2]}"
            for name, keys in tuned.configs.items()
            for key in keys
        }
        assert listed <= known, listed - known


def test_the_tables_fit_a_terminal_of_80_columns(rows: list[dict[str, Any]]) -> None:
    console = Console(width=80, file=io.StringIO())
    for table in resources.tables([ahead_of_time.Resources(**row) for row in rows]):
        console.print(table)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for row in rows:
        assert re.search(rf"^ {resources.kernel_name(row['kernel'])} ", text, re.MULTILINE)


def test_a_row_shows_the_variant_with_the_most_registers_and_joins_equal_ones() -> None:
    one = ahead_of_time.Resources(
        tunable="op",
        shape_class="small",
        dtype="bfloat16",
        architecture="sm_90",
        kernel="_op_kernel",
        config={"ROWS": 4, "num_warps": 8},
        constants={},
        num_warps=8,
        num_stages=2,
        registers=40,
        spills=0,
        shared=2048,
        shared_limit=232448,
        occupancy=0.75,
        dots=0,
        matrix="",
        widest_load=16,
        narrow_loads=0,
        approximations="",
        doubles=0,
    )
    other = replace(one, registers=64, shared=1024, occupancy=0.5)
    alike = [replace(row, shape_class="large") for row in (one, other)]
    differs = replace(one, dtype="float32", spills=8)
    same, spilled = resources.condensed([one, other, *alike, differs])
    assert (same.kernel, same.classes, same.dtypes) == ("op", "small, large", "bf16")
    assert same.cells == {"sm_90": ("ROWS 4, 8 warps", "64 / 2 / 50%")}
    assert spilled.cells == {"sm_90": ("ROWS 4, 8 warps", "40 / 2 / 75% / 8 B spilled")}
    text = resources.document([one, other, differs], resources_record.Record(triton="", taken={}))
    assert "| op | small | bf16 | 64 / 2 / 50% |" in text
