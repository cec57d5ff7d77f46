"""Whole evaluations and whole images, by all who can make them, in turns.

    fastdiff               our network as it samples: prepared layers, the best backend of each op
    eager                  the same network on torch's own functions, with contiguous images
    eager channels_last    that in our layout
    compile                that through torch.compile
    diffusers              diffusers' module on the same weights' shapes, where it has the network
    openvino               the eager network in OpenVINO, on a CPU
    without ...            fastdiff with one optimization switched off (ablation)

Weights are random; results of the same weights must agree before anything is timed.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastdiff import kernels
from fastdiff.bench.contest import Conditions, filled
from fastdiff.bench.plain import plain_ops
from fastdiff.bench.providers import Make, import_diffusers
from fastdiff.bench.result import Entry, Row
from fastdiff.bench.run import said
from fastdiff.bench.shapes import Job
from fastdiff.bench.turns import AGAIN, in_turns, noise_floor
from fastdiff.extras import import_extra
from fastdiff.runtime.prepare import prepare

OURS = "fastdiff"
ABLATIONS = {
    "without our ops": "torch's functions in place of our kernels",
    "without prepared layers": "torch's layers, with weights as they are stored",
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest difference between two providers on the same weights, relative to the largest output."""
Step = Callable[[], Tensor]
Within = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Contestant:
    """One provider of a row: its function, the context it needs, and whether its weights are those
    of the others, so that results must agree."""

    step: Step
    within: Within = nullcontext
    shares_weights: bool = True


def network(
    job: Job, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network of a job and its inputs, the same in each call."""
    module, inputs = job.build(str(device), dtype)
    generator = torch.Generator(device).manual_seed(1)
    for name in ("x", "context", "added"):
        if name in inputs:
            inputs[name].normal_(generator=generator)
    return module, inputs


def twin(module: nn.Module, job: Job, dtype: torch.dtype) -> nn.Module:
    """Another network of the job that shares its parameters' memory until it changes them."""
    other, _ = job.build("meta", dtype)
    other.load_state_dict(module.state_dict(), assign=True)
    return other.to(dtype).eval().requires_grad_(False)


def step_row(
    preset: str,
    job: Job,
    conditions: Conditions,
    *,
    dtype: torch.dtype,
    ablation: bool = True,
    compile_too: bool = False,
    peers: bool = False,
    only: Sequence[str] = (),
) -> Row:
    """One evaluation of a network.

    Args:
        ablation: also with each optimization switched off.
        compile_too: also through torch.compile, which takes minutes for a large network.
        peers: also diffusers and OpenVINO, where they are installed and have the network.
        only: these providers besides ours and "eager"; empty: all of the above.
    """
    device = conditions.device
    contest = dict(contestants(job, conditions, dtype, ablation, compile_too))
    notes: dict[str, str] = {}
    if peers:
        for name, make in PEERS.items():
            if only and name not in only:
                continue
            try:
                contest[name] = make(preset, job, device, dtype)
            except (ImportError, ValueError) as error:
                notes[name] = f"not available: {said(error)}"
    keep = [n for n in contest if not only or n in (OURS, "eager", *only)]
    row = replace(bare_row(preset, job, device, dtype), flops=flops(job))
    return contested(row, {n: contest[n] for n in keep}, conditions, TOLERANCE[dtype], notes)


def bare_row(preset: str, job: Job, device: torch.device, dtype: torch.dtype) -> Row:
    """The row of a network without entries."""
    return Row(
        kind="decode" if job.network == "decoder" else "step",
        name=preset,
        job="",
        shape=str((job.batch, job.channels, job.size, job.size)),
        dtype=str(dtype).removeprefix("torch."),
        method="events" if device.type == "cuda" else "host",
    )


def contestants(
    job: Job, conditions: Conditions, dtype: torch.dtype, ablation: bool, compile_too: bool
) -> Iterator[tuple[str, Contestant]]:
    """Our network and what it is without our ops, by provider."""
    device = str(conditions.device)
    module, inputs = network(job, conditions.device, dtype)
    plain = twin(module, job, dtype).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    contiguous = {k: v.contiguous() for k, v in inputs.items()}
    ours = prepare(twin(module, job, dtype), device=device, dtype=dtype)
    yield OURS, Contestant(lambda: ours(**inputs))
    yield "eager", Contestant(lambda: plain(**contiguous), plain_ops)
    yield "eager channels_last", Contestant(lambda: module(**inputs), plain_ops)
    if compile_too:
        compiled = torch.compile(module, dynamic=False, backend=conditions.inductor)
        yield "compile", Contestant(lambda: compiled(**inputs), plain_ops)
    if ablation:
        yield "without our ops", Contestant(lambda: ours(**inputs), plain_ops)
        yield "without prepared layers", Contestant(lambda: module(**inputs))


def flops(job: Job) -> int:
    """FLOPs of the matrix products of one evaluation, counted on the meta device."""
    module, inputs = job.build("meta")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**inputs)
    return counter.get_total_flops()


