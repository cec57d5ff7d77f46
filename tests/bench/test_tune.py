"""The search for launch configs, with a fake clock, and the choice of a file for a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff import kernels
from fastdiff.bench import tune
from fastdiff.bench.clock import HostTimer, Method, Timing
from fastdiff.bench.tunables import TUNABLES, Tunable
from fastdiff.bench.tune import Case
from fastdiff.cli import main
from fastdiff.cli.tune import print_found
from fastdiff.kernels.triton import cdiv, jit, launch, tl
from fastdiff.kernels.tuning import Config, Gpu, configs, measured
from tests.kernels import cases

CPU = torch.device("cpu")
GPU = Gpu("Test GPU 9000", "sm_90")
CASE = Case(tunable="twice", shape_class="rows", dtype=torch.float32)
NOW: Config = {"BLOCK": 16, "FACTOR": 2, "num_warps": 4}
SECONDS = {16: 1.0, 32: 0.5, 64: 0.99, 128: 0.1, 256: 0.2, 512: 0.2, 1024: 0.3}
"""Times on the fake clock, by BLOCK. 64 gains too little; see `candidates` for the rest."""


@jit
def _twice_kernel(
    x: tl.tensor, y: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr, FACTOR: tl.constexpr
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < n).to(tl.float32)
    tl.store(y + at, (value * FACTOR).to(y.dtype.element_ty), at < n)


class OutOfResources(Exception):
    """Stands for triton's exception of this name."""


class CompilationError(Exception):
    """Stands for triton's exception of this name."""


def candidates(shape_class: str, dtype: torch.dtype) -> Iterator[Config]:
    yield NOW
    yield {**NOW, "BLOCK": 32}
    yield {**NOW, "BLOCK": 64}
    yield {**NOW, "BLOCK": 128, "FACTOR": 3}  # the fastest, and wrong
    yield {**NOW, "BLOCK": 256}  # does not fit
    yield {**NOW, "BLOCK": 512}  # does not compile


