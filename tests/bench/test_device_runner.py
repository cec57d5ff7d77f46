"""The calls of `python -m benchmarks.device`: whatever happens to one stage, the others run, and
what was said and measured is kept. Real processes, without a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.device import command, records, runner, table, wheels
from benchmarks.device.table import CALL_SECONDS, STAGES, Plan, Result, Stage, groups_of, stages_of
from fastdiff.bench import clocks
from fastdiff.bench.record import Record
from tests.bench import stages
from tests.support.imports import ROOT


def stage(function: str, seconds: float = 20.0, **more: Any) -> Stage:
    name = more.pop("name", function)
    return Stage(
        name=name, does="", function=f"tests.bench.stages:{function}", seconds=seconds, **more
    )


@pytest.fixture
def stages_are(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces the table, and gives killed processes little time to write down their results."""
    monkeypatch.setattr(runner, "GRACE_S", 0.5)
    monkeypatch.setattr(runner, "EXIT_S", 0.5)

    def replace(*rows: Stage) -> list[str]:
        monkeypatch.setattr(table, "STAGES", {row.name: row for row in rows})
        return [row.name for row in rows]

    return replace


def plan(out: Path, **more: Any) -> Plan:
    return Plan(out=out, seconds=30.0, dry_run=False, commit="abc", **more)


def run(names: list[str], out: Path, seconds: float, **more: Any) -> dict[str, Any]:
    """The summary of a call, by stage."""
    code = runner.run_call(names, plan(out, **more), seconds, "call-1")
    found = json.loads((out / "call-1.json").read_text())
    by_name = {one["stage"]: one for one in found["stages"]}
    assert code == int(any(one["status"] not in table.GOOD for one in by_name.values()))
    return by_name


