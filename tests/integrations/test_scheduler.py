"""`scheduler="fused"` against diffusers' own scheduler: the same images from the same noise."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.integrations import AccelerateError
from fastdiff.integrations.scheduler import FusedScheduler, objection, seeds_of
from fastdiff.kernels import SAMPLER_NOISE, philox_normal, record_backends
from tests.integrations import models
from tests.integrations.models import images, pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must:DeprecationWarning"),  # in DEIS
]

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PNDM = {"skip_prk_steps": True, "steps_offset": 1}
DPM = "DPMSolverMultistepScheduler"
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, 7),
    ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, 5),
    ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}, 5),
    ("DDPMScheduler", {"clip_sample": False}, 4),
    ("DDPMScheduler", {"clip_sample": True}, 4),
    ("PNDMScheduler", PNDM, 6),
    ("EulerDiscreteScheduler", {}, 6),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}, 5),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, 5),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, 4),
    ("HeunDiscreteScheduler", {}, 3),
    (DPM, {}, 6),
    (DPM, {"use_karras_sigmas": True}, 5),
    (DPM, {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}, 16),
    (DPM, {"algorithm_type": "sde-dpmsolver++", "euler_at_final": True}, 5),
    ("UniPCMultistepScheduler", {}, 6),
    ("UniPCMultistepScheduler", {"solver_order": 3, "prediction_type": "v_prediction"}, 6),
    ("DEISMultistepScheduler", {"solver_order": 3}, 6),
]


PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def image_pipeline(kind: str, scheduler: Any) -> Any:
    """Stable Diffusion's pipeline of that kind, of the parts of `pipeline`."""
    name = f"StableDiffusion{kind}Pipeline"
    parts = dict(pipeline(scheduler=scheduler).components)
    pipe = getattr(models.import_diffusers(name), name)(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(name: str, options: dict[str, Any]) -> Any:
    return getattr(models.import_diffusers(name), name)(**{**BETAS, **options})


def philox_in_place_of_torchs(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Let diffusers draw the noise that ours draws: Philox's, of seeds from the generator."""

    def noise(shape: Any, generator: Any, **others: Any) -> torch.Tensor:
        seeds = seeds_of(generator, shape[0])
        return philox_normal(seeds, tuple(shape[1:]), step=0, stream=SAMPLER_NOISE)

    where = __import__(module, fromlist=["randn_tensor"])
    if hasattr(where, "randn_tensor"):
        monkeypatch.setattr(where, "randn_tensor", noise)


@pytest.mark.parametrize(("name", "options", "steps"), CASES, ids=str)
def test_same_images(
    name: str, options: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = make(name, options)
    pipe = pipeline(scheduler=scheduler)
    generator = torch.Generator()
    module = type(scheduler).__module__
    with monkeypatch.context() as patch:
        philox_in_place_of_torchs(patch, module)
        wanted = images(pipe, steps, generator=generator.manual_seed(11))
    report = fastdiff.accelerate(pipe, scheduler="fused")
    assert report.count("scheduler") == (1, 0)
    assert isinstance(pipe.scheduler, FusedScheduler)
    kind = type(make(name, options))
    assert isinstance(pipe.scheduler, kind)
    with record_backends() as ran:
        found = images(pipe, steps, generator=generator.manual_seed(11))
    assert "sampler_step" in ran
    assert not report.scheduler_steps_left
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    report.restore()
    assert type(pipe.scheduler) is kind
    with monkeypatch.context() as patch:
        philox_in_place_of_torchs(patch, module)
        again = images(pipe, steps, generator=generator.manual_seed(11))
        assert torch.equal(again, wanted)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, "variance_type='fixed_large_log'"),
        ("UniPCMultistepScheduler", {"predict_x0": False}, "predict_x0=False, only with True"),
        ("PNDMScheduler", {"skip_prk_steps": False}, "skip_prk_steps"),
        (DPM, {"lambda_min_clipped": -5.1, "thresholding": True}, "thresholding=True"),
    ],
)
def test_what_no_table_does_is_left(name: str, options: dict[str, Any], reason: str) -> None:
    pipe = pipeline(scheduler=make(name, options))
    with pytest.raises(AccelerateError, match=reason):
        fastdiff.accelerate(pipe, scheduler="fused", strict=True)
    report = fastdiff.accelerate(pipe, scheduler="fused")
    assert reason in str(report.left[-1].reason)
    assert not isinstance(pipe.scheduler, FusedScheduler)


