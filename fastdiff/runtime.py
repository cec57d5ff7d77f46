"""Between a network and the sampling loop: layout, precomputed embeddings, blocks of fixed size.

The same seed must give the same bits alone and at any place of any batch. Convolutions and matrix
products on the CPU do not promise that: oneDNN picks another kernel for another batch size, with
another order of summation. At one and the same batch size they are independent of the place and, in
channels_last, of the number of threads (measured: docs/decisions.md). So the network on the CPU
always sees blocks of one fixed size; the last block is filled up with copies of its last row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastdiff.cpu import prepare_layers
from fastdiff.models.unet import UNet

BLOCK_PIXELS = 512
"""Pixels of x that the network sees at once on the CPU: enough that a call's overhead is small."""

Module = TypeVar("Module", bound=nn.Module)


def prepare(
    module: Module,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    keep_copies: bool = True,
    half_as_fp32: bool | None = None,
) -> Module:
    """Make a module ready for inference, in place: device, dtype, layout, eval, no gradients.

    On the CPU its convolutions, linear layers and upsamplings then compute as `fastdiff.cpu` says.

    Args:
        keep_copies: CPU: let layers keep a second, faster form of their weights, made at the first
            call. In fp32 that is 2.3 GB beside the 3.4 GB of Stable Diffusion 1.5's U-Net;
            where bf16 or fp16 weights are computed with in fp32, 4 bytes for each of their 2.
            Results depend on it by rounding only: of an upsampling's weights, and in small
            convolutions, for which PyTorch has another kernel.
        half_as_fp32: CPU: whether convolutions and linear layers with bf16 or fp16 weights compute
            in fp32 and round their results; None: where the CPU lacks the instructions
            (AVX512-BF16, AVX512-FP16, AMX, Arm's), which is said once in the log.
    """
    module.to(device=device, dtype=dtype)
    if channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.eval().requires_grad_(False)
    if torch.device(device).type == "cpu":
        prepare_layers(module, keep_copies=keep_copies, half_as_fp32=half_as_fp32)
    return module


def block_size(height: int, width: int, device: torch.device) -> int | None:
    """Samples per evaluation, from the size of one sample alone; None: the batch as it comes.

    8 at 8x8, 1 from 32x32 on, where one image fills the cores and a batch would gain nothing. Other
    devices take the whole batch: same seeds agree there up to rounding, not bit for bit.
    """
    if device.type != "cpu":
        return None
    return min(8, max(1, BLOCK_PIXELS // (height * width)))


def in_blocks(
    function: Callable[..., Tensor], block: int | None, x: Tensor, *others: Tensor
) -> Tensor:
    """Call ``function(x, *others)`` on blocks of exactly ``block`` rows and join what it returns.

    x: (N, C, H, W), handed on in channels_last and always with the same strides. others: (N, ...).
    ``function`` returns (k * rows, ...), k parts stacked along the batch, as guidance's two halves
    are; they stay stacked: (k * N, ...).
    """
    rows = len(x) if block is None else block
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(x), rows):
        index = torch.arange(start, start + rows, device=x.device).clamp_(max=len(x) - 1)
        # Copied into a fresh tensor: slices of different batches may come with different strides,
        # and strides too decide which convolution runs.
        piece = x.new_empty((rows, *x.shape[1:])).contiguous(memory_format=torch.channels_last)
        piece.copy_(x[index])
        out = function(piece, *(other[index] for other in others))
        kept = min(rows, len(x) - start)
        parts.append(tuple(half[:kept] for half in out.split(rows)))
    halves = [torch.cat(half) for half in zip(*parts, strict=True)]
    return halves[0] if len(halves) == 1 else torch.cat(halves)


class Denoiser:
    """A U-Net with its class labels: the ``predict(x, t, guided)`` that the sampling loop calls.

    The embeddings of all (timestep, class) pairs are computed once, here; a step looks them up.
    """

    def __init__(
        self,
        unet: UNet,
        timesteps: Tensor | Sequence[float],
        labels: Sequence[int | None],
        *,
        guided: bool,
        block: int | None = None,
    ) -> None:
        """
        timesteps: (rows,), every t that will be asked for.
        labels: one per sample: a class, or None for no class.
        guided: whether the unconditional half will be asked for too.
        block: samples per evaluation; see :func:`block_size`.

        Raises:
            ValueError: a label out of range; no class, or guidance, without a null class for it.
        """
        config = unet.config
        if config.context_dim is not None or config.added_condition_dim is not None:
            raise ValueError(
                "expected a U-Net conditioned on classes or on nothing, got one with context "
                "tokens; call UNet.forward with context="
            )
        self.unet, self.block = unet, block
        weight = next(unet.parameters())
        self.dtype, device = weight.dtype, weight.device
        used = [check_label(label, config.num_classes, config.null_class) for label in labels]
        if guided:
            used.append(check_guidance(config.num_classes, config.null_class))
        kinds = sorted({label for label in used if label is not None})
        self.place = {float(t): row for row, t in enumerate(dict.fromkeys(_floats(timesteps)))}
        with torch.inference_mode():
            t = torch.tensor(list(self.place), dtype=torch.float32, device=device)
            ys: list[Tensor | None] = [torch.full((len(t),), y, device=device) for y in kinds]
            # (rows, labels, E); one call per label, so that each has the same shape in any batch
            self.embeddings = torch.stack([unet.embed(t, y) for y in ys or [None]], dim=1)
        index = torch.tensor([0 if y is None else kinds.index(y) for y in used], device=device)
        self.index = index[: len(labels)]
        self.null = index[-1] if guided else None

    @torch.inference_mode()
    def __call__(self, x: Tensor, t: float, guided: bool) -> Tensor:
        """x: (N, C, H, W). Returns fp32 (N, ...), or (2N, ...) = [unconditional; conditional]."""
        assert len(x) == len(self.index), f"{len(self.index)} labels for {len(x)} samples"
        assert not guided or self.null is not None, "made without guided=True"
        emb = self.embeddings[self.place[t]]

        def evaluate(piece: Tensor, labels: Tensor) -> Tensor:
            if guided:
                assert self.null is not None
                piece = torch.cat([piece, piece])
                labels = torch.cat([self.null.expand(len(labels)), labels])
            return self.unet.body(piece, emb[labels])

        return in_blocks(evaluate, self.block, x.to(self.dtype), self.index).float()


def check_label(label: int | None, num_classes: int | None, null_class: bool) -> int | None:
    """The row of the label embedding for a class or for None; None for a model without classes.

    Raises:
        ValueError: out of range, or not to be had from this model.
    """
    if label is None:
        if num_classes is None:
            return None
        if not null_class:
            raise ValueError(
                f"this model has no null class, got None; give a class from 0 to {num_classes - 1}"
            )
        return num_classes
    if num_classes is None:
        raise ValueError(f"this model has no classes, got class {label}; give None")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_classes:
        raise ValueError(f"class must be from 0 to {num_classes - 1}, got {label!r}")
    return label


def check_guidance(num_classes: int | None, null_class: bool) -> int:
    """The row of the label embedding that stands for "no class" in guidance.

    Raises:
        ValueError: the model cannot be guided.
    """
    if num_classes is None or not null_class:
        lacks = "has no classes" if num_classes is None else "was trained without a null class"
        raise ValueError(f"guidance is not to be had: this model {lacks}; use guidance_scale 1")
    return num_classes


def _floats(timesteps: Tensor | Sequence[float]) -> list[float]:
    return timesteps.tolist() if isinstance(timesteps, Tensor) else [float(t) for t in timesteps]