def exists(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_stages_that_hang_die_or_lose_their_context_do_not_stop_the_others(
    stages_are: Any, tmp_path: Path
) -> None:
    names = stages_are(
        stage("die"), stage("lose"), stage("abort"), stage("hang", 4.0), stage("stumble"),
        stage("fail"), stage("leave"), stage("warn"), stage("hang_at_exit"), stage("fine"),
    )  # fmt: skip
    found = run(names, tmp_path, sum(table.STAGES[name].seconds for name in names))
    assert list(found) == names
    assert {name: one["status"] for name, one in found.items()} == {
        "die": "killed",
        "lose": "lost context",
        "abort": "lost context",
        "hang": "timed out",
        "stumble": "failed",
        "fail": "failed",
        "leave": "left out",
        "warn": "ok",
        "hang_at_exit": "ok",
        "fine": "ok",
    }
    assert found["die"]["notes"] == [
        "killed by SIGKILL, not by its limit",
        "measured one",
    ]
    assert stages.CONTEXT in found["lose"]["notes"][0]
    assert stages.CONTEXT in found["abort"]["notes"][0]
    assert found["hang"]["notes"][1:] == ["half way"]
    assert found["fail"]["notes"] == ["a kernel is wrong", "and another"]
    assert "KeyError: 'a bug of ours'" in found["stumble"]["notes"]
    log = (tmp_path / "call-1.log").read_text()
    for line in ("die | measured one", "hang | half way", "fine | measured", "FutureWarning"):
        assert line in log
    assert records.parity_lines(tmp_path)[0]["case"] == "one"  # what it left when it was killed
    assert not exists(int((tmp_path / "child.txt").read_text()))


def test_a_process_that_cannot_be_killed_is_left_behind(
    stages_are: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that waits for a hung driver."""
    started: list[subprocess.Popen[str]] = []
    start = runner._started
    monkeypatch.setattr(runner, "KILL_S", 0.1)
    monkeypatch.setattr(runner, "_started", lambda *of: started.append(start(*of)) or started[-1])
    with monkeypatch.context() as unkillable:
        unkillable.setattr(runner.os, "killpg", lambda pid, number: None)
        names = stages_are(stage("hang", 3.0), stage("fine"))
        found = run(names, tmp_path, 23.0)
    os.killpg(started[0].pid, signal.SIGKILL)
    started[0].wait()
    assert found["hang"]["status"] == "timed out"
    assert found["hang"]["notes"][0] == "killed at its limit of 3 s, but it has not ended"
    assert found["fine"]["status"] == "ok"


def test_parts_are_processes_of_their_own(stages_are: Any, tmp_path: Path) -> None:
    (name,) = stages_are(stage("parts", 6.0, parts=("lose", "hang", "fine", "leave"), at_once=2))
    found = run([name], tmp_path, 6.0)[name]
    assert found["status"] == "lost context"
    assert found["notes"][0].startswith("lose: lost context: ")
    assert found["notes"][1].startswith("hang: timed out: killed at its limit of 6 s; half way")
    assert found["notes"][2].startswith("fine: fine within ")
    assert found["notes"][3:] == ["left out: leave: no tool"]
    (name,) = stages_are(stage("parts", 2.0, parts=("hang", "fine", "leave")))
    found = run([name], tmp_path, 2.0)[name]
    assert found["status"] == "timed out"
    assert "not started: fine, leave" in found["notes"]
    (name,) = stages_are(stage("parts", parts=("fine", "leave")))
    assert run([name], tmp_path, 20.0)[name]["status"] == "ok"
    (name,) = stages_are(stage("parts", parts=("leave",)))
    assert run([name], tmp_path, 20.0)[name]["status"] == "left out"


def test_stages_beside_each_other_run_at_the_same_time(stages_are: Any, tmp_path: Path) -> None:
    names = stages_are(
        stage("hang", 4.0), stage("fine"), stage("hang", 5.0, name="other", beside="hang")
    )
    assert groups_of(names) == [["hang", "other"], ["fine"]]
    start = time.monotonic()
    found = run(names, tmp_path, 25.0)
    assert time.monotonic() - start < 4 + 5  # one after the other
    assert {name: one["status"] for name, one in found.items()} == {
        "hang": "timed out",
        "other": "timed out",
        "fine": "ok",
    }


def test_too_little_time_shortens_and_then_skips_the_last_stages(
    stages_are: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    given = fake_runs(monkeypatch)
    names = stages_are(*(stage("fine", 10.0, name=name) for name in "abcd"))
    found = run(names, tmp_path, 25.0)
    assert [round(limit) for _, limit in given] == [10, 10, 5]
    assert {name: one["status"] for name, one in found.items()} == {
        **dict.fromkeys("abc", "ok"), "d": "skipped",
    }  # fmt: skip
    assert found["d"]["notes"] == ["0 s left, it needs 2; use a larger --minutes, or --only"]
    assert "d: skipped" in capsys.readouterr().out


def test_time_that_is_left_over_goes_to_later_stages(
    stages_are: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = fake_runs(monkeypatch, speed=0.5)
    names = stages_are(*(stage("fine", 10.0, name=name) for name in "abc"))
    run(names, tmp_path, 30.0)
    assert [round(limit, 1) for _, limit in given] == [10.0, 12.5, 18.8]


def fake_runs(monkeypatch: pytest.MonkeyPatch, speed: float = 1.0) -> list[tuple[str, float]]:
    """Replace the running of stages: each takes a share of its limit, by a clock of its own."""
    now, given = [0.0], list[tuple[str, float]]()

    def group(self: Any, of: list[Stage], plan: Plan, limit: float, work: Path) -> list[Result]:
        given.append((of[0].name, limit))
        now[0] += speed * limit
        return [Result(stage=one.name, status="ok", seconds=speed * limit) for one in of]

    monkeypatch.setattr(runner.Runner, "_group", group)
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    return given


STOPPED = """
import sys
from pathlib import Path
from benchmarks.device import command, table
from benchmarks.device.table import Stage
parts = ("fine", "hang", "leave")
one = Stage(name="one", does="", function="tests.bench.stages:parts", seconds=60, parts=parts)
table.STAGES = {"one": one, "later": one}
sys.exit(command.main(["--out", sys.argv[1], "--only", "one", "later"]))
"""


def test_a_call_that_is_stopped_kills_what_runs_and_keeps_what_it_has(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    log, child = tmp_path / "only.log", tmp_path / "child.txt"
    end = time.monotonic() + 60
    while not (log.exists() and "half way" in log.read_text()):
        assert time.monotonic() < end, process.communicate(timeout=1)
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130, out
    summary = json.loads((tmp_path / "only.json").read_text())
    (stopped,) = summary["stages"]
    assert stopped["status"] == "interrupted"
    assert stopped["notes"][0].startswith("hang: interrupted: the command was stopped; ")
    assert stopped["notes"][1] == "not started: leave"
    assert stopped["notes"][2].startswith("fine: fine within ")  # it had finished
    assert summary["not_run_yet"] == ["later"]
    assert not exists(int(child.read_text()))


def test_the_calls_fit_their_time() -> None:
    for call, most in CALL_SECONDS.items():
        groups = groups_of(stages_of(call))
        assert sum(max(STAGES[name].seconds for name in group) for group in groups) <= most
    assert (CALL_SECONDS[1], CALL_SECONDS[2]) == (480, 270)
    assert stages_of(1)[:4] == ["environment", "wheels", "build", "compile"]
    assert stages_of(1)[4:] == ["parity", "ops", "unet", "loop"]
    assert "inductor" not in stages_of(1)
    assert set(stages_of(2)) >= {"inductor", "sanitize", "tune"}
    assert groups_of(stages_of(1))[2] == ["build", "compile"]


def test_every_stage_has_a_function() -> None:
    from importlib import import_module

    for one in STAGES.values():
        module, _, name = one.function.partition(":")
        assert callable(getattr(import_module(module), name)), one.name


def test_calls_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[list[str], float, str]] = []

    def call(names: list[str], plan: Plan, seconds: float, name: str) -> int:
        ran.append((list(names), seconds, name))
        return int(name == "call-1")

    monkeypatch.setattr(command, "run_call", call)
    assert command.main(["--out", str(tmp_path)]) == 1
    assert [(seconds, name) for _, seconds, name in ran] == [(480, "call-1"), (270, "call-2")]
    assert command.main(["--call", "2", "--minutes", "3"]) == 0
    assert ran[-1] == (stages_of(2), 180, "call-2")
    assert command.main(["--only", "environment", "build", "bench"]) == 0
    assert ran[-1] == (["environment", "build", "bench"], 260, "only")


# The clocks


LINES = """\
345, 2619, 80.1, 33, 0x0000000000000001
1980, 3201, 600.5, 55, 0x0000000000000000
1755, 3201, 699.9, 61, 0x0000000000000024
[N/A], 3201, [N/A], 61, [N/A]
Failed to initialize NVML: Unknown Error
"""


def test_clocks_and_throttling_are_summarized() -> None:
    samples = [sample for line in LINES.splitlines() if (sample := clocks.parsed(line))]
    assert [sample.reasons for sample in samples] == [
        ("idle",), (), ("power cap", "thermal slowdown by software"), ("not reported",),
    ]  # fmt: skip
    found = clocks.summary(samples[:3])
    assert (found["samples"], found["busy"]) == (3, 2)
    assert found["sm_mhz"] == {"least": 1755.0, "median": 1867.5, "most": 1980.0}
    assert found["throttled"] == {"power cap": 1, "thermal slowdown by software": 1}
    assert (found["most_celsius"], found["most_watts"]) == (61.0, 699.9)
    assert clocks.summary([], "no such file") == {"samples": 0, "why": "no such file"}


def test_clocks_are_sampled_while_a_stage_runs_and_go_into_its_records(
    stages_are: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a program in place of nvidia-smi."""
    program = f"import sys, time\nwhile True:\n print({LINES.splitlines()[2]!r}, flush=True)"
    fake = (sys.executable, "-c", f"{program}\n time.sleep(0.02)")
    before = clocks.Clocks.__init__
    monkeypatch.setattr(
        clocks.Clocks, "__init__", lambda self, **options: before(self, **options, command=fake)
    )
    saved = tmp_path / "results/gpu/abc.json"
    saved.parent.mkdir(parents=True)
    saved.write_text(json.dumps({"environment": {"commit": "abc"}, "records": [], "shares": []}))
    records.set_facts(tmp_path, {"commit": "abc"})
    names = stages_are(stage("hang", 2.0))
    found = run(names, tmp_path, 2.0)["hang"]["clocks"]
    assert found["samples"] > 3
    assert found["throttled"]["power cap"] == found["samples"]
    assert json.loads(saved.read_text())["environment"]["clocks"]["hang"] == found
    assert records.facts(tmp_path)["clocks"]["hang"] == found
    records.set_facts(tmp_path, {"commit": "abc", "torch": "2.11"})  # the second call
    assert records.facts(tmp_path)["clocks"]["hang"] == found
    records.set_facts(tmp_path, {"commit": "def"})
    assert records.facts(tmp_path)["clocks"] == {}


def test_without_nvidia_smi_the_summary_says_why(tmp_path: Path) -> None:
    with clocks.Clocks(command=("/nonexistent/nvidia-smi",)) as watching:
        watching.begin()
        assert watching.end() == {
            "samples": 0,
            "why": "nvidia-smi does not run: No such file or directory",
        }
    complaint = (sys.executable, "-c", "print('Field \"x\" is not a valid field to query.')")
    with clocks.Clocks(command=complaint) as watching:
        end = time.monotonic() + 20
        while "not a valid field" not in watching.end()["why"]:
            assert time.monotonic() < end
            time.sleep(0.02)


# What is left


def record(provider: str, seconds: float) -> Record:
    return Record(
        benchmark="geglu", job="", shape="(1, 4)", provider=provider, dtype="bfloat16", threads=1,
        rounds=3, q1_s=seconds, median_s=seconds, q3_s=seconds, bytes=1, flops=0,
    )  # fmt: skip


def test_measurements_of_both_calls_are_merged(tmp_path: Path) -> None:
    for call, found in (("one", record("triton", 1.0)), ("two", record("compile", 2.0))):
        (tmp_path / call).mkdir()
        records.set_facts(
            tmp_path / call, {"commit": "c0ffee", "device": "Test GPU", "clean": True}
        )
        records.save(plan(tmp_path / call), [found])
        assert not list((tmp_path / call).glob(".*"))  # nothing unfinished
    folders = [tmp_path / "one", tmp_path / "two"]
    (path,) = records.collect(folders, tmp_path / "results")
    assert path == tmp_path / "results/test-gpu/abc.json"
    content = json.loads(path.read_text())
    assert [one["provider"] for one in content["records"]] == ["triton", "compile"]
    (tmp_path / "three").mkdir()
    with pytest.raises(ValueError, match="three contains no measurements"):
        records.collect([tmp_path / "three"], tmp_path / "results")


def test_parity_cases_that_did_not_run_are_counted(tmp_path: Path) -> None:
    add = records.add_parity
    add(tmp_path, pair="attention/cuda", planned=3)
    add(tmp_path, pair="attention/cuda", case="a", status="ok")
    add(tmp_path, pair="attention/cuda", case="b", status="lost context")
    add(tmp_path, pair="geglu/cuda", planned=1)
    add(tmp_path, pair="geglu/cuda", case="a", status="ok")
    with (tmp_path / "parity.jsonl").open("a") as file:
        file.write('{"pair": "geglu/cuda", "ca')  # killed while it wrote
    assert records.parity_counts(tmp_path, "parity") == [
        "4 cases: 2 ok, 1 lost context, 1 not run",
        "attention/cuda: 1 ok, 1 lost context, 1 not run",
    ]


# Wheels


def carried(folder: Path) -> Path:
    """A wheel with one module."""
    folder.mkdir()
    path = folder / "carried-1.0-py3-none-any.whl"
    info = "carried-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("carried.py", "WORD = 'carried here'\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_wheels_are_installed_offline_and_seen_by_later_stages(
    stages_are: Any, tmp_path: Path
) -> None:
    pytest.importorskip("pip")
    carried(tmp_path / "wheels")
    names = stages_are(STAGES["wheels"], stage("import_wheel"))
    found = run(names, tmp_path, 60.0, wheels=tmp_path / "wheels")
    assert found["wheels"]["notes"] == ["carried-1.0-py3-none-any.whl"]
    assert found["import_wheel"]["notes"] == ["carried here"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["wheels"]


def test_the_folder_of_wheels(tmp_path: Path) -> None:
    pins = wheels.pinned()
    assert [pin.partition("==")[0] for pin in pins] == list(wheels.NEEDED)
    old, new = (
        next(p for p in wheels.pinned(python=python) if p.startswith("diffusers=="))
        for python in ("3.10", "3.12")
    )
    assert old != new  # the pin depends on the version of Python
    with pytest.raises(ValueError, match="does not pin nonexistent"):
        wheels.pinned(["nonexistent"])
    with pytest.raises(ValueError, match=r"contains no wheels; fill it with: python -m bench"):
        wheels.install(tmp_path, tmp_path / "site")


def test_filling_the_folder_asks_pip_for_the_other_machines_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        wheels.subprocess, "run", lambda words, check: asked.extend(words) if check else None
    )
    assert wheels.main([str(tmp_path / "new"), "--python", "3.12"]) == 0
    place = asked.index("--python-version")
    assert asked[place + 1] == "3.12"
    assert {"download", "--no-deps", "--only-binary=:all:", *wheels.pinned()} <= set(asked)
    assert os.path.isdir(tmp_path / "new")
