"""The stages of `python -m benchmarks.device`: what each does, its time, and the call it is in.

Nothing here imports torch, so that the process that watches over the stages survives whatever is
wrong with torch or the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CALL_SECONDS = {1: 8.0 * 60, 2: 4.5 * 60}
"""Call -> the longest it may take, from start to end."""
CHECKED = (
    *("attention", "group_norm_silu", "add_group_norm_silu", "cat_group_norm_silu"),
    "sampler_step",
    *("geglu", "layer_norm", "add_layer_norm", "ada_layer_norm", "gate_residual"),
    "gather_rows",
)
"""The ops whose parity is checked at the shapes of networks, the most important first."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of `STAGES`. Each stage, or each of its parts, runs in a process of its own."""

    name: str
    does: str
    """One line for --help."""
    function: str
    """``module:name``. Takes a `Plan`, returns notes."""
    seconds: float
    """Seconds it is allowed in a call that has enough."""
    calls: tuple[int, ...] = ()
    """The calls it is in; a stage in none runs if it is asked for with --only."""
    beside: str = ""
    """The stage that it runs at the same time as, if both are asked for."""
    parts: tuple[str, ...] = ("",)
    """Each runs in its own process, with its name in `Plan.part`."""
    at_once: int = 1
    """Most parts that run at the same time."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The arguments of a stage's process."""

    out: Path
    seconds: float
    """Seconds after which it should stop by itself; it is killed a little later."""
    dry_run: bool
    commit: str | None
    part: str = ""
    wheels: Path | None = None
    site: Path | None = None
    """The folder that the wheels are installed to; it is on the path of all processes."""


@dataclass(kw_only=True)
class Result:
    """The outcome of a stage."""

    stage: str
    status: str
    """One of `STATUSES`."""
    seconds: float
    allowed: float = 0.0
    """Seconds it was allowed."""
    notes: list[str] = field(default_factory=list)
    clocks: dict[str, object] = field(default_factory=dict)
    """A summary of the GPU's clocks meanwhile (clocks.py)."""


STATUSES = (
    "ok",
    "left out",  # it cannot run on this machine
    "skipped",  # there was no time left for it
    "timed out",  # it was killed at its limit
    "killed",  # by a signal from elsewhere
    "lost context",  # it lost its GPU context; the next process has a new one
    "failed",
    "interrupted",  # the whole command was stopped while it ran
)
"""The worse ones come last. A stage has the worst of its parts, or "ok" if none is bad and one is
ok."""
GOOD = ("ok", "left out")


class LeftOut(Exception):
    """A stage cannot run on this machine."""


class ContextLost(Exception):
    """The GPU context of this process is unusable from now on."""


class Failed(Exception):
    """A stage found something wrong; raised after it has done everything it could."""


PAIRS = tuple(
    f"{op}/{backend}"
    for op in CHECKED
    for backend in ("triton", "cuda", *(("library",) if op == "attention" else ()))
)
"""op/backend, each checked in a process of its own."""

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="environment",
            does="the GPU, its driver, its clocks, the versions",
            function="benchmarks.device.prepare:environment",
            seconds=10,
            calls=(1, 2),
        ),
        Stage(
            name="wheels",
            does="install the wheels of --wheels, offline",
            function="benchmarks.device.prepare:wheels",
            seconds=12,
            calls=(1, 2),
        ),
        Stage(
            name="build",
            does="the compiled module with the CUDA kernels, for this GPU only",
            function="benchmarks.device.prepare:build",
            seconds=100,
            calls=(1, 2),
        ),
        Stage(
            name="compile",
            does="Triton's kernels for the shapes of the networks, in several processes",
            function="benchmarks.device.measure:compile_triton",
            seconds=90,
            calls=(1, 2),
            beside="build",
        ),
        Stage(
            name="parity",
            does="every op at the shapes of networks against fp64, a process per (op, backend)",
            function="benchmarks.device.parity:parity",
            seconds=140,
            calls=(1,),
            parts=PAIRS,
            at_once=4,
        ),
        Stage(
            name="ops",
            does="every op against its rivals, attention first, without Inductor",
            function="benchmarks.device.measure:ops",
            seconds=120,
            calls=(1,),
        ),
        Stage(
            name="inductor",
            does="the networks in torch.compile, also with mode reduce-overhead",
            function="benchmarks.device.networks:inductor",
            seconds=100,
            calls=(2,),
            beside="build",
        ),
        Stage(
            name="unet",
            does="networks of plain torch ops against ours, by the host's clock and as a graph",
            function="benchmarks.device.networks:unet",
            seconds=40,
            calls=(1, 2),
        ),
        Stage(
            name="loop",
            does="20 guided steps of SD 1.5, each the replay of one CUDA graph",
            function="benchmarks.device.networks:loop",
            seconds=45,
            calls=(1,),
        ),
        Stage(
            name="sanitize",
            does="parity cases under compute-sanitizer's memcheck and racecheck",
            function="benchmarks.device.sanitize:sanitize",
            seconds=70,
            calls=(2,),
            parts=("memcheck", "racecheck"),
            at_once=2,
        ),
        Stage(
            name="tune",
            does="launch configs, the five most important classes first",
            function="benchmarks.device.measure:tune",
            seconds=36,
            calls=(2,),
        ),
        Stage(
            name="more-sanitize",
            does="the same under synccheck and initcheck",
            function="benchmarks.device.sanitize:sanitize",
            seconds=70,
            parts=("synccheck", "initcheck"),
            at_once=2,
        ),
        Stage(
            name="tests",
            does="the parity tests and the tests marked gpu, by pytest",
            function="benchmarks.device.prepare:tests",
            seconds=110,
        ),
        Stage(
            name="bench",
            does="every op at every shape and batch against all rivals, with Inductor; winners",
            function="benchmarks.device.measure:bench",
            seconds=150,
        ),
        Stage(
            name="networks",
            does="whole evaluations, and the share of each op in them",
            function="benchmarks.device.networks:networks",
            seconds=55,
        ),
    )
}


def stages_of(call: int) -> list[str]:
    """The stages of a call, in order."""
    return [name for name, stage in STAGES.items() if call in stage.calls]


def groups_of(names: list[str]) -> list[list[str]]:
    """The stages in order, each with those that run beside it."""
    return [
        [name, *(other for other in names if STAGES[other].beside == name)]
        for name in names
        if STAGES[name].beside not in names
    ]