def twice(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    chosen = configs.config("twice", x, "rows")
    if chosen["BLOCK"] == 256:
        raise OutOfResources
    if chosen["BLOCK"] == 512:
        raise CompilationError
    if chosen["BLOCK"] == 1024:
        raise RuntimeError("an illegal memory access was encountered")
    launch(_twice_kernel, (cdiv(len(x), chosen["BLOCK"]),), x, y, len(x), **chosen)
    return y


def calls(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
    x = torch.empty(100, dtype=dtype, device=device)
    return [lambda: twice(x), lambda: 1 / 0]


def _tried() -> configs.Config:
    """The config that the search is currently trying."""
    (config,) = [c for (name, _), c in configs._overrides.items() if name == "twice"]
    return config


def clock(
    function: Callable[[], Any], *, method: Method = "events", budget_s: float = 0.2
) -> Timing:
    function()
    seconds = SECONDS[_tried()["BLOCK"]]
    return Timing.of(method, [seconds])


@pytest.fixture(autouse=True)
def _tunable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A tunable, with a config in a user cache that only this test uses."""
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    tunable = Tunable(name="twice", shape_classes=("rows",), candidates=candidates, calls=calls)
    monkeypatch.setitem(TUNABLES, "twice", tunable)
    write(GPU, {"twice": {"*/rows": NOW}})
    yield
    configs.forget_configs()


def write(gpu: Gpu, known: dict[str, dict[str, Config]], measured: Any = None) -> Path:
    path = tune.cache_file(gpu)
    path.parent.mkdir(exist_ok=True)
    path.write_text(tune.text_of(measured, known))
    configs.forget_configs()
    return path


def search(case: Case = CASE, **options: Any) -> tune.Found:
    return tune.search(case, gpu=GPU, device=CPU, timer=clock, **options)


# The search


@cases.needs_interpreter
def test_the_fastest_config_that_computes_the_same_wins() -> None:
    found = search()
    assert (found.before, found.before_s) == (NOW, 1.0)
    assert (found.after, found.after_s, found.gain) == ({**NOW, "BLOCK": 32}, 0.5, 2.0)
    assert (found.tried, found.left) == (5, 0)
    assert found.rejected == {
        "needs more than the GPU has": 1,
        "does not compile": 1,
        "gives different results": 1,
    }


@cases.needs_interpreter
def test_a_gain_within_the_noise_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECONDS, 32, 0.99)
    found = search()
    assert found.after == found.before == NOW
    assert found.after_s == found.before_s


@cases.needs_interpreter
def test_luck_does_not_win() -> None:
    """A candidate is fast once but slow when timed again."""
    seen: list[int] = []

    def lucky(
        function: Callable[[], Any], *, method: Method = "events", budget_s: float = 0.2
    ) -> Timing:
        timing = clock(function, method=method, budget_s=budget_s)
        seen.append(_tried()["BLOCK"])
        return timing if seen.count(seen[-1]) == 1 else Timing.of(method, [1.0])

    found = tune.search(CASE, gpu=GPU, device=CPU, timer=lucky)
    assert found.after == NOW
    assert found.rejected["no faster when timed again"] == 2  # BLOCK 32 and 128


@cases.needs_interpreter
def test_without_time_the_config_in_use_stays_and_the_rest_is_counted() -> None:
    found = search(budget_s=0.0)
    assert found.after == NOW
    assert (found.tried, found.left) == (0, 5)


@cases.needs_interpreter
def test_a_failure_that_no_config_explains_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [NOW, {**NOW, "BLOCK": 1024}]
    tunable = replace(TUNABLES["twice"], candidates=lambda *_: listed)
    monkeypatch.setitem(TUNABLES, "twice", tunable)
    with pytest.raises(RuntimeError, match=r"twice float32/rows, .*1024.*illegal memory access"):
        search()
    write(GPU, {"twice": {"*/rows": {**NOW, "BLOCK": 256}}})
    with pytest.raises(OutOfResources):  # the config in use must run
        search()


@cases.needs_interpreter
def test_small_work_is_timed_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    assert search().method == "events"
    for block, seconds in list(SECONDS.items()):
        monkeypatch.setitem(SECONDS, block, seconds * 1e-5)
    found = search()
    assert found.method == "graph"
    assert found.after["BLOCK"] == 32


def test_operands_are_random_and_the_same_each_time() -> None:
    before = torch.get_rng_state()
    (_, [one]), (_, [two]) = (tune._prepared(CASE, CPU) for _ in range(2))
    assert torch.equal(one, two)
    assert 0.5 < one.std() < 1.5
    assert torch.equal(torch.get_rng_state(), before)


def test_results_agree_up_to_rounding_only() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        a = torch.randn(1000, dtype=dtype)
        assert tune.agrees(a, a * (1 + torch.finfo(dtype).eps))
        assert not tune.agrees(a, a * 1.1)
        shifted = a.clone()
        shifted[3] += 1
        assert not tune.agrees(a, shifted)
        shifted[3] = torch.nan
        assert not tune.agrees(a, shifted)
        assert not tune.agrees(a, torch.zeros_like(a))
        assert not tune.agrees(a, a.double())
        assert not tune.agrees(a, a[:5])
    assert tune.agrees(torch.empty(0), torch.empty(0))
    assert not tune.agrees(torch.tensor([1]), torch.tensor([2]))


def test_one_large_number_does_not_hide_errors_everywhere() -> None:
    a = torch.ones(1000)
    a[0] = 100.0
    small = 0.5 * tune.TOLERANCE[torch.float32] * a.max()
    assert not tune.agrees(a, a + small)
    shifted = a.clone()
    shifted[0] += small
    assert tune.agrees(a, shifted)


def test_a_short_search_sees_candidates_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [{**NOW, "BLOCK": block} for block in range(50)]
    tunable = replace(TUNABLES["twice"], candidates=lambda *_: listed)
    monkeypatch.setitem(TUNABLES, "twice", tunable)
    ordered = tune.ordered_candidates(CASE, NOW)
    assert ordered == tune.ordered_candidates(CASE, NOW)
    assert len(ordered) == 49  # without the config in use
    assert {config["BLOCK"] // 25 for config in ordered[:8]} == {0, 1}
    assert ordered != [config for config in listed if config != NOW]


@cases.needs_interpreter
def test_a_real_tunable_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidates and launcher of GEGLU, on two rows instead of thousands."""
    real = TUNABLES["geglu"]

    def small(shape_class: str, dtype: torch.dtype, device: str) -> list[Callable[[], Any]]:
        from fastdiff.kernels.geglu.triton import forward

        x = torch.empty(2, 64, dtype=dtype, device=device)
        return [lambda: forward(x, False)]

    monkeypatch.setitem(TUNABLES, "geglu", replace(real, calls=small))
    for case in tune.cases(["geglu"]):
        found = tune.search(case, gpu=GPU, device=CPU, timer=HostTimer(rounds=1))
        assert found.tried == len(tune.ordered_candidates(case, found.before))
        assert set(found.rejected) <= {"no faster when timed again"}  # host times are noisy


def test_cases_match_the_selection() -> None:
    assert CASE in tune.cases()
    assert tune.cases(["twice"], [torch.float32]) == [CASE]
    assert all(case.shape_class == "rows" for case in tune.cases((), (), ["rows"]))
    with pytest.raises(ValueError, match=r"unknown op 'gelu'; expected one of .*geglu"):
        tune.cases(["gelu"])
    with pytest.raises(ValueError, match=r"unknown shape class 'columns'; expected one of .*rows"):
        tune.cases((), (), ["columns"])
    with pytest.raises(ValueError, match="nothing to tune"):
        tune.cases(["twice"], [torch.float64])


# Files


@cases.needs_interpreter
def test_results_are_saved_and_used_immediately(tmp_path: Path) -> None:
    path = tune.cache_file(GPU)
    assert path == tmp_path / "tuned" / "test-gpu-9000.json"
    measured = tune.facts(GPU)
    done: list[tuple[int, int]] = []
    todo = [CASE, replace(CASE, dtype=torch.bfloat16)]
    for found in tune.tune(
        todo,
        gpu=GPU,
        device=CPU,
        timer=clock,
        budget_s=100,
        report=lambda *numbers: done.append(numbers),
    ):
        tune.save([found], measured, path)
    assert done == [(0, 2), (1, 2), (2, 2)]
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left
    content = json.loads(path.read_text())
    assert content["measured"].pop("earlier", None) is None  # the old file was not measured
    assert set(content["measured"]) >= {"gpu", "date", "torch", "triton", "commit"}
    better = {**NOW, "BLOCK": 32}
    assert content["configs"]["twice"] == {
        "*/rows": NOW,
        "float32/rows": better,
        "bfloat16/rows": better,
    }
    assert configs.lookup("twice", GPU, torch.float32, "rows") == better
    assert configs.lookup("twice", GPU, torch.float16, "rows") == NOW
    assert configs.lookup("geglu", GPU, torch.float32, "rows")  # from the shipped file


@cases.needs_interpreter
def test_a_second_search_keeps_the_rest_and_says_when_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    first = replace(search(), case=replace(CASE, dtype=torch.float16))
    tune.save([first], {"gpu": "A", "date": "1"}, path)
    tune.save([search()], {"gpu": "A", "date": "2"}, path)
    tune.save([search()], {"gpu": "A", "date": "3"}, path)
    tuned = configs.read_tuned(path)
    assert set(tuned.configs["twice"]) == {"float16/rows", "float32/rows"}
    assert tuned.measured == {
        "gpu": "A",
        "date": "3",
        "earlier": [{"gpu": "A", "date": "1"}, {"gpu": "A", "date": "2"}],
    }
    tune.save([first, search()], {"gpu": "A", "date": "4"}, path)  # everything measured again
    assert configs.read_tuned(path).measured == {"gpu": "A", "date": "4"}


@cases.needs_interpreter
def test_configs_and_backends_keep_each_other(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    winners = {"geglu": {"bfloat16/cache": "cuda"}}
    tune.save_backends(winners, {"gpu": "A", "date": "1"}, path)
    assert configs.read_tuned(path).configs == {}
    tune.save([search()], {"gpu": "A", "date": "2"}, path)
    assert configs.read_tuned(path).backends == winners
    tune.save_backends({"geglu": {"bfloat16/memory": "triton"}}, {"gpu": "B"}, path)
    tuned = configs.read_tuned(path)
    assert tuned.backends["geglu"] == {"bfloat16/cache": "cuda", "bfloat16/memory": "triton"}
    assert set(tuned.configs) == {"twice"}
    assert tuned.measured is not None
    assert tuned.measured["gpu"] == "A"
    assert tuned.measured["backends"] == {"gpu": "B"}  # where the fastest backends were measured


def test_auto_prefers_the_fastest_backend_in_the_gpus_file() -> None:
    assert measured._fastest("geglu", GPU, "bfloat16/cache") is None
    winners = {"geglu": {"bfloat16/cache": "triton"}}
    tune.save_backends(winners, {"gpu": GPU.name, "date": "1"}, tune.cache_file(GPU))
    assert measured._fastest("geglu", GPU, "bfloat16/cache") == "triton"
    assert measured._fastest("geglu", GPU, "float16/cache") is None


def test_unmeasured_attention_prefers_larger_matrix_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hopper, ampere = Gpu("Some H", "sm_90"), Gpu("Some A", "sm_80")
    q = torch.empty(2, 4096, 8, 40, dtype=torch.bfloat16, device="meta")

    def first(op: str, gpu: Gpu, *args: torch.Tensor) -> str | None:
        for module in (measured, sys.modules["fastdiff.kernels.attention"]):
            monkeypatch.setattr(module, "gpu_of", lambda device: gpu)
        return kernels.OPS[op].first(args)

    assert first("attention", hopper, q, q, q) == "triton"
    assert first("attention", ampere, q, q, q) is None
    assert first("geglu", hopper, q) is None
    winners = {"attention": {"bfloat16/self/40": "cuda"}}
    tune.save_backends(winners, {"gpu": hopper.name, "date": "1"}, tune.cache_file(hopper))
    assert first("attention", hopper, q, q, q) == "cuda"


def test_a_broken_file_is_put_aside_and_not_deleted() -> None:
    path = tune.cache_file(GPU)
    assert tune.set_aside_broken(path) is None
    path.write_text('{"measured": null')
    configs.forget_configs()
    with pytest.raises(ValueError, match="delete it or run 'fastdiff tune' again"):
        configs.lookup("twice", GPU, torch.float32, "rows")
    aside = tune.set_aside_broken(path)
    assert aside is not None
    assert aside.read_text() == '{"measured": null'
    assert not path.exists()
    assert tune.set_aside_broken(path) is None
    assert configs.lookup("geglu", GPU, torch.float32, "rows")


def test_a_file_of_configs_is_written_as_it_is_read(tmp_path: Path) -> None:
    for shipped in sorted(configs.TUNED.glob("*.json")):
        content = json.loads(shipped.read_text())
        assert json.loads(tune.text_of(content["measured"], content["configs"])) == content


# The choice of a file for a GPU


@pytest.mark.parametrize(
    ("architecture", "nearest"),
    [
        ("sm_90", "sm_90"),
        ("sm_86", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_75", "sm_80"),
        ("gfx942", "gfx942"),
        ("gfx950", "gfx942"),
        ("gfx90a", "gfx942"),
    ],
)
def test_the_nearest_architecture_is_the_last_earlier_one_of_the_vendor(
    architecture: str, nearest: str
) -> None:
    assert configs.nearest_architecture(architecture) == nearest


def test_the_users_file_comes_before_the_gpus_before_the_architectures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    for name, block in (("sm_80", 1), ("sm_90", 2), ("test-gpu-9000", 3)):
        known = {"twice": {"*/rows": {"BLOCK": block}, f"*/{name}": {"BLOCK": block}}}
        (shipped / f"{name}.json").write_text(tune.text_of(None, known))
    monkeypatch.setattr(configs, "TUNED", shipped)

    def block(gpu: Gpu, shape_class: str = "rows") -> int:
        configs.forget_configs()
        return configs.lookup("twice", gpu, torch.float32, shape_class)["BLOCK"]

    assert block(GPU) == 16  # from the user's cache
    assert block(GPU, "test-gpu-9000") == 3  # the cache does not have this class
    assert block(GPU, "sm_90") == 2
    tune.cache_file(GPU).unlink()
    assert block(GPU) == 3
    assert block(Gpu("Another", "sm_90")) == 2
    assert block(Gpu("Another", "sm_89")) == 1
    with pytest.raises(LookupError, match=r"no launch config for twice, torch\.float32, sm_90"):
        block(Gpu("Another", "sm_80"), "sm_90")


def test_a_gpu_without_measured_configs_gets_a_notice() -> None:
    (line,) = tune.describe(Gpu("Other GPU", "sm_89"))
    assert line == (
        "no configs measured for this GPU: using those of sm_80, chosen without measurement; "
        "run 'fastdiff tune'"
    )
    facts = {"gpu": GPU.name, "date": "2026-01-02T03:04", "torch": "2.11", "triton": "3.6"}
    path = write(GPU, {"twice": {"*/rows": NOW}}, facts)
    assert tune.describe(GPU) == [
        f"1 tuned on Test GPU 9000, 2026-01-02, torch 2.11, triton 3.6: {path}"
    ]


def test_doctor_lists_shipped_configs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "launch configs of the Triton kernels" in out
    if not torch.cuda.is_available():
        assert "sm_90: chosen without measurement" in out or "sm_90: NVIDIA" in out


def test_doctor_lists_each_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastdiff.cli import doctor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpus = [GPU, Gpu("Other GPU", "sm_89")]
    monkeypatch.setattr(configs, "gpu_of", lambda device: gpus[device.index])
    write(GPU, {}).write_text("not json")
    configs.forget_configs()
    listed = doctor._configs()
    assert "is not a valid file of launch configs" in listed["cuda:0"][0]
    assert "using those of sm_80" in listed["cuda:1"][0]


# The command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    assert capsys.readouterr().err == (
        "fastdiff: tuning needs a GPU, but torch finds none on this machine\n"
    )


@cases.needs_interpreter
def test_the_table_shows_before_after_gain_and_untried_candidates(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    print_found([search(), search(budget_s=0.0)])
    out = capsys.readouterr().out
    assert "BLOCK 16, FACTOR 2, warps 4" in out
    assert "BLOCK 32, FACTOR 2, warps 4" in out
    assert "2.00 x" in out
    assert "5 of 5" in out
    assert "0 of 5" in out
    assert "1 does not compile" in out
    assert "5 not tried (use a larger --budget-minutes)" in out