def trajectories(
    scheduler: str, steps: int, dtype: torch.dtype, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(step, N, C, H, W) of a loop: ours, and diffusers' own with its sigmas in `dtype`."""
    plain, fused = make(scheduler, options), make(scheduler, options)
    holder = SimpleNamespace(components={"unet": torch.nn.Identity()}, scheduler=fused)
    report = fastdiff.accelerate(holder, scheduler="fused", strict=True)
    found = []
    for each in (fused, plain):
        each.set_timesteps(steps)
        x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
        if each is plain:
            each.sigmas, x = each.sigmas.to(dtype), x.to(dtype)
        states = []
        for t in each.timesteps:
            x = each.step(torch.tanh(0.7 * x + float(t) / 1000), t, x).prev_sample
            states.append(x)
        found.append(torch.stack(states))
    assert not report.scheduler_steps_left
    return found[0], found[1]


@pytest.mark.parametrize("steps", [5, 20, 250])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DEISMultistepScheduler", {"solver_order": 2}),
        ("DEISMultistepScheduler", {"solver_order": 3}),
        ("DEISMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"solver_order": 3, "lower_order_final": False, **SIGMA_MIN}),
    ],
    ids=str,
)
def test_the_trajectories_of_multistep_solvers(
    name: str, options: dict[str, Any], steps: int
) -> None:
    """As diffusers' in fp64. In fp32 the logarithms in its DEIS of order 3 cancel, and at 250 steps
    it is a thousand times further from that than ours."""
    found, wanted = trajectories(name, steps, torch.float64, **options)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    if steps == 5:
        wanted = trajectories(name, steps, torch.float32, **options)[1]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_ipndm_twice_over_its_timesteps() -> None:
    """diffusers' own test goes on with the history of the first loop, where its first step divides
    by 1e-8; that step is left to it, and the result is the published one."""
    kind = models.import_diffusers("IPNDMScheduler").IPNDMScheduler
    scheduler = kind(num_train_timesteps=1000)
    holder = SimpleNamespace(components={"unet": torch.nn.Identity()}, scheduler=scheduler)
    report = fastdiff.accelerate(holder, scheduler="fused", strict=True)
    x = (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
    scheduler.set_timesteps(10)
    for loop in range(2):
        scheduler._step_index = None
        for t in scheduler.timesteps:
            x = scheduler.step(x * t / (t + 1), t, x).prev_sample
        assert sum(report.scheduler_steps_left.values()) == loop
    assert abs(float(x.abs().mean()) - 2540529) < 10  # huggingface/diffusers, test_scheduler_ipndm


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_karras_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ],
    ids=str,
)
def test_flow_matching(name: str, options: dict[str, Any]) -> None:
    """A loop as in the pipelines of SD3 and Flux, whose samples are (N, tokens, channels)."""
    kind = getattr(models.import_diffusers(name), name)
    plain, fused = kind(**options), kind(**options)
    holder = SimpleNamespace(components={"unet": torch.nn.Identity()}, scheduler=fused)
    report = fastdiff.accelerate(holder, scheduler="fused", strict=True)
    results = []
    for scheduler in (plain, fused):
        scheduler.set_timesteps(7)
        x = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(1))
        for t in scheduler.timesteps:
            v = torch.tanh(x * (1 + t / 1000))
            x = scheduler.step(v, t, x, return_dict=False)[0]
            results.append(x)
    assert not report.scheduler_steps_left
    half = len(results) // 2
    for wanted, found in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_flow_step_in_bf16_is_rounded_once() -> None:
    """diffusers rounds the product of step and output before the sum."""
    name = "FlowMatchEulerDiscreteScheduler"
    scheduler = getattr(models.import_diffusers(name), name)()
    holder = SimpleNamespace(components={"unet": torch.nn.Identity()}, scheduler=scheduler)
    fastdiff.accelerate(holder, scheduler="fused", strict=True)
    scheduler.set_timesteps(4)
    x, v = torch.randn(2, 2, 12, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    step = (scheduler.sigmas[1] - scheduler.sigmas[0]).double()
    found = scheduler.step(v, scheduler.timesteps[0], x).prev_sample
    assert torch.equal(found, (x.double() + step * v.double()).float().bfloat16())


def test_it_is_still_a_scheduler_of_diffusers(tmp_path: Path) -> None:
    pipe = pipeline()
    kind = type(pipe.scheduler)
    fastdiff.accelerate(pipe, scheduler="fused")
    assert fastdiff.accelerate(pipe, scheduler="fused").changed == 0
    assert inspect.signature(pipe.scheduler.step) == inspect.signature(
        make("DDIMScheduler", {}).step
    )
    pipe.save_pretrained(tmp_path)
    assert type(kind.from_pretrained(tmp_path / "scheduler")) is kind
    other = models.import_diffusers(DPM).DPMSolverMultistepScheduler
    assert type(other.from_config(pipe.scheduler.config)) is other


def test_an_option_that_a_later_diffusers_has_is_left() -> None:
    theirs = type(make("DDIMScheduler", {}))

    def init(self: Any, clip_sample: bool = True, bend: float = 1.0) -> None:
        self.register_to_config(clip_sample=clip_sample, bend=bend)

    later = type("DDIMScheduler", (theirs,), {"__init__": init, "__module__": theirs.__module__})
    assert objection(later(clip_sample=False)) is None
    reason = objection(later(clip_sample=False, bend=2.0))
    assert reason == "fastdiff does not support DDIMScheduler's option bend=2.0"


def test_a_scheduler_of_the_users_own_is_left() -> None:
    """A subclass may compute something else, and so may a function in the place of a method."""
    theirs = type(make("DDIMScheduler", {}))
    scheduler = type("DDIMScheduler", (theirs,), {"__module__": __name__})()
    report = fastdiff.accelerate(pipeline(scheduler=scheduler), scheduler="fused")
    assert report.left[-1].reason == "DDIMScheduler is not one of diffusers' schedulers"
    for name in ("step", "_get_variance"):
        scheduler = make("DDIMScheduler", {})
        setattr(scheduler, name, functools.partial(getattr(scheduler, name)))
        report = fastdiff.accelerate(pipeline(scheduler=scheduler), scheduler="fused")
        assert report.left[-1].reason == f"its {name} was replaced on this object"
        assert type(scheduler) is theirs


def test_a_step_that_another_library_has_replaced_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make("DDIMScheduler", {})
    monkeypatch.setattr(type(scheduler), "step", another_step)
    report = fastdiff.accelerate(pipeline(scheduler=scheduler), scheduler="fused")
    assert report.left[-1].reason == f"DDIMScheduler.step was replaced by a function of {__name__}"


def another_step(self: Any, model_output: Any, timestep: Any, sample: Any) -> Any:
    return (sample,)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in their constructors
def test_every_scheduler_of_diffusers_is_served_or_named() -> None:
    """Each is accelerated as its class is by default."""
    diffusers = models.import_diffusers("DDIMScheduler")
    outcomes: dict[str, str | None] = {}
    for name in sorted(n for n in dir(diffusers.schedulers) if n.endswith("Scheduler")):
        try:
            scheduler = getattr(diffusers.schedulers, name)()
        except (TypeError, ImportError):  # wants arguments, or a package that is not installed
            continue
        holder = SimpleNamespace(
            components={"unet": torch.nn.Identity(), "scheduler": scheduler}, scheduler=scheduler
        )
        report = fastdiff.accelerate(holder, scheduler="fused")
        entry = next(e for e in report.entries if e.op == "scheduler")
        assert (entry.reason is None) == isinstance(scheduler, FusedScheduler)
        outcomes[name] = entry.reason
    assert len(outcomes) > 30
    served = {name for name, reason in outcomes.items() if reason is None}
    assert served == {
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        DPM,
        "LMSDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DPMSolverSinglestepScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "IPNDMScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
    }
    assert all(name in str(reason) for name, reason in outcomes.items() if reason is not None)


def test_pipelines_made_of_another_one_share_its_scheduler() -> None:
    """`from_pipe` hands the components on; the switch of classes goes through the config."""
    pipe = pipeline()
    fastdiff.accelerate(pipe, scheduler="fused")
    diffusers = models.import_diffusers("StableDiffusionImg2ImgPipeline")
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.scheduler is pipe.scheduler
    assert isinstance(other.scheduler, FusedScheduler)
    assert other.config["scheduler"] == ("diffusers", "DDIMScheduler")
    for kind in other.scheduler.compatibles:
        assert not issubclass(kind, FusedScheduler)


@pytest.mark.parametrize(
    ("name", "draws"),
    [("EulerAncestralDiscreteScheduler", True), ("EulerDiscreteScheduler", False)],
)
def test_generators_move_on_where_noise_is_drawn(name: str, draws: bool) -> None:
    """Two images of one generator have different noise; without noise it stays where it was."""
    pipe = pipeline(scheduler=make(name, {}))
    fastdiff.accelerate(pipe, scheduler="fused")
    one = torch.Generator().manual_seed(5)
    state = one.get_state()
    first, second = images(pipe, 3, generator=one), images(pipe, 3, generator=one)
    assert torch.equal(one.get_state(), state) is not draws
    assert torch.equal(first, second) is not draws
    one.manual_seed(5)
    assert torch.equal(images(pipe, 3, generator=one), first)
    apart = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = images(pipe, 3, generator=apart)
    apart[0].manual_seed(5)
    apart[1].manual_seed(7)
    again = images(pipe, 3, generator=apart)
    assert torch.equal(again[0], both[0])
    assert torch.equal(again[1], both[1]) is not draws


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_philox_noise_is_left_out_where_diffusers_leaves_it_out(variance: str) -> None:
    """DDPM's step from t = 0, and nowhere else."""
    scheduler = make("DDPMScheduler", {"clip_sample": False, "variance_type": variance})
    fastdiff.accelerate(
        SimpleNamespace(components={"unet": torch.nn.Identity()}, scheduler=scheduler),
        scheduler="fused",
    )
    scheduler.set_timesteps(1000)
    x, output = PICTURES, PICTURES.flip(0)
    for t, noisy in ((0, False), (1, True)):
        first, second = (
            scheduler.step(output, t, x, generator=torch.Generator().manual_seed(seed)).prev_sample
            for seed in (1, 2)
        )
        assert torch.equal(first, second) is not noisy
    theirs = make("DDPMScheduler", {"clip_sample": False, "variance_type": variance})
    theirs.set_timesteps(1000)
    wanted = theirs.step(output, 0, x).prev_sample
    torch.testing.assert_close(scheduler.step(output, 0, x).prev_sample, wanted)


@pytest.mark.parametrize(("steps", "strength"), [(10, 0.5), (20, 0.3)])
@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("HeunDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("PNDMScheduler", PNDM),
        ("DDPMScheduler", {"clip_sample": False}),
    ],
)
def test_image_to_image_and_inpainting(
    kind: str, name: str, options: dict[str, Any], steps: int, strength: float
) -> None:
    """They enter in the middle: Heun at a timestep that occurs twice, PNDM without a start."""
    pipe = image_pipeline(kind, make(name, options))

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        more = {"mask_image": torch.ones(2, 1, 16, 16).tril()} if kind == "Inpaint" else {}
        return images(
            pipe,
            steps,
            latents=None,
            image=PICTURES,
            strength=strength,
            generator=generator,
            **more,
        )

    wanted = draw()
    report = fastdiff.accelerate(pipe, scheduler="fused", noise="generator")
    torch.testing.assert_close(draw(), wanted, rtol=0, atol=1e-4)
    assert not report.scheduler_steps_left


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("DDIM", {}),
        ("DDIM", {"eta": 0.6}),
        ("DDIM", {"eta": 0.6, "use_clipped_model_output": True}),
        ("DDPM", {}),
    ],
)
def test_unconditional_pipelines(name: str, given: dict[str, Any]) -> None:
    """Their schedulers clamp by default. `eta` and the clamp's option are arguments of the call."""
    pipeline_class = getattr(models.import_diffusers(f"{name}Pipeline"), f"{name}Pipeline")
    unet = models.build("UNet2DModel", models.UNCONDITIONAL)
    pipe = pipeline_class(unet, make(f"{name}Scheduler", {}))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.clip_sample

    def draw() -> torch.Tensor:
        found = pipe(
            batch_size=2,
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(4),
            output_type="np",
            **given,
        )
        return torch.from_numpy(found.images)

    wanted = draw()
    report = fastdiff.accelerate(pipe, scheduler="fused", noise="generator")
    with record_backends() as ran:
        found = draw()
    assert "sampler_step" in ran
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert not report.scheduler_steps_left