def contested(
    row: Row,
    contest: Mapping[str, Contestant],
    conditions: Conditions,
    tolerance: float,
    notes: Mapping[str, str],
) -> Row:
    """Compare the results, time all in turns, and fill in the row."""
    entries = {name: Entry(provider=name) for name in contest}
    entries |= {name: Entry(provider=name, note=note) for name, note in notes.items()}
    functions: dict[str, Step] = {}

    @contextlib.contextmanager
    def within(name: str) -> Iterator[None]:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            with contest[name.removesuffix(AGAIN)].within():
                yield

    expected: Tensor | None = None
    for name in ["eager", *(n for n in contest if n != "eager")]:
        start = time.perf_counter()
        try:
            with within(name):
                result = contest[name].step().float()
        except Exception as error:  # noqa: BLE001 - the row says so
            entries[name] = Entry(provider=name, note=f"failed: {said(error)}")
            continue
        entries[name] = replace(entries[name], first_s=time.perf_counter() - start)
        if expected is None:
            expected = result
        elif contest[name].shares_weights:
            difference = ((result - expected).abs().max() / expected.abs().max()).item()
            if not difference <= tolerance:
                note = f"refused: its result differs from eager's by {difference:.1e}"
                entries[name] = Entry(provider=name, note=note)
                continue
        functions[name] = contest[name].step
    functions[f"eager{AGAIN}"] = contest["eager"].step
    seconds = in_turns(
        functions,
        conditions.timer,
        method="events",
        budget_s=conditions.budget_s,
        within=within,
    )
    noise = noise_floor(seconds["eager"], seconds.pop(f"eager{AGAIN}"))
    ours = {OURS, *ABLATIONS}
    return filled(replace(row, noise=noise), entries, seconds, 1.0, ours)


# Others' networks

SD15 = "sd15"
VAE = "vae"


def diffusers_module(preset: str, job: Job, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' module of a preset with random weights, and its inputs.

    Raises:
        ValueError: it has no such network.
        ImportError: diffusers is not installed.
    """
    if preset not in (SD15, VAE):
        raise ValueError(f"diffusers is compared at {SD15} and {VAE}")
    diffusers = import_diffusers()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        if preset == SD15:
            module = diffusers.UNet2DConditionModel(cross_attention_dim=768)
        else:
            module = diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                layers_per_block=2,
                latent_channels=4,
            ).decoder
    module = module.to(device, dtype).eval().requires_grad_(False)
    make = Make(dtype, device)
    x = make(job.batch, 4, job.size, job.size)
    if preset == VAE:
        return module, (x,)
    return module, (x, torch.zeros(job.batch, device=device), make(job.batch, 77, 768))


def _diffusers(preset: str, job: Job, device: torch.device, dtype: torch.dtype) -> Contestant:
    module, inputs = diffusers_module(preset, job, device, dtype)

    def step() -> Tensor:
        result = module(*inputs)
        return getattr(result, "sample", result)

    return Contestant(step, shares_weights=False)


class _Positional(nn.Module):
    """A network whose inputs are positional, as tracing wants them."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = self.module(**dict(zip(self.names, inputs, strict=True)))
        return result


def _openvino(preset: str, job: Job, device: torch.device, dtype: torch.dtype) -> Contestant:
    """Our network on torch's functions, with the weights of the other contestants, in OpenVINO.

    Raises:
        ValueError: the device is not a CPU, or OpenVINO does not compute in the dtype there.
        ImportError: OpenVINO is not installed.
    """
    precisions = {torch.float32: "f32", torch.bfloat16: "bf16"}
    if device.type != "cpu" or dtype not in precisions:
        raise ValueError("OpenVINO is compared on CPUs in fp32 and bf16")
    openvino = import_extra("openvino", extra="peers")
    module, inputs = network(job, device, torch.float32)
    traced = _Positional(module.to(memory_format=torch.contiguous_format), list(inputs))  # type: ignore[call-overload]
    tensors = tuple(tensor.contiguous() for tensor in inputs.values())
    with warnings.catch_warnings(), torch.no_grad(), plain_ops():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(traced, example_input=tensors)
    compiled = openvino.compile_model(
        converted,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precisions[dtype],
        },
    )
    arrays = [tensor.numpy() for tensor in tensors]
    return Contestant(lambda: torch.from_numpy(compiled(arrays)[compiled.output(0)]))


PEERS = {"diffusers": _diffusers, "openvino": _openvino}


# Images

IMAGES, IMAGE_STEPS = 8, 10


def image_row(conditions: Conditions) -> Row:
    """Images of the shipped digits model from start to end: noise, guided steps, decoding."""
    return contested(bare_image_row(), image_contestants(conditions.device), conditions, 1.0, {})


def bare_image_row() -> Row:
    """The row of images without entries."""
    return Row(
        kind="image",
        name="digits",
        job="",
        shape=f"{IMAGES} images, {IMAGE_STEPS} steps, guided",
        dtype="float32",
        method="host",
        images=IMAGES,
    )


def image_contestants(device: torch.device) -> dict[str, Contestant]:
    """The digits with our ops, and on torch's functions."""
    from fastdiff.checkpoint.open import load
    from fastdiff.generate.job import ClassJob, SampleSettings
    from fastdiff.generate.run import generate

    model = load("digits", device=str(device))
    settings = SampleSettings(steps=IMAGE_STEPS, guidance_scale=2.0)
    jobs = [ClassJob(label=i % 10, seed=i, settings=settings) for i in range(IMAGES)]

    def images() -> Tensor:
        return torch.stack([result.image for result in generate(model, jobs)])

    return {OURS: Contestant(images), "eager": Contestant(images, plain_and_reference)}


@contextlib.contextmanager
def plain_and_reference() -> Iterator[None]:
    """Networks on torch's functions, our other ops (noise, sampler steps) on their reference."""
    with plain_ops(), kernels.backend("reference"):
        yield
