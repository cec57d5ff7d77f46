"""`fastdiff.accelerate` against stock diffusers and against our own modules, on the same weights.

    diffusers              unchanged
    diffusers compile      through torch.compile, only if --providers includes compile
    accelerated            after fastdiff.accelerate(..., pack_cpu_weights=True)
    accelerated compile    both
    fastdiff               our own modules after `runtime.prepare`

A U-Net step, a decoder call and a whole image (guided DDIM and decoding, no text encoder) are timed
in turns. Then each provider runs alone in a process, which gives the seconds from process start to
the first result, and the peak memory. Weights are random; results must agree before anything is
timed. With an NVIDIA GPU it runs there, in fp16 at 64 x 64, reporting the peak of the GPU's memory;
each timing synchronizes. Evaluations without Python overhead are timed by
`python -m benchmarks.device` (gpu_networks.py).
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastdiff
from benchmarks.harness import PEAKS
from benchmarks.networks.bench_cpu_networks import KL_F8, Step, in_turns, keep, peer_of, records
from fastdiff.bench import shapes
from fastdiff.bench.providers import import_diffusers
from fastdiff.bench.record import Peak
from fastdiff.checkpoint.layouts.diffusers.read import (
    autoencoder_config,
    convert_state_dict,
    unet_config,
)
from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.unet import UNet
from fastdiff.runtime.prepare import prepare

PARTS = ("unet", "decode", "image")
PROVIDERS = ("diffusers", "diffusers compile", "accelerated", "accelerated compile", "fastdiff")
STEPS, GUIDANCE, ROUNDS = 4, 7.5, 3


class Place(NamedTuple):
    """The device, dtype and size of a comparison."""

    device: str
    dtype: torch.dtype
    size: int
    """Height and width of the latents."""
    tolerance: float
    """Relative to diffusers' largest number."""


CPU = Place("cpu", torch.float32, 32, 1e-3)
GPU = Place("cuda", torch.float16, 64, 5e-2)
SMALL = CPU._replace(size=8)


SMALL_UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "layers_per_block": 1,
}
SMALL_VAE: dict[str, Any] = {
    **KL_F8,
    "block_out_channels": (32, 64),
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
}


def here() -> Place:
    """The GPU if there is one, else the CPU."""
    return GPU if torch.cuda.is_available() else CPU


def builders(small: bool) -> list[Callable[[], Any]]:
    diffusers = import_diffusers()
    unet = {**(SMALL_UNET if small else {}), "cross_attention_dim": 768}
    return [
        lambda: diffusers.UNet2DConditionModel(**unet),
        lambda: diffusers.AutoencoderKL(**(SMALL_VAE if small else KL_F8)),
    ]


@functools.cache
def originals(small: bool, place: Place) -> list[Any]:
    return [peer_of(build).to(place.device, place.dtype) for build in builders(small)]


def networks(provider: str, small: bool, place: Place) -> tuple[Any, Any]:
    """U-Net and autoencoder of Stable Diffusion 1.5, or small ones, on the same weights."""
    unet, vae = originals(small, place)
    if provider == "fastdiff":
        ours = native(unet, unet_config, UNet), native(vae, autoencoder_config, Autoencoder)
        for module in ours:
            prepare(module, device=place.device, dtype=place.dtype)
        return ours
    if provider == "diffusers":
        return unet, vae
    twins = []
    for build, original in zip(builders(small), (unet, vae), strict=True):
        with torch.device("meta"):
            twin = build()
        # separate parameters on shared memory; changing the memory format makes a copy
        state = {key: value.detach() for key, value in original.state_dict().items()}
        twin.load_state_dict(state, assign=True)
        twin.eval().requires_grad_(False)
        if provider.startswith("accelerated"):
            fastdiff.accelerate(twin, pack_cpu_weights=place.device == "cpu", strict=True)
        if provider.endswith("compile"):
            getattr(twin, "decoder", twin).compile(dynamic=False)
        twins.append(twin)
    return twins[0], twins[1]


def native(theirs: Any, read: Callable[[dict[str, Any]], Any], kind: Any) -> Any:
    with torch.device("meta"):
        ours = kind(read(json.loads(theirs.to_json_string())))
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), ours), assign=True)
    return ours


def step_of(part: str, provider: str, small: bool, place: Place) -> Step:
    """The function to time: one call of a part, including synchronization."""
    step = unfinished(part, provider, small, place)

    def finished() -> Tensor:
        result = step()
        if place.device == "cuda":
            torch.cuda.synchronize()
        return result

    return finished