@pytest.mark.parametrize(
    ("name", "given"),
    [
        (DPM, {"timesteps": [999, 700, 400, 100]}),
        ("HeunDiscreteScheduler", {"timesteps": [999, 700, 400, 100]}),
        ("DDPMScheduler", {"timesteps": [999, 700, 400, 100]}),
        ("EulerDiscreteScheduler", {"sigmas": [14.0, 6.0, 2.0, 0.5, 0.0]}),
    ],
)
def test_a_pipeline_takes_timesteps_and_sigmas(name: str, given: dict[str, Any]) -> None:
    """Pipelines look for the argument in the signature of `set_timesteps`."""
    pipe = pipeline(scheduler=make(name, {}))
    wanted = images(pipe, generator=torch.Generator().manual_seed(1), **given)
    assert not torch.equal(wanted, images(pipe, generator=torch.Generator().manual_seed(1)))
    fastdiff.accelerate(pipe, scheduler="fused", noise="generator")
    found = images(pipe, generator=torch.Generator().manual_seed(1), **given)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_noise_of_the_generator_is_an_option() -> None:
    """The images of diffusers, seed for seed, and a choice that later calls may change."""
    name = "EulerAncestralDiscreteScheduler"
    pipe = pipeline(scheduler=make(name, {}))

    def draw() -> torch.Tensor:
        return images(pipe, 3, generator=torch.Generator().manual_seed(2))

    wanted = draw()
    philox = fastdiff.accelerate(pipe, scheduler="fused")
    assert (draw() - wanted).abs().max() > 1e-2
    same = fastdiff.accelerate(pipe, scheduler="fused", noise="generator")
    assert same.changed == 1
    torch.testing.assert_close(draw(), wanted, rtol=0, atol=1e-4)
    again = type(pipe.scheduler).from_config(pipe.scheduler.config)
    assert again.noise == "generator"
    same.restore()
    assert pipe.scheduler.noise == "philox"
    philox.restore()
    assert not isinstance(pipe.scheduler, FusedScheduler)
    with pytest.raises(ValueError, match="noise must be 'philox' or 'generator', got 'blue'"):
        fastdiff.accelerate(pipe, scheduler="fused", noise="blue")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="add scheduler='fused'"):
        fastdiff.accelerate(pipe, noise="generator")
