"""Whole networks on the CPU against diffusers', on the same weights, in turns.

    fastdiff                 after `runtime.prepare`, with native kernels if they are built
    diffusers                unchanged, with contiguous images
    diffusers channels_last  its module and its input in our layout
    compile                  diffusers through `torch.compile`, only if --providers includes
                             compile, because it takes four minutes for the U-Net

Weights are random, at full size; outputs must agree before anything is timed. The residual block in
bf16 runs in a process of its own, where oneDNN is restricted to the instructions of a CPU without
AVX512-BF16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import RECORDS
from benchmarks.networks.call import filled
from fastdiff.bench import shapes
from fastdiff.bench.providers import import_diffusers
from fastdiff.bench.record import END_TO_END, Record, quartiles_of
from fastdiff.checkpoint.layouts.diffusers.read import (
    autoencoder_config,
    convert_state_dict,
    unet_config,
)
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.layers import ResBlock
from fastdiff.models.unet import UNet
from fastdiff.runtime.prepare import prepare

ROUNDS = 5
SIZE = 32
"""Height and width of the latents: images of 256 x 256."""
KL_F8: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
LIMITED = "AVX2"
"""The instruction set that oneDNN may use in the process of the residual block."""

Step = Callable[[], Tensor]


def peer_of(build: Callable[[], nn.Module]) -> Any:
    """A diffusers module with random weights that preserve the scale of activations."""
    with torch.device("meta"):
        module = build()
    return filled(module)


def sharing(module: nn.Module, build: Callable[[], nn.Module]) -> Any:
    """Another module with the same weights, in channels_last; copies only convolution weights."""
    with torch.device("meta"):
        other = build()
    other.load_state_dict(module.state_dict(), assign=True)
    return other.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def unet_steps(compile_too: bool) -> dict[str, Step]:
    diffusers = import_diffusers()

    def build() -> nn.Module:
        return diffusers.UNet2DConditionModel(cross_attention_dim=768)

    theirs = peer_of(build)
    config = unet_config(json.loads(theirs.to_json_string()))
    with torch.device("meta"):
        ours = UNet(config)
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), ours), assign=True)
    prepare(ours)
    x, t = torch.randn(1, 4, SIZE, SIZE), torch.tensor([500.0])
    context = torch.randn(1, shapes.CONTEXT_TOKENS, 768)
    in_nhwc, image = sharing(theirs, build), x.contiguous(memory_format=torch.channels_last)
    steps = {
        "fastdiff": lambda: ours(x, t, context=context),
        "diffusers": lambda: theirs(x, t, context).sample,
        "diffusers channels_last": lambda: in_nhwc(image, t, context).sample,
    }
    if compile_too:
        compiled = torch.compile(theirs, dynamic=False)
        steps["compile"] = lambda: compiled(x, t, context).sample
    return steps


def decoder_steps(compile_too: bool) -> dict[str, Step]:
    diffusers = import_diffusers()

    def build() -> nn.Module:
        return diffusers.AutoencoderKL(**KL_F8)

    theirs = peer_of(build)
    config = autoencoder_config(json.loads(theirs.to_json_string()))
    with torch.device("meta"):
        ours = Autoencoder(config)
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), ours), assign=True)
    prepare(ours)
    z = torch.randn(1, 4, SIZE, SIZE)
    in_nhwc, image = sharing(theirs, build), z.contiguous(memory_format=torch.channels_last)
    steps = {
        "fastdiff": lambda: ours.decode(z),
        "diffusers": lambda: theirs.decode(z).sample,
        "diffusers channels_last": lambda: in_nhwc.decode(image).sample,
    }
    if compile_too:
        compiled = torch.compile(theirs.decode, dynamic=False)
        steps["compile"] = lambda: compiled(z).sample
    return steps


def block_steps(channels: int = 320, size: int = 16) -> dict[str, Step]:
    """One residual block of the U-Net's second level, bf16."""
    import_diffusers()
    from diffusers.models.resnet import ResnetBlock2D

    def build() -> nn.Module:
        return ResnetBlock2D(in_channels=channels, out_channels=channels, temb_channels=1280)

    theirs = peer_of(build).bfloat16()
    ours = ResBlock(channels, channels, num_groups=32, eps=1e-6, emb_dim=1280)
    names = {"time_emb_proj": "emb"}
    state = theirs.state_dict()
    ours.load_state_dict(
        {".".join(names.get(part, part) for part in key.split(".")): v for key, v in state.items()}
    )
    prepare(ours, dtype=torch.bfloat16)
    x, emb = torch.randn(1, channels, size, size).bfloat16(), torch.randn(1, 1280).bfloat16()
    in_nhwc = sharing(theirs, build).bfloat16()
    image, activated = x.contiguous(memory_format=torch.channels_last), nn.functional.silu(emb)

    def run() -> torch.Tensor:
        addends, _ = ours(image, emb=activated)
        return addends.total()

    return {
        "fastdiff": run,
        "diffusers": lambda: theirs(x, emb),
        "diffusers channels_last": lambda: in_nhwc(image, emb),
    }


