"""The shapes that presets pass to each op, recorded in a forward pass on the meta device.

No shape is written by hand: `Job.collect` runs a preset's network without data and records the
arguments of every public op of `fastdiff.kernels`.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from fastdiff import kernels
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.network import network_family
from fastdiff.models.presets import AUTOENCODERS, DITS, UNETS
from fastdiff.runtime.prepare import pack

Shape = tuple[int, ...]
Function = Callable[..., Any]
CONTEXT_TOKENS = 77  # Stable Diffusion's text encoder
DENOISERS: dict[str, dict[str, Any]] = {"unet": UNETS, "dit": DITS}
"""Family -> its presets."""


@dataclass(frozen=True)
class Call:
    """An op and the shapes of its arguments."""

    op: str
    tensors: tuple[Shape, ...]
    """Shapes of the positional tensors, in order."""
    options: tuple[tuple[str, Shape], ...] = ()
    """Names and shapes of the keyword tensors."""

    @property
    def numbers(self) -> int:
        return sum(torch.Size(s).numel() for s in (*self.tensors, *dict(self.options).values()))

    @property
    def weights(self) -> tuple[int, ...]:
        """Places of the matrices among the positional tensors that are weights."""
        names = [name for name, kind in kernels.OPS[self.op].types.items() if "Tensor" in kind]
        return tuple(
            place
            for place, (name, shape) in enumerate(zip(names, self.tensors, strict=False))
            if name == "weight" and len(shape) > 1
        )

    def at_batch(self, batch: int) -> Call:
        """This call, which has batch size 1, at batch size `batch`.

        Tensors with more than one dimension are per sample, except `weights`; the others are
        weights.
        """

        def scaled(shape: Shape) -> Shape:
            return (batch * shape[0], *shape[1:]) if len(shape) > 1 else shape

        weights = self.weights
        return replace(
            self,
            tensors=tuple(
                shape if place in weights else scaled(shape)
                for place, shape in enumerate(self.tensors)
            ),
            options=tuple((name, scaled(shape)) for name, shape in self.options),
        )

    def __str__(self) -> str:
        """The first tensor, the number of keys in cross-attention, and the options; a
        `channel_add` that all samples share is a bias."""
        first, *others = self.tensors
        keys = f" to {others[0][1]}" if self.op == "attention" and others[0] != first else ""
        bias = ("channel_add", 1)
        names = ["bias" if (name, len(s)) == bias else name for name, s in self.options]
        return ", ".join([f"{first}{keys}", *names])


def call_of(op: str, args: tuple[Any, ...]) -> Call:
    """The call with these arguments; options are the public function's keyword-only tensors."""
    parameters = inspect.signature(kernels.OPS[op].public).parameters
    given = zip(kernels.OPS[op].types, args, strict=False)  # without `keep`, the last one
    shapes = [(name, tuple(a.shape)) for name, a in given if isinstance(a, Tensor)]
    by_name = [parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name, _ in shapes]
    tensors = tuple(shape for (_, shape), named in zip(shapes, by_name, strict=True) if not named)
    options = [pair for pair, named in zip(shapes, by_name, strict=True) if named]
    return Call(op, tensors, tuple(sorted(options)))


@contextmanager
def wrapped(wrap: Callable[[str, Function], Function]) -> Iterator[None]:
    """Replace the forward pass of every backend by ``wrap(op, forward)``."""
    before = {name: op.backends for name, op in kernels.OPS.items()}
    for name, op in kernels.OPS.items():
        op.use({key: known.wrapped(partial(wrap, name)) for key, known in op.backends.items()})
    try:
        yield
    finally:
        for name, op in kernels.OPS.items():
            op.use(before[name])


@contextmanager
def noting(calls: Counter[Call]) -> Iterator[None]:
    """Count each op's calls by the shapes of its tensors."""

    def noted(name: str, function: Function) -> Function:
        def run(*args: Any) -> Any:
            calls[call_of(name, args)] += 1
            return function(*args)

        return run

    with wrapped(noted):
        yield


