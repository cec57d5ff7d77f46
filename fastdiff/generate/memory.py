"""Estimate the memory of jobs before anything is loaded or computed.

    weights + copies of weights that a CPU keeps + the largest of
      encoding the picture, sampling (an evaluation, slots, embeddings, contexts), decoding
    + the images that the caller keeps

Only configs and sizes are read, so a model on the meta device (`load(path, device="meta")`) is
enough. Measured peaks are within 25% of the estimate (tests/generate/test_memory.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.weights import empty_model
from fastdiff.generate import superresolution
from fastdiff.generate.cost import TOKENS, inputs
from fastdiff.generate.facts import (
    ACTIVATIONS,
    SMALL,
    Facts,
    check,
    deep_numbers,
    default_batch,
)
from fastdiff.generate.job import InpaintJob, Job, TextJob, UpscaleJob
from fastdiff.generate.pictures import picture_size
from fastdiff.kernels import selected_backend
from fastdiff.kernels.sampler_step import HISTORY_SLOTS
from fastdiff.memory import check_memory
from fastdiff.models.controlnet import ControlNetConfig, with_controlnets
from fastdiff.runtime.blocks import block_size, row_blocks
from fastdiff.runtime.peak import Peak, peak_of

CHARACTERS = 300
"""Characters of a prompt that fill a chunk."""
FP32 = 4
SLACK = 1.15
"""Bytes allocated per byte of tensors: allocators leave gaps between small blocks, and oneDNN needs
scratch memory. Measured 1.02 to 1.35."""
BACKWARD = 1.25
"""Factor of what a forward pass keeps for its gradient, for temporary gradients."""
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Need:
    """Memory of jobs, in bytes."""

    weights: int
    """Weights of the networks that are not in memory yet."""
    work: int
    """Peak of the computation, including copies of weights."""
    kept: int
    """Images that the caller keeps."""

    @property
    def total(self) -> int:
        return self.weights + self.work + self.kept


@dataclass(frozen=True, kw_only=True)
class Call:
    """What all jobs of a call share."""

    device: torch.device
    dtype: torch.dtype
    """Dtype of the networks."""
    count: int
    """Number of images."""
    batch: int | None = None
    """Number of images computed at once; None: as `generate` chooses."""
    conditions: int = 1
    """Number of different prompts or classes."""
    kept: int = 0
    """Number of images that the caller keeps until the end."""

    @property
    def first_stage_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == torch.float16 else self.dtype


def check_fits(
    models: Sequence[Model | None], job: Job, call: Call, *, way_out: str, loaded: bool
) -> None:
    """Raise an error if a job, the first of several alike, would not fit in memory.

    models: the model and its refiner, if there is one. loaded: whether they are already in memory.

    Raises:
        NotEnoughMemory: more is needed than is free. Not raised if the free memory is unknown.
        ValueError: as for `facts.check`.
    """
    facts = Facts.of(models[0])  # type: ignore[arg-type]
    sizes = _sizes(check(job, facts), facts)
    if min(map(min, sizes)) < facts.factor:
        return  # too small for the networks: planning the job raises the error
    need = need_of([model for model in models if model is not None], job, call, loaded=loaded)
    height, width = sizes[-1]
    check_memory(
        need.total,
        f"making images of {width} x {height} with {models[0].name}",  # type: ignore[union-attr]
        device=call.device,
        way_out=way_out,
    )


def need_of(models: Sequence[Model], job: Job, call: Call, *, loaded: bool) -> Need:
    """Memory of a job, the first of several alike. Arguments as for `check_fits`."""
    facts = Facts.of(models[0])
    job = check(job, facts)
    sizes = _sizes(job, facts)
    work, copies = 0, 0
    stages = [(model, job) for model in models]
    if models[0].upsamplers:
        larger = replace(job, settings=superresolution.settings_of(job))
        stages += [(upsampler, larger) for upsampler in models[0].upsamplers]
    for model, own in stages:
        sampling = [_sampling(model, own, size, call) for size in sizes]
        copies += max(peak.copies for peak in sampling)
        work = max(work, *(peak.most for peak in sampling))
    if models[0].autoencoder is not None:
        tile = job.settings.tile or 0
        first = [_decoding(models[0], sizes[-1], tile, call)]
        if getattr(job, "image", None) is not None or _reencodes(job):
            first += [_encoding(models[0], size, tile, call) for size in sizes]
        copies += max(peak.copies for peak in first)
        work = max(work, *(peak.most for peak in first))
    height, width = sizes[-1]
    image = facts.image_channels * height * width * FP32
    return Need(
        weights=0 if loaded else sum(map(_weights, models)),
        work=round(SLACK * work) + copies,
        # fp32 images, a stacked copy for the sheet, and the sheet's own pixels
        kept=call.kept * 2 * (image + 3 * height * width) if call.kept > 1 else 0,
    )


def check_reconstruction(autoencoder: Any, images: Tensor) -> None:
    """Raise an error if a reconstruction (`generate.reconstruction`) would not fit in memory.

    images: (N, C, H, W).

    Raises:
        NotEnoughMemory: more memory is needed than is free.
    """
    weight = next(autoencoder.parameters())
    factor = autoencoder.downsample_factor
    if images.ndim != 4 or min(images.shape[2:]) < factor:
        return  # the autoencoder rejects them
    sides = images.shape[2] // factor, images.shape[3] // factor
    rows = block_size(*sides, weight.device) or len(images)
    maps = rows * math.prod(images.shape[2:]) * autoencoder.config.model_channels
    if FP32 * (ACTIVATIONS * maps + 2 * images.numel()) < SMALL:
        return
    stages = [
        _first_stage(
            autoencoder.config, way, rows, sides, weight.device, weight.dtype, selected_backend()
        )
        for way in ("encode", "decode")
    ]
    work = max(peak.most for peak in stages) + sum(peak.copies for peak in stages)
    height, width = images.shape[2:]
    check_memory(
        round(SLACK * work) + 2 * images.numel() * FP32,  # the result, in pieces and concatenated
        f"reconstructing {len(images):,} images of {width} x {height}",
        device=weight.device,
        way_out="use fewer or smaller images",
    )


def _weights(model: Model) -> int:
    tensors = (t for module in model.modules.values() for t in module.state_dict().values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _reencodes(job: Job) -> bool:
    """Whether an image is decoded, enlarged and encoded again in a second pass."""
    return isinstance(job, TextJob) and job.upscale is not None and job.upscale_via == "image"


def _sizes(job: Job, facts: Facts) -> list[Size]:
    """(height, width) of each image that a checked job samples, in order."""
    height, width = getattr(job, "height", None), getattr(job, "width", None)
    if height is None or width is None:
        picture = getattr(job, "image", None)
        height, width = (
            facts.size(height, width) if picture is None else picture_size(picture, height, width)
        )
    sizes = [(height, width)]
    scale = job.scale if isinstance(job, UpscaleJob) else getattr(job, "upscale", None)
    if scale is not None:
        step = facts.size_factor
        larger = [max(round(side * scale / step), 1) * step for side in sizes[0]]
        sizes.append((larger[0], larger[1]))
    return sizes


def _sampling(model: Model, job: Job, size: Size, call: Call) -> Peak:
    """Peak of the engine while it samples images of one size."""
    facts = Facts.of(model)
    assert model.denoiser is not None
    shape = facts.x_shape(*size)
    guided = 2 if job.settings.weight != 1 else 1
    slots = min(
        call.count,
        call.batch or job.settings.batch or default_batch(*shape[1:], text=facts.reads_text),
    )
    blocks = row_blocks(shape[1:], call.device)
    rows = guided * slots if blocks is None else blocks.guided if guided == 2 else blocks.single
    context = model.denoiser.config.context_dim
    tokens = 0 if context is None else TOKENS if facts.reads_text else 1
    words = getattr(job, "prompt", None) or ""
    tokens *= 1 + max(len(words) // CHARACTERS, words.count("BREAK"))
    config: Any = model.denoiser.config  # frozen, so it is hashable
    used = tuple(net.config for net in model.controlnets) if getattr(job, "control", ()) else ()
    peak = _evaluation(
        config, rows, shape[1:], tokens, call.device, call.dtype, selected_backend(), used
    )
    embedding, projected, output = peak.result
    x = math.prod(shape) * FP32
    masked = 4 if isinstance(job, InpaintJob) else 0
    conditions = min(call.conditions, slots) + guided - 1
    kept = (
        # x of requests and results, x and history of the slots
        slots * x * (2 + 1 + HISTORY_SLOTS + masked)
        # outputs of the blocks, and their concatenation
        + 2 * slots * guided * output
        + 2 * job.settings.total * conditions * embedding
        + conditions * projected
        # embedded pictures of the slots
        + slots * sum(net.encoder.model_channels for net in used) * math.prod(shape[1:]) * FP32
        # deep features of all slots, and those of an evaluation before they are copied there
        + deep_numbers(job, model, shape[1:], slots + rows) * call.dtype.itemsize
    )
    most = peak.most
    if model.classifier is not None and job.settings.classifier_scale:
        rows = slots if blocks is None else blocks.single
        guide = _gradient(model.classifier.config, rows, shape[1:], call.device, selected_backend())
        most = max(most, round(BACKWARD * guide.most))
    return Peak(most + kept, peak.copies, None)


@functools.lru_cache(maxsize=64)
def _gradient(config: Any, rows: int, sides: Size, device: torch.device, forced: str) -> Peak:
    """Peak of a classifier whose results are kept for the gradient. forced: see `_evaluation`."""
    network: Any = _empty(config, torch.float32)

    def call() -> None:
        x = torch.empty(rows, config.in_channels, *sides, device="meta")
        network(x, torch.empty(rows, device="meta"))

    return peak_of(network, call, device=device, dtype=torch.float32, training=True)


@functools.lru_cache(maxsize=64)
def _evaluation(
    config: Any,
    rows: int,
    sides: Size,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    forced: str,
    controlnets: tuple[ControlNetConfig, ...] = (),
) -> Peak:
    """Peak of a network. result: bytes per row of the embedding, the projected context, the output.

    forced: the selected backend, part of the key because it decides the scratch memory of ops.
    controlnets: those that are used.
    """
    nets: Any = [_empty(net, dtype) for net in controlnets]
    network: Any = with_controlnets(_empty(config, dtype), nets)  # type: ignore[arg-type]

    def call() -> tuple[int, int, int]:
        x, emb, context = inputs(network, rows, sides, tokens, dtype)
        if controlnets:
            hints = [
                torch.empty(
                    (rows, net.encoder.model_channels, *sides),
                    dtype=dtype,
                    device="meta",
                    memory_format=torch.channels_last,
                )
                for net in controlnets
            ]
            scales = torch.empty(rows, len(hints), device="meta")
            out = network.body_controlled(x, emb, context, range(len(hints)), hints, scales)
        else:
            out = network.body(x, emb, context)
        return tuple(_bytes(found) // rows for found in (emb, context, out))  # type: ignore[return-value]

    return peak_of(network, call, device=device, dtype=dtype)


def _decoding(model: Model, size: Size, tile: int, call: Call) -> Peak:
    """Peak of decoding one batch of latents."""
    assert model.autoencoder is not None
    config, factor = model.autoencoder.config, model.autoencoder.downsample_factor
    sides = size[0] // factor, size[1] // factor
    pieces = block_size(*sides, call.device) or min(call.count, call.batch or 4)
    dtype = call.first_stage_dtype
    tiled = bool(tile) and max(sides) > tile
    inner = (min(sides[0], tile), min(sides[1], tile)) if tiled else sides
    peak = _first_stage(config, "decode", pieces, inner, call.device, dtype, selected_backend())
    images = pieces * config.image_channels * size[0] * size[1] * dtype.itemsize
    # joining and clamping holds three copies of an image; tiling holds one while tiles are decoded
    most = max(peak.most + images * tiled, 3 * images)
    return Peak(most, peak.copies, None)


def _encoding(model: Model, size: Size, tile: int, call: Call) -> Peak:
    """Peak of encoding a picture."""
    assert model.autoencoder is not None
    config, factor = model.autoencoder.config, model.autoencoder.downsample_factor
    sides = size[0] // factor, size[1] // factor
    dtype = call.first_stage_dtype
    if tile and max(sides) > tile:
        sides = min(sides[0], tile), min(sides[1], tile)
    peak = _first_stage(config, "encode", 1, sides, call.device, dtype, selected_backend())
    image = config.image_channels * size[0] * size[1] * FP32
    return Peak(peak.most + 2 * image, peak.copies, None)


@functools.lru_cache(maxsize=64)
def _first_stage(
    config: Any,
    way: str,
    images: int,
    sides: Size,
    device: torch.device,
    dtype: torch.dtype,
    forced: str,
) -> Peak:
    """Peak of an autoencoder.

    sides: (h, w) of the latents. way: "encode" or "decode". Other arguments as for `_evaluation`.
    """
    autoencoder: Any = _empty(config, dtype)
    factor = autoencoder.downsample_factor

    def call() -> None:
        if way == "decode":
            shape = (images, config.latent_channels, *sides)
            autoencoder.decode(torch.empty(shape, dtype=dtype, device="meta"))
        else:
            shape = (images, config.image_channels, sides[0] * factor, sides[1] * factor)
            autoencoder.encode_latent(torch.empty(shape, dtype=dtype, device="meta"))

    return peak_of(autoencoder, call, device=device, dtype=dtype)


def _empty(config: Any, dtype: torch.dtype) -> nn.Module:
    module = empty_model(config, "the config", 2**62)
    return module.to(dtype).eval()


def _bytes(tensors: Any) -> int:
    """Bytes of a tensor or of nested lists of tensors; 0 for None."""
    if tensors is None:
        return 0
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))
