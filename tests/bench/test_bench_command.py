"""`fastdiff bench` as a user runs it: tables, files, the page, a kernel of one's own, mistakes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fastdiff.bench import plan, result
from fastdiff.bench.contest import UserKernel
from fastdiff.bench.page import answer
from fastdiff.bench.plan import PRESETS, Plan, op_cases
from fastdiff.bench.user import benchmark
from fastdiff.cli import main
from fastdiff.images import read_image

KERNEL = """
import torch
import torch.nn.functional as F

def mine(x, groups, weight, bias):
    return F.silu(F.group_norm(x, groups, weight, bias))

def wrong(x, groups, weight, bias):
    return torch.zeros_like(x)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with the fewest rounds."""
    monkeypatch.setattr(plan, "ROW_S", {True: 0.0, False: 0.0})
    monkeypatch.setattr(plan, "STEP_S", {True: 0.0, False: 0.0})


@pytest.fixture
def kernels_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine_for_tests.py"
    path.write_text(KERNEL)
    return path


def test_ops_and_a_network_as_table_json_and_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = [
        "bench",
        "--quick",
        "--preset",
        "digits",
        "--part",
        "ops",
        "networks",
        "--device",
        "cpu",
    ]
    files = ["--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]
    assert main([*words, *files, "--repeat", "0"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    found = result.load(tmp_path / "a.json")
    assert {row.kind for row in found.rows} == {"op", "step"}
    ops = {row.name for row in found.rows if row.kind == "op"}
    assert ops == {"group_norm_silu", "add_group_norm_silu", "attention"}
    for row in found.rows:
        assert row["eager"].median_s
        for entry in row.ours:
            assert f"{entry.ratio.value:.2f} x" in out
    (step,) = [row for row in found.rows if row.kind == "step"]
    assert {e.provider for e in step.entries} == {
        "fastdiff", "eager", "eager channels_last", "without our ops", "without prepared layers",
    }  # fmt: skip
    page = (tmp_path / "a.html").read_text()
    assert_self_contained(page)
    assert page.count("<svg") == 4
    for line in answer(found):
        assert line.split("(")[0][:40] in page


class Links(HTMLParser):
    """What a page would load, and its tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        for name in ("src", "href", "xlink:href"):
            value = values.get(name)
            if value and not value.startswith("#") and tag != "a":
                self.loads.append(value)


def assert_self_contained(page: str) -> None:
    links = Links()
    links.feed(page)
    assert links.loads == []
    assert "url(http" not in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_opens_in_a_browser(tmp_path: Path) -> None:
    from fastdiff.bench import page

    found = plan.measure(Plan(quick=True, ops=("group_norm_silu",), presets=("digits",)))
    page.write(found, tmp_path / "a.html")
    assert "All measurements" in in_browser(tmp_path, "--dump-dom")
    screenshot = tmp_path / "a.png"
    in_browser(tmp_path, f"--screenshot={screenshot}", "--window-size=1100,1600")
    pixels = read_image(screenshot)
    assert pixels.shape[1:] == (1600, 1100)
    assert len(pixels.flatten(1).unique(dim=1).T) > 100  # text and pictures, not an empty page