@dataclass(frozen=True, kw_only=True)
class Job:
    """One evaluation of a preset's network, in which each op has a share."""

    network: Literal["unet", "dit", "decoder"]
    """A family of denoisers, or the decoder of an autoencoder."""
    preset: str
    size: int
    """Height and width of x or z."""
    batch: int

    @property
    def config(self) -> Any:
        return DENOISERS.get(self.network, AUTOENCODERS)[self.preset]

    @property
    def channels(self) -> int:
        """Of x or z."""
        config = self.config
        return int(config.in_channels if self.network in DENOISERS else config.latent_channels)

    @property
    def norm_groups(self) -> int:
        """Groups of the GroupNorms; a network without any has one."""
        return getattr(self.config, "norm_groups", 1)

    def build(
        self, device: str, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.nn.Module, dict[str, Tensor]]:
        """The network, channels_last like from `runtime.prepare`, and the inputs of its forward.

        Weights and data are small random numbers; the time does not depend on them.
        """
        with torch.device("meta"):
            if self.network in DENOISERS:
                family = network_family(self.network)
                module: torch.nn.Module = family.network(self.config)
            else:
                module = Autoencoder(self.config).decoder
        module = module.to(dtype)
        if device != "meta":
            generator = torch.Generator(device).manual_seed(0)
            module = module.to_empty(device=device)
            for parameter in module.parameters():
                parameter.data.normal_(0, 0.02, generator=generator)
        module = module.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if device != "cpu":
            pack(module)
        return module, self.inputs(device, dtype)

    def inputs(self, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The arguments of the network's forward."""
        with torch.device(device):
            inputs = self._inputs()
        for name in ("x", "context", "added"):
            if name in inputs:
                inputs[name] = inputs[name].to(dtype)
        return inputs

    def _inputs(self) -> dict[str, Tensor]:
        config, denoises = self.config, self.network in DENOISERS
        x = torch.zeros(self.batch, self.channels, self.size, self.size)
        inputs = {"x": x.contiguous(memory_format=torch.channels_last)}
        if denoises:
            inputs["t"] = torch.zeros(self.batch)
            if config.context_dim:
                inputs["context"] = torch.zeros(self.batch, CONTEXT_TOKENS, config.context_dim)
            if config.added_condition_dim:
                inputs["added"] = torch.zeros(self.batch, config.added_condition_dim)
            if config.num_classes:
                inputs["y"] = torch.zeros(self.batch, dtype=torch.int64)
        return inputs

    @lru_cache  # noqa: B019 - the jobs are constants
    def collect(self) -> Counter[Call]:
        """Count the calls of each op by their shapes."""
        calls: Counter[Call] = Counter()
        module, inputs = self.build("meta")
        # without what only inference on a GPU fuses (models.layers.fuses)
        with torch.device("meta"), torch.enable_grad(), noting(calls):
            module(**inputs)
        return calls

    def largest(self, op: str) -> Call:
        """The call of `op` with the most elements in its tensors."""
        return max((c for c in self.collect() if c.op == op), key=lambda call: call.numbers)


JOBS = {
    "digits U-Net": Job(network="unet", preset="digits", size=8, batch=16),
    "digits decoder": Job(network="decoder", preset="digits", size=8, batch=8),
    "SD 1.5 U-Net": Job(network="unet", preset="sd1", size=64, batch=1),
    "KL-f8 decoder": Job(network="decoder", preset="kl-f8", size=32, batch=1),
}
"""Batch sizes of the digits are the blocks of runtime/blocks.py: 8 images, 16 rows if guided."""


GPU_JOBS = {
    "SD 1.5 U-Net": Job(network="unet", preset="sd1", size=64, batch=2),
    "SDXL U-Net": Job(network="unet", preset="sdxl", size=128, batch=2),
    "KL-f8 decoder": Job(network="decoder", preset="kl-f8", size=64, batch=1),
    "ADM-256 U-Net": Job(network="unet", preset="adm-imagenet256", size=256, batch=8),
}
"""The batch sizes measured first: one guided image, one image, a batch of samples."""
GPU_BATCHES = (1, 2, 8, 16)


def jobs_with(op: str) -> list[str]:
    """The jobs in which an op occurs."""
    return [name for name, job in JOBS.items() if any(call.op == op for call in job.collect())]