def in_turns(steps: dict[str, Step], rounds: int, tolerance: float) -> dict[str, list[float]]:
    """Seconds of each provider, called once per round, after comparing their results."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with torch.inference_mode():
        results = {name: step() for name, step in steps.items()}
        expected = results["diffusers"].float()
        for name, result in results.items():
            error = ((result.float() - expected).abs().max() / expected.abs().max()).item()
            assert error <= tolerance, f"{name} differs from diffusers by {error:.1e}"
        for _ in range(rounds):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def records(
    seconds: dict[str, list[float]], job: str, shape: str, dtype: str, flops: int
) -> list[Record]:
    return [
        Record(
            benchmark=END_TO_END,
            job=job,
            shape=shape,
            provider=provider,
            dtype=dtype,
            threads=torch.get_num_threads(),
            rounds=len(times),
            bytes=0,
            flops=flops,
            **quartiles_of(times),
        )
        for provider, times in seconds.items()
    ]


def keep(found: list[Record], benchmark: Any) -> None:
    """Store the records, and show pytest-benchmark the ratio to diffusers."""
    RECORDS.extend(found)
    by = {record.provider: record.median_s for record in found}
    for provider, median in by.items():
        ratio = by["diffusers"] / median
        benchmark.extra_info[provider] = f"{median:.3f} s, {ratio:.2f} x"
        print(f"\n{found[0].job}: {provider} {median:.3f} s, {ratio:.2f} x diffusers", end="")


def flops(job: str) -> int:
    """FLOPs of one evaluation in diffusers (without folded upsampling), from the meta device."""
    known = shapes.JOBS[job]
    resized = shapes.Job(network=known.network, preset=known.preset, size=SIZE, batch=1)
    module, inputs = resized.build("meta")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("job", ["SD 1.5 U-Net", "KL-f8 decoder"])
def test_network(benchmark: Any, job: str, request: pytest.FixtureRequest) -> None:
    compile_too = "compile" in request.config.getoption("--providers").split(",")
    steps = (unet_steps if "U-Net" in job else decoder_steps)(compile_too)
    seconds = benchmark.pedantic(in_turns, args=(steps, ROUNDS, 1e-4), rounds=1)
    found = records(seconds, job, str((1, 4, SIZE, SIZE)), "float32", flops(job))
    keep(found, benchmark)


def test_bf16_block_without_its_instructions(benchmark: Any) -> None:
    code = (
        "import json\n"
        "from benchmarks.networks import bench_cpu_networks as b\n"
        "print(json.dumps(b.in_turns(b.block_steps(), 3, 0.05)))\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": LIMITED}

    def run() -> str:
        return subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    seconds = json.loads(benchmark.pedantic(run, rounds=1).splitlines()[-1])
    shape = f"(1, 320, 16, 16), oneDNN limited to {LIMITED}"
    keep(records(seconds, "residual block, bf16", shape, "bfloat16", 0), benchmark)