def in_browser(folder: Path, *options: str) -> str:
    """What headless Chromium prints for a.html."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", *options]
    done = subprocess.run(
        [*command, str(folder / "a.html")], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_a_kernel_of_ones_own(
    kernels_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["bench", "--quick", "--op", "group_norm_silu", "--preset", "digits"]
    assert main([*words, "--kernel", f"{kernels_file}:mine"]) == 0
    out = capsys.readouterr().out
    (line, *_) = [line for line in out.splitlines() if "mine" in line and "x " in line]
    assert re.search(r"[\d.]+ x (unsure|equal|faster|slower) .*of copy +error 1\.0", line), line
    monkeypatch.chdir(kernels_file.parent)
    assert main([*words, "--kernel", f"{kernels_file.stem}:wrong", "--shape", "1,64,8,8"]) == 0
    out = capsys.readouterr().out
    assert "refused: it returns zeros" in out
    assert "Refused: group_norm_silu (1, 64, 8, 8)" in out


def test_the_decorator(kernels_file: Path) -> None:
    @benchmark(op="geglu")
    def mine(x: torch.Tensor) -> torch.Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * torch.nn.functional.gelu(gate)

    found = mine.bench(quick=True, shape=(1, 16, 64))  # type: ignore[attr-defined]
    (row,) = found.rows
    name = f"{__name__}:mine"
    assert row[name].error == pytest.approx(1.0)
    assert mine(torch.zeros(1, 4)).shape == (1, 2)
    with pytest.raises(ValueError, match="unknown op 'sampler_step' for a kernel"):
        benchmark(op="sampler_step")


def test_compare_exits_with_1_after_a_slow_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.bench.test_changes import run

    result.save(run(0), tmp_path / "before.json")
    result.save(run(1, {"geglu": 1.2}), tmp_path / "after.json")
    result.save(run(2, spread=0.2), tmp_path / "noisy.json")
    before, after, noisy = (str(tmp_path / f"{n}.json") for n in ("before", "after", "noisy"))
    assert main(["bench", "--compare", before, after]) == 1
    out = capsys.readouterr().out
    assert out.startswith("slower: geglu a (2, 8) cpu, 0.8")
    assert "3 compared: 1 slower, 0 faster, 2 without a change of 10%, 0 cannot tell" in out
    assert main(["bench", "--compare", before, before]) == 0
    assert "cannot tell: " not in capsys.readouterr().out
    assert main(["bench", "--compare", before, noisy]) == 0
    assert re.search(r"the noise hides a change of 10%.* --repeat \d\d+", capsys.readouterr().out)


def test_json_contains_what_compare_needs(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    words = ["bench", "--quick", "--op", "geglu", "--shape", "1,16,64", "--json", str(path)]
    assert main([*words, "--repeat", "1"]) == 0
    found = result.load(path)
    assert {(one.provider, one.clock) for one in found.repeats} == {
        ("cpu", "time"), ("cpu", "CPU time"),
    }  # fmt: skip
    assert {one.key for one in found.repeats} == {row.key for row in found.rows}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "gelu"], "unknown op 'gelu'; did you mean geglu?"),
        (["--preset", "sd1"], "unknown preset 'sd1'"),
        (["--part", "op"], "unknown part 'op'"),
        (["--shape", "1,2"], "--shape needs one --op"),
        (["--shape", "a,b", "--op", "geglu"], "--shape must be positive numbers"),
        (["--shape", "8", "--op", "group_norm_silu"], "does not fit x of group_norm_silu"),
        (["--shape", "1,33,8,8", "--op", "group_norm_silu"], "does not fit x of group_norm_silu"),
        (["--kernel", "nothing"], "--kernel must be module:function"),
        (["--kernel", "no_such_module:f", "--op", "geglu"], "No module named 'no_such_module'"),
        (["--kernel", "no_such_file.py:f", "--op", "geglu"], "no_such_file.py does not exist"),
        (["--kernel", "json:dumps"], "--op says which op json:dumps computes"),
        (["--kernel", "json:dump_all", "--op", "geglu"], "unknown function 'dump_all' in json"),
        (["--minutes", "0"], "--minutes must be positive"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--size", "12"], "--size must be a multiple of 8"),
        (["--repeat", "-1"], "--repeat must be at least 0"),
        (["--against", "nothing"], "--against must be a checkout of fastdiff"),
        (["--against", sys.executable, "--repeat", "2"], "--against needs --repeat 5 or more"),
        (["--compare", "a.json", "b.json"], "No such file or directory: a.json"),
        (["--op", "geglu", "--preset", "digits"], "geglu is not called by digits"),
    ],
)
def test_mistakes(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--quick", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_quick_run_takes_the_largest_call_of_each_op_that_a_cpu_does_in_time() -> None:
    cases = [case for case, _ in op_cases(Plan(quick=True))]
    assert len({(case.subject.op, case.job_name) for case in cases}) == len(cases)
    assert not any(plan.heavy(case) for case in cases)
    assert {case.job_name for case in cases} == {"digits", "sd15"}
    every = [case for case, _ in op_cases(Plan(presets=("sd15",)))]
    calls = PRESETS["sd15"].collect()
    assert len(every) == sum(call.op != "gather_rows" for call in calls)
    assert {case.call.op for case in every[: len({c.op for c in calls})]} == {c.op for c in calls}


def test_a_time_limit_names_what_is_left_out() -> None:
    found = plan.measure(Plan(quick=True, presets=("digits",), minutes=1e-9))
    assert not found.rows
    assert len(found.left_out) > 3


def test_a_kernel_gets_only_calls_that_its_signature_takes() -> None:
    op = "add_group_norm_silu"
    asked = Plan(ops=(op,), presets=("adm256",))
    every = {case.call.options for case, _ in op_cases(asked)}
    assert any("scale_shift" in dict(options) for options in every)

    def kernel(x: object, groups: int, weight: object, bias: object, *, residual: object) -> None:
        raise NotImplementedError

    mine = UserKernel(name="mine:kernel", op=op, function=kernel)
    found = {case.call.options for case, _ in op_cases(asked, mine)}
    assert found
    assert all(dict(options).keys() <= {"residual"} for options in found)


def test_runs_are_json_that_others_can_read(tmp_path: Path) -> None:
    found = plan.measure(Plan(quick=True, ops=("group_norm_silu",), presets=("digits",)))
    result.save(found, tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["rows"][0]["entries"][0]["provider"] == "eager"
    assert content["environment"]["threads"] == torch.get_num_threads()
