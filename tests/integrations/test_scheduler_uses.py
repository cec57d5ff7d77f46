"""Every way in which pipelines, trainers and loops use a scheduler: fused, it does as diffusers'.

Each use runs with diffusers' own scheduler and with the fused one, of noise="generator", in the
same process; both have to give the same, errors included.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.integrations import scheduler
from fastdiff.integrations.scheduler import FusedScheduler
from fastdiff.kernels import record_backends
from tests.integrations import scheduler_settings as settings
from tests.integrations import scheduler_uses as uses
from tests.integrations.scheduler_uses import SCHEDULERS, Use, begin, go, make, outcome
from tests.support.parity import assert_parity

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    # DPM-Solver++ turns its betas to arrays in set_timesteps
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

CLASSES = (
    "ddim", "ddim-clip", "ddpm", "pndm", "euler", "ancestral", "heun", "dpm", "dpm-sde", "lms",
    "kdpm2", "kdpm2-ancestral", "singlestep", "lcm", "tcd", "unipc", "deis-1", "ipndm",
)  # fmt: skip
"""One case of each class, and of each kind of noise: these run all uses."""


def fuse(scheduler: Any) -> Any:
    """The report; the scheduler is fused in place."""
    holder = SimpleNamespace(components={"unet": torch.nn.Identity()}, scheduler=scheduler)
    report = fastdiff.accelerate(holder, scheduler="fused", noise="generator", strict=True)
    assert isinstance(scheduler, FusedScheduler)
    return report


def largest(seen: Any) -> float:
    """The largest number of all samples: fp32 rounds in units of it."""
    if isinstance(seen, list | tuple):
        return max(map(largest, seen), default=0.0)
    if not isinstance(seen, Tensor) or seen.ndim < 2 or not seen.numel():
        return 0.0
    return float(seen.double().abs().nan_to_num(0, 0).max())


def assert_same(found: Any, wanted: Any, where: str, bound: float) -> None:
    """Tensors up to the bound, everything else equal."""
    if isinstance(wanted, Tensor) and isinstance(found, Tensor):
        assert found.shape == wanted.shape, where
        torch.testing.assert_close(
            found.double(),
            wanted.double(),
            rtol=0,
            atol=bound,
            equal_nan=True,
            msg=lambda text: f"{where}: {text}",
        )
    elif isinstance(wanted, list | tuple) and isinstance(found, list | tuple):
        assert len(found) == len(wanted), f"{where}: {found} for {wanted}"
        for number, pair in enumerate(zip(found, wanted, strict=True)):
            assert_same(*pair, where=f"{where}[{number}]", bound=bound)
    else:
        assert found == wanted, where


TOLERANCE = 2e-6
"""About 32 units of fp32's last place of the largest number."""


OPTIONS_MATTER = (
    uses.loop,
    uses.many_steps,
    uses.one_step,
    uses.as_many_steps_as_training,
    uses.image_to_image,
    uses.inpainting,
    uses.gradients,
    uses.half_precision,
    uses.mixed_precision,
    uses.double_precision,
)
"""Uses that see what the options of a scheduler change."""
BETTER = [("unipc", settings.double_by_default)]
"""Where diffusers' own step raises, because it solves a system in two dtypes, and ours runs."""
TABLE = [
    *(
        (case, use)
        for case in CLASSES
        for use in (*uses.USES, *settings.USES)
        if (case, use) not in BETTER
    ),
    *((case, use) for case in SCHEDULERS if case not in CLASSES for use in OPTIONS_MATTER),
]


@pytest.mark.parametrize(("case", "use"), TABLE, ids=lambda part: getattr(part, "__name__", part))
def test_a_fused_scheduler_does_as_diffusers(case: str, use: Use) -> None:
    wanted = outcome(use, make(case))
    fused = make(case)
    fuse(fused)
    bound = TOLERANCE * max(1.0, largest(wanted), largest(begin(make(case))))
    assert_same(outcome(use, fused), wanted, use.__name__, bound)


LEFT: dict[Use, str] = {
    uses.gradients: "a gradient",
    uses.gradient_of_the_last_step: "a gradient",
    uses.gradient_ends: "a gradient",
    uses.vmapped: "a gradient, a transform",
    uses.forward_mode: "a gradient, a transform",
    uses.broadcast: "differ in shape",
    uses.a_vector: "do not have shape (N, C, ...)",
}
"""Uses with steps that diffusers' own code has to take, and the reason in the report."""
SERVED = (
    uses.loop,
    uses.loop_of_tuples,
    uses.keywords,
    uses.many_steps,
    uses.uneven_stride,
    uses.image_to_image,
    uses.image_to_image_by_index,
    uses.inpainting,
    uses.started_again,
    uses.deep_fork,
    uses.pickled_fork,
    uses.from_config,
    uses.history_changed,
    uses.written_in_place,
    uses.mixed_precision,
    uses.double_precision,
    uses.channels_last,
    uses.not_contiguous,
    uses.expanded,
    uses.inference_mode,
)
"""Uses of which every step is ours."""


@pytest.mark.parametrize("use", [*LEFT, *SERVED], ids=lambda use: use.__name__)
@pytest.mark.parametrize(
    "case",
    [
        *("ddim", "heun", "pndm", "dpm-sde", "lms", "kdpm2-ancestral", "singlestep", "lcm"),
        *("unipc", "deis-1"),
    ],
)
def test_the_report_says_which_steps_are_diffusers_own(case: str, use: Use) -> None:
    scheduler = make(case)
    report = fuse(scheduler)
    with record_backends() as ran:
        outcome(use, scheduler)
    left = report.scheduler_steps_left
    if use in SERVED:
        assert not left
        assert "sampler_step" in ran
    else:
        assert LEFT[use] in "; ".join(left)
        assert report.data["scheduler_steps_left"] == left


