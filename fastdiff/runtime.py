"""Between a network and the sampling loop: layout, precomputed conditions, blocks of fixed size.

The same seed must give the same bits alone and at any place of any batch. Convolutions and matrix
products on the CPU do not promise that: oneDNN picks another kernel for another batch size, with
another order of summation. At one and the same batch size they are independent of the place and, in
channels_last, of the number of threads (measured: docs/decisions.md). So the network on the CPU
always sees blocks of one fixed size; the last block is filled up with copies of its last row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastdiff.cpu import prepare_layers
from fastdiff.models.unet import ContextKV, UNet, UNetConfig

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


@dataclass(frozen=True, eq=False, kw_only=True)
class Condition:
    """What a sample is conditioned on; samples that share one object share its precomputation."""

    label: int | None = None
    """Row of the label embedding; see :func:`check_label`."""
    context: Tensor | None = None
    """(1, T, D): the tokens that the cross-attentions read."""
    added: Tensor | None = None
    """(1, A): the vector added to the time embedding."""

    @property
    def tokens(self) -> int:
        """T; the samples of one evaluation must agree in it."""
        return 0 if self.context is None else self.context.shape[1]

    @property
    def key(self) -> tuple[int | None, int]:
        """What the embedding depends on."""
        return self.label, id(self.added)


def class_conditions(
    config: UNetConfig, labels: Sequence[int | None], *, guided: bool
) -> tuple[list[Condition], list[Condition] | None]:
    """Conditions for classes, and the unconditional ones if guided: one object per class.

    labels: one per sample: a class, or None for no class.

    Raises:
        ValueError: a label out of range; no class, or guidance, without a null class for it.
    """
    rows = [check_label(label, config.num_classes, config.null_class) for label in labels]
    null = check_guidance(config.num_classes, config.null_class) if guided else None
    kinds = {row: Condition(label=row) for row in [*rows, null]}
    return [kinds[row] for row in rows], [kinds[null]] * len(rows) if guided else None


class Denoiser:
    """A U-Net with its conditions: the ``predict(x, row)`` that the sampling loop calls.

    Computed once, here: the embeddings of all (timestep, condition) pairs, and each condition's
    keys and values in every cross-attention. A step looks them up.
    """

    def __init__(
        self,
        unet: UNet,
        timesteps: Tensor | Sequence[float],
        conditions: Sequence[Condition],
        unconditional: Sequence[Condition] | None = None,
        *,
        guided: Sequence[bool] | None = None,
        extra: Tensor | None = None,
        block: int | None = None,
    ) -> None:
        """
        timesteps: (rows,), the t of each row.
        conditions: one per sample, all with as many tokens.
        unconditional: one per sample, for guidance; None if no row is guided.
        guided: for each row, whether it is; None: all are where there is `unconditional`.
        extra: (N, C, H, W), channels that the U-Net reads behind those of x, as for inpainting.
        block: samples per evaluation; see :func:`block_size`.
        """
        assert unconditional is None or len(unconditional) == len(conditions)
        self.unet, self.block, self.extra = unet, block, extra
        weight = next(unet.parameters())
        self.dtype, device = weight.dtype, weight.device
        kinds = list(dict.fromkeys([*conditions, *(unconditional or ())]))
        assert len({kind.tokens for kind in kinds}) == 1, "samples differ in their tokens"
        self.guided = [unconditional is not None] * len(timesteps) if guided is None else guided
        assert unconditional is not None or not any(self.guided), "guided without unconditional"
        different = list(dict.fromkeys(_floats(timesteps)))
        self.place = [different.index(t) for t in _floats(timesteps)]  # row -> embedding
        self.kinds = [kinds.index(condition) for condition in conditions]
        self.null = [kinds.index(condition) for condition in unconditional or ()]
        self.samples = torch.arange(len(conditions))
        self._chosen: dict[tuple[int, ...], tuple[Tensor, ContextKV]] = {}
        with torch.inference_mode():
            t = torch.tensor(different, dtype=torch.float32, device=device)
            # One call per condition, so that each has the same shape in any batch.
            vectors: dict[tuple[int | None, int], Tensor] = {}
            for kind in kinds:
                if kind.key not in vectors:
                    y = None if kind.label is None else torch.full_like(t, kind.label).long()
                    added = kind.added
                    added = None if added is None else added.to(device).expand(len(t), -1)
                    vectors[kind.key] = unet.embed(t, y, added)
            kinds_of_rows = [vectors[kind.key] for kind in kinds]
            self.embeddings = torch.stack(kinds_of_rows, dim=1)  # (timesteps, conditions, E)
            self.kvs = [
                unet.project_context(kind.context.to(device, self.dtype))
                for kind in kinds
                if kind.context is not None
            ]

    @torch.inference_mode()
    def __call__(self, x: Tensor, row: int) -> Tensor:
        """x: (N, C, H, W). Returns in its dtype (N, ...), if the row is guided (2N, ...) = [uncond;
        cond]."""
        assert len(x) == len(self.kinds), f"{len(self.kinds)} conditions for {len(x)} samples"
        guided, emb = self.guided[row], self.embeddings[self.place[row]]

        def evaluate(piece: Tensor, samples: Sequence[int]) -> Tensor:
            chosen = [self.kinds[sample] for sample in samples]
            if guided:
                piece = torch.cat([piece, piece])
                chosen = [self.null[sample] for sample in samples] + chosen
            index, kvs = self._choose(tuple(chosen))
            return self.unet.body(piece, emb[index], kvs)

        inputs = x if self.extra is None else torch.cat([x, self.extra.to(x)], dim=1)
        inputs = inputs.to(self.dtype)
        if self.block is None:
            piece = inputs.contiguous(memory_format=torch.channels_last)
            return evaluate(piece, range(len(x))).to(x.dtype)
        return in_blocks(
            lambda piece, samples: evaluate(piece, samples.tolist()),
            self.block,
            inputs,
            self.samples,
        ).to(x.dtype)

    def _choose(self, chosen: tuple[int, ...]) -> tuple[Tensor, ContextKV]:
        """The conditions of a piece as an index, and their keys and values, gathered once."""
        if chosen not in self._chosen:
            index = torch.tensor(chosen, device=self.embeddings.device)
            kvs = [self.kvs[kind] for kind in chosen] if self.kvs else []
            gathered = [
                [torch.cat(same) for same in zip(*blocks, strict=True)]
                for blocks in zip(*kvs, strict=True)
            ]
            self._chosen[chosen] = (index, gathered)
        return self._chosen[chosen]


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