def unfinished(part: str, provider: str, small: bool, place: Place) -> Step:
    unet, vae = networks(provider, small, place)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, place.size, place.size, generator=draw).to(place.device, place.dtype)
    context = torch.randn(2, shapes.CONTEXT_TOKENS, 768, generator=draw).to(x)
    t, ours = torch.tensor([500.0], device=x.device), provider == "fastdiff"
    if part == "unet":
        first = context[:1]
        if ours:
            return lambda: unet(x, t, context=first)
        return lambda: unet(x, t, first).sample
    if part == "decode":
        return (lambda: vae.decode(x)) if ours else (lambda: vae.decode(x).sample)
    if ours:
        return lambda: native_image(unet, vae, x, context)
    return lambda: pipeline_image(unet, vae, x, context, fused=provider.startswith("accel"))


def native_image(unet: UNet, vae: Autoencoder, x: Tensor, context: Tensor) -> Tensor:
    schedule = NoiseSchedule(
        ScheduleConfig(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)
    )
    table = build_table(
        "ddim", schedule, STEPS, spacing="leading", steps_offset=1, final="sigma_min",
        guidance_scale=GUIDANCE,
    )  # fmt: skip
    kvs, timesteps = unet.project_context(context), table.timesteps.tolist()

    def predict(x: Tensor, row: int) -> Tensor:
        both = torch.cat([x, x]).to(context.dtype)
        return unet(both, torch.tensor(timesteps[row], device=x.device), context=kvs)

    z = sample(predict, table, x.float(), [0]).to(context.dtype)
    return (vae.decode(z / 0.18215) / 2 + 0.5).clamp(0, 1)


def pipeline_image(unet: Any, vae: Any, x: Tensor, context: Tensor, *, fused: bool) -> Tensor:
    diffusers = import_diffusers()
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=None, tokenizer=None, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    if fused:
        fastdiff.accelerate(pipe, scheduler="fused")
    images: Tensor = pipe(
        negative_prompt_embeds=context[:1], prompt_embeds=context[1:], latents=x.clone(),
        height=x.shape[2] * pipe.vae_scale_factor, width=x.shape[3] * pipe.vae_scale_factor,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="pt",
    ).images  # fmt: skip
    return images


def compare(
    part: str, providers: list[str], place: Place, *, small: bool = False, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds of each provider, measured in turns after checking that their results agree."""
    steps = {provider: step_of(part, provider, small, place) for provider in providers}
    return in_turns(steps, rounds, place.tolerance)


def alone(part: str, provider: str, small: bool, place: Place) -> dict[str, float]:
    """Run in a process of its own: seconds to the first result, including imports, and peak bytes.

    On a GPU, the bytes are PyTorch's allocations there.
    """
    on_gpu = place.device == "cuda"
    peak = "torch.cuda.max_memory_allocated()" if on_gpu else "memory.peak_bytes()"
    code = (
        "import json\n"
        "from benchmarks.networks import bench_accelerate as b\n"
        "from fastdiff.bench import memory\n"
        "import torch\n"
        f"place = b.Place({place.device!r}, {place.dtype}, {place.size}, {place.tolerance})\n"
        f"step = b.step_of({part!r}, {provider!r}, {small}, place)\n"
        "with torch.inference_mode():\n"
        "    step()\n"
        f"print(json.dumps({peak}))\n"
    )
    start = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {
        "seconds": time.perf_counter() - start,
        "peak_bytes": float(json.loads(done.stdout.splitlines()[-1])),
    }


def chosen(request: pytest.FixtureRequest) -> list[str]:
    compile_too = "compile" in request.config.getoption("--providers").split(",")
    return [p for p in PROVIDERS if compile_too or not p.endswith("compile")]


@pytest.mark.parametrize("part", PARTS)
def test_accelerated(benchmark: Any, part: str, request: pytest.FixtureRequest) -> None:
    place = here()
    seconds = benchmark.pedantic(compare, args=(part, chosen(request), place), rounds=1)
    shape = str((1, 4, place.size, place.size)) + (f", {STEPS} steps" if part == "image" else "")
    keep(records(seconds, f"accelerate: {part}", shape, dtype_of(place), 0), benchmark)


def test_start_and_peak(benchmark: Any, request: pytest.FixtureRequest) -> None:
    """A whole image, with each provider alone in its process."""
    place = here()
    found = benchmark.pedantic(
        lambda: {p: alone("image", p, False, place) for p in chosen(request)}, rounds=1
    )
    times = {provider: [numbers["seconds"]] * 2 for provider, numbers in found.items()}
    shape = str((1, 4, place.size, place.size))
    job = "accelerate: start to first image"
    keep(records(times, job, shape, dtype_of(place), 0), benchmark)
    for provider, numbers in found.items():
        PEAKS.append(
            Peak(
                benchmark=f"accelerate, {provider}",
                shape=shape,
                threads=torch.get_num_threads(),
                bytes=int(numbers["peak_bytes"]),
            )
        )


def dtype_of(place: Place) -> str:
    return str(place.dtype).removeprefix("torch.")