@pytest.mark.parametrize("case", CLASSES)
def test_fused_and_restored_in_the_middle_of_a_run(case: str) -> None:
    """State is diffusers' own: each goes on where the other was."""
    wanted = outcome(uses.loop, make(case))
    scheduler = make(case)
    scheduler.set_timesteps(5)
    draw = torch.Generator().manual_seed(3)
    takes = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": draw} if takes else {}
    x, seen, fused = begin(scheduler), [], 0
    for number, t in enumerate(scheduler.timesteps):
        report = fuse(scheduler) if number % 3 != 1 else None
        x, more = go(scheduler, x, [t], **options)
        seen += more[1:]
        if report is not None:
            assert not report.scheduler_steps_left
            fused += 1
            report.restore()
            assert not isinstance(scheduler, FusedScheduler)
    assert fused > 2
    bound = TOLERANCE * max(1.0, largest(wanted))
    assert_same([wanted[0], *seen], wanted, case, bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["ddim", "ddim-clip", *CLASSES[2:]])
def test_half_precision_is_no_worse_than_diffusers(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop in half precision against the same in fp64, from the same outputs and noise."""

    def noise(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
        return drawn.bfloat16().to(dtype)

    for module in (type(make(case)).__module__, "fastdiff.integrations.scheduler"):
        if hasattr(sys.modules[module], "randn_tensor"):
            monkeypatch.setattr(f"{module}.randn_tensor", noise)

    def run(seed: int, fused: bool, dtype: torch.dtype, outputs: list[Tensor]) -> Tensor:
        """`outputs` are made by the first of the three runs."""
        scheduler = make(case)
        if fused:
            fuse(scheduler)
        scheduler.set_timesteps(5)
        draw = torch.Generator().manual_seed(seed)
        more = {"generator": draw} if "generator" in vars_of(scheduler.step) else {}
        x = begin(scheduler, seed, 2, 4, 8, 8).bfloat16().to(dtype)
        for number, t in enumerate(scheduler.timesteps):
            y = uses.network(scheduler, x, t)  # scales its input, which Euler wants to see
            if len(outputs) == number:
                outputs.append(y.bfloat16())
            x = scheduler.step(outputs[number].to(dtype), t, x, **more).prev_sample
        assert x.dtype == dtype
        return x

    every: dict[int, list[Tensor]] = {}
    assert_parity(
        lambda seed: run(seed, True, dtype, every.setdefault(seed, [])),
        lambda seed: run(seed, False, torch.float64, every.setdefault(seed, [])),
        lambda seed: run(seed, False, dtype, every.setdefault(seed, [])),
    )


def vars_of(function: Any) -> Any:
    return inspect.signature(function).parameters


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ddim", "dpm"])
def test_a_compiled_step_is_diffusers_own(case: str) -> None:
    """Dynamo traces the scheduler's own step, which Inductor fuses as it did before."""
    wanted, found = [], []
    for seen, fused in ((wanted, False), (found, True)):
        torch._dynamo.reset()
        scheduler = make(case)
        report = fuse(scheduler) if fused else None
        scheduler.set_timesteps(4)
        step = torch.compile(scheduler.step, backend="eager")
        x = begin(scheduler)
        for t in scheduler.timesteps:
            x = step(uses.network(scheduler, x, t), t, x, return_dict=False)[0]
            seen.append(x)
        assert report is None or not report.scheduler_steps_left
    torch._dynamo.reset()
    assert_same(found, wanted, "compiled", TOLERANCE * max(1.0, largest(wanted)))


@pytest.mark.parametrize("case", ["ddim", "ddim-clip", "ddpm"])
def test_a_step_within_a_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As two threads may take them: nothing of a scheduler without state is shared by its steps."""
    run, plain, inner = scheduler.sampler_step, make(case), []
    fused = make(case)
    fuse(fused)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        if not inner:
            inner.append(None)
            inner[0] = step(fused, seed=1)
        run(*args, **kwargs)

    def step(s: Any, seed: int) -> Tensor:
        s.set_timesteps(4)
        x, t = begin(s, seed), s.timesteps[1]
        draw = torch.Generator().manual_seed(seed)
        return s.step(uses.network(s, x, t), t, x, generator=draw).prev_sample

    monkeypatch.setattr(scheduler, "sampler_step", interrupted)
    outer = step(fused, seed=0)
    for seed, found in ((0, outer), (1, inner[0])):
        torch.testing.assert_close(found, step(plain, seed), rtol=1e-5, atol=1e-5)


def test_no_timestep_is_read_from_its_device_in_a_loop() -> None:
    """Reading one would wait for a GPU in every step."""
    scheduler = make("ddim")
    fuse(scheduler)
    scheduler.set_timesteps(5)
    x = begin(scheduler)
    scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.fused.host.timestep = functools.partial(only_views, scheduler.fused.host)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x).prev_sample
    assert not scheduler.fused.left


def only_views(host: Any, scheduler: Any, timestep: Tensor) -> int | None:
    """`Host.timestep` of a tensor whose own numbers cannot be read."""

    class Unread(Tensor):
        def __int__(self) -> int:
            raise AssertionError("the timestep was read from its device")

    return type(host).timestep(host, scheduler, timestep.as_subclass(Unread))
