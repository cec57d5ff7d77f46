"""Faster convolutions and linear layers for CPUs, with the same results and dtypes.

`runtime.prepare` installs them in a module. Each is used only where it was measured to be faster
(docs/decisions/runtime.md):

- **Packed weights.** oneDNN needs a convolution's weights in a blocked layout and reorders them in
  every call, which at Stable Diffusion's 8x8 level takes longer than the products. Here they are
  reordered once. The result is bit-identical to oneDNN's convolution; for small inputs PyTorch has
  a convolution of its own, which rounds differently.
- **Folded upsampling.** A nearest-neighbor doubling followed by a 3x3 convolution equals one
  transposed convolution with a 4x4 kernel and stride 2: 16 instead of 36 products per pixel of the
  small image. The kernel's sums of weights are computed in fp64 and rounded once.
- **fp32 arithmetic for half precision**, if the CPU has no instructions for it, since oneDNN and
  PyTorch emulate them many times slower. bf16 and fp16 numbers are exact in fp32, and the result is
  rounded once to the dtype, which is what the instructions would have done.

Each keeps a second copy of its weights: in fp32, and 16/9 of the size if folded. The parameters
stay in place, and the copy is rebuilt when they change. A write through ``parameter.data``, numpy
or shared memory is only detected by a sample of 16 numbers: that finds dense changes, such as a
merged LoRA; after other changes call `prepare` again. When gradients are needed, and under
`torch.compile`, `torch.jit.trace`, `torch.func` and dispatch modes, PyTorch's own layers run. Tools
that depend on a layer's exact class or its source (`torch.fx`, `torch.jit.script`,
`quantize_dynamic`) need a module that was not prepared for the CPU.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.kernels.choose import can_bypass_dispatcher
from fastdiff.models.layers import Upsample

PACK_NUMBERS = 2**19
"""Smaller weights are neither packed nor folded: the layers of the digits model gained nothing."""
PACK_PIXELS = 4096
"""Up to this many output pixels packing gains more than 5%; with 4 times as many, it is 3%."""
FOLD_PIXELS = 256
"""From this many input pixels on folding is faster; below, reading the larger kernel dominates."""

INSTRUCTIONS = {
    torch.bfloat16: frozenset({"avx512_bf16", "amx_bf16", "bf16", "sve_bf16", "svebf16"}),
    torch.float16: frozenset({"avx512_fp16", "amx_fp16", "fp16_arith", "asimdhp"}),
}
"""CPU features, as named by PyTorch or Linux; any of them makes arithmetic in the dtype fast."""
LESSER_ISAS = {
    torch.bfloat16: frozenset(
        {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
    ),
}
LESSER_ISAS[torch.float16] = LESSER_ISAS[torch.bfloat16] | {"AVX512_CORE_BF16"}
"""Values of ONEDNN_MAX_CPU_ISA that keep oneDNN from using the dtype's instructions."""

logger = logging.getLogger(__name__)


def fast_half(dtype: torch.dtype) -> bool:
    """Whether convolutions and products in a half-precision dtype are fast on this machine."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return (
        torch.backends.mkldnn.is_available()
        and limit not in LESSER_ISAS[dtype]
        and bool(INSTRUCTIONS[dtype] & cpu_features())
    )


@cache
def cpu_features() -> frozenset[str]:
    """The features of this CPU, from PyTorch (2.11 and later) or Linux; empty if unknown."""
    if hasattr(torch.cpu, "get_capabilities"):
        return frozenset(name for name, has in torch.cpu.get_capabilities().items() if has is True)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":") for line in lines)
    return frozenset(
        flag
        for name, _, flags in named
        if name.strip() in ("flags", "Features")
        for flag in flags.split()
    )


@cache
def _say_fp32(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    logger.warning(
        "this CPU has no fast %s arithmetic: convolutions and linear layers compute in float32 "
        "and round their results to %s; dtype=torch.float32 would take less memory and time",
        name,
        name,
    )


@cache
def packing_objection() -> str | None:
    """Why convolutions cannot be packed with this torch, or None.

    Packed convolutions are undocumented operators that Inductor uses, so this tries them out. The
    reason is logged once.
    """
    objection = _try_packing()
    if objection is not None:
        logger.warning("convolutions run with unpacked weights, which is slower: %s", objection)
    return objection


def _try_packing() -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    x = torch.ones(1, 16, 4, 4, dtype=torch.float32, device="cpu")
    weight = torch.ones(16, 16, 3, 3, dtype=torch.float32, device="cpu")
    x = x.contiguous(memory_format=torch.channels_last)
    conv = ConvOptions(bias=None, padding=(1, 1), stride=(1, 1), dilation=(1, 1), groups=1)
    try:
        y = packed_conv(x, conv.pack(weight, x), conv)
        z = packed_fold(x, pack_folded(folded(weight), x), None)
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"the operators of PyTorch {torch.__version__} differ: {str(error).splitlines()[0]}"
    # 16 channels of ones: 4 taps of the kernel are inside the image at a corner, 9 in the middle
    right = (
        y[0, 0, 0, 0] == 64
        and y[0, 0, 1, 1] == 144
        and z[0, 0, 0, 0] == 64
        and z[0, 0, 3, 3] == 144
    )
    return (
        None if right else f"PyTorch {torch.__version__}'s packed convolutions give wrong results"
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options of a prepared layer."""

    keep_copies: bool
    half_as_fp32: bool

    def widens(self, dtype: torch.dtype) -> bool:
        return self.half_as_fp32 and dtype in INSTRUCTIONS


@dataclass(frozen=True, kw_only=True)
class ConvOptions:
    """The arguments of `packed_conv` besides input and weight."""

    bias: Tensor | None
    padding: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def pack(self, weight: Tensor, x: Tensor) -> Tensor:
        """The weight in oneDNN's layout for inputs like x (other inputs give the same result)."""
        return torch.ops.mkldnn._reorder_convolution_weight(
            weight, self.padding, self.stride, self.dilation, self.groups, list(x.shape)
        )


def packed_conv(x: Tensor, weight: Tensor, conv: ConvOptions) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups, "none", [], ""
    )


def folded(weight: Tensor) -> Tensor:
    """The kernel of the transposed convolution that equals a doubling and this 3x3 convolution.

    weight: (O, I, 3, 3), padding 1 -> fp32 (I, O, 4, 4), for stride 2 and padding 1.
    Nearest-neighbor doubling is a transposed convolution with a 2x2 kernel of ones. The composition
    of two convolutions has the full convolution of their kernels as its kernel.
    """
    wide = torch.zeros(weight.shape[0], weight.shape[1], 4, 4, dtype=torch.float64, device="cpu")
    for row in (0, 1):
        for column in (0, 1):
            wide[:, :, row : row + 3, column : column + 3] += weight
    # PyTorch's convolutions correlate and their transposes convolve, so mirror the kernel
    return wide.flip(2, 3).transpose(0, 1).float().contiguous()


def pack_folded(weight: Tensor, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_transpose_weight(
        weight, [1, 1], [0, 0], [2, 2], [1, 1], 1, list(x.shape)
    )


def packed_fold(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._convolution_transpose_pointwise(
        x, weight, bias, [1, 1], [0, 0], [2, 2], [1, 1], 1, "none", [], ""
    )


class Kept:
    """A cached form of parameters, rebuilt when they have changed.

    Copies and pickles of the module start without it.
    """

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Free the memory of the form; the next call rebuilds it."""
        self.sources: tuple[Tensor | None, ...] = ()
        self.state: tuple[Any, ...] = ()
        self.form: Any = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def __call__(self, parameters: tuple[Tensor | None, ...], make: Callable[[], Any]) -> Any:
        if any(p is not None and p.is_inference() for p in parameters):
            return make()  # inference tensors have no version counter, so do not cache
        state = tuple(None if p is None else _state(p) for p in parameters)
        if state != self.state:
            self.form = make()
            # keep the storage alive, so that no other tensor can get the same address
            self.sources = tuple(None if p is None else p.detach() for p in parameters)
            self.state = state
        return self.form


def _state(parameter: Tensor, count: int = 16) -> tuple[int, int, bytes]:
    """A fingerprint of a parameter. It includes a sample of its numbers, because peft merges a LoRA
    through `.data`, which does not increment the version."""
    stride = max(1, parameter.numel() // count)
    few = parameter.detach().as_strided((min(count, parameter.numel()),), (stride,)).clone()
    return parameter.data_ptr(), parameter._version, few.view(torch.uint8).numpy().tobytes()


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float()


def _usual(x: Tensor, weight: Tensor) -> bool:
    """Whether to leave a call to PyTorch: another device, mixed dtypes, autocast, or no oneDNN."""
    return (
        not x.is_cpu
        or not torch.backends.mkldnn.enabled
        or not weight.is_cpu
        or x.dtype is not weight.dtype
        or torch.is_autocast_enabled("cpu")
    )


PLAIN = Plan(keep_copies=False, half_as_fp32=False)
"""The plan of a layer that other code creates from a prepared class, as peft does for LoRA."""


class Prepared(nn.Module):
    """Base class of the prepared layers."""

    plan: Plan = PLAIN
    kept: Kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Prepared:
        """Drop the copy when the module moves to another device or dtype."""
        if "kept" in self.__dict__:  # a layer that peft creates from our class has none
            self.kept.drop()
        super()._apply(fn, recurse)
        return self


class PreparedConv2d(Prepared, nn.Conv2d):
    """A convolution with packed weights, in fp32 if the plan says so."""

    def forward(self, x: Tensor) -> Tensor:
        if _usual(x, self.weight) or x.ndim != 4:
            return super().forward(x)
        wide = self.plan.widens(x.dtype)
        keeps = (
            self.plan.keep_copies and x.is_cpu and can_bypass_dispatcher(x, self.weight, self.bias)
        )
        packs = keeps and self._packs(x, wide)
        if packs:
            conv, weight = self.kept((self.weight, self.bias), lambda: self._pack(x))
            return packed_conv(x.float(), weight, conv).to(x.dtype)
        if not wide:
            return super().forward(x)
        weight, bias = self.weight.float(), None if self.bias is None else self.bias.float()
        return self._conv_forward(x.float(), weight, bias).to(x.dtype)

    def _packs(self, x: Tensor, wide: bool) -> bool:
        """Whether packing is possible and faster."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or packing_objection():
            return False
        if wide:  # the copy is needed anyway
            return True
        return pack_wins(self, x) and x.is_contiguous(memory_format=torch.channels_last)

    def _pack(self, x: Tensor) -> tuple[ConvOptions, Tensor]:
        conv = ConvOptions(
            bias=_float(self.bias),
            padding=tuple(int(p) for p in self.padding),
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
        )
        return conv, conv.pack(self.weight.detach().float(), x)


def pack_wins(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a convolution in fp32 is faster packed. x: (N, C, H, W), its input."""
    pixels = len(x) * x.shape[2] * x.shape[3] // (conv.stride[0] * conv.stride[1])
    large = conv.weight.numel() >= PACK_NUMBERS
    return x.dtype is torch.float32 and large and pixels <= PACK_PIXELS


class PreparedLinear(Prepared, nn.Linear):
    """A linear layer that computes in fp32 if the plan says so."""

    def forward(self, x: Tensor) -> Tensor:
        if _usual(x, self.weight) or not self.plan.widens(x.dtype):
            return super().forward(x)
        if self.plan.keep_copies and x.is_cpu and can_bypass_dispatcher(x, self.weight, self.bias):
            weight, bias = self.kept(
                (self.weight, self.bias), lambda: (_float(self.weight), _float(self.bias))
            )
        else:
            weight, bias = self.weight.float(), None if self.bias is None else self.bias.float()
        return F.linear(x.float(), weight, bias).to(x.dtype)


def _folds(conv: nn.Conv2d) -> bool:
    """Whether a convolution meets the assumptions of `folded`, and has no hooks."""
    options = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    return (
        options == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
        and conv.padding_mode == "zeros"
        and not (conv._forward_hooks or conv._forward_pre_hooks)
    )


def fold_wins(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether folding is faster. x: (N, C, H, W), before the doubling."""
    return conv.weight.numel() >= PACK_NUMBERS and len(x) * x.shape[2] * x.shape[3] >= FOLD_PIXELS


def folded_upsampling(layer: Any, conv: nn.Module, x: Tensor) -> Tensor | None:
    """Nearest-neighbor doubling and `conv` as one transposed convolution; None if that is slower.

    layer: the upsampling, with `plan` and `kept` from `prepare_layers`.
    """
    if type(conv) is not PreparedConv2d or not _folds(conv):
        return None
    weight, bias = conv.weight, conv.bias
    if (
        _usual(x, weight)
        or not layer.plan.keep_copies
        or not (x.dtype is torch.float32 or layer.plan.widens(x.dtype))
        or not fold_wins(conv, x)
        or not (x.is_cpu and can_bypass_dispatcher(x, weight, bias))
        or packing_objection()
    ):
        return None
    packed, wide_bias = layer.kept(
        (weight, bias), lambda: (pack_folded(folded(weight.detach()), x), _float(bias))
    )
    return packed_fold(x.float(), packed, wide_bias).to(x.dtype)


class PreparedUpsample(Prepared, Upsample):
    """Doubling and convolution as one transposed convolution."""

    def forward(self, x: Tensor) -> Tensor:
        y = folded_upsampling(self, self.conv, x)
        return super().forward(x) if y is None else y


PREPARED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: PreparedConv2d,
    nn.Linear: PreparedLinear,
    Upsample: PreparedUpsample,
}


def prepare_layers(module: nn.Module, *, keep_copies: bool, half_as_fp32: bool | None) -> None:
    """Prepare a module's convolutions, linear layers and upsamplings as described above, in place.

    Names, parameters and state_dict stay the same; the classes of the layers change. Subclasses,
    which may compute something else, are left alone.

    Args:
        keep_copies: whether to spend memory on copies of weights. If not, nothing is packed or
            folded, and half-precision weights are converted in every call.
        half_as_fp32: whether bf16 and fp16 layers compute in fp32; None: if not `fast_half`.
    """
    for layer in module.modules():
        if type(layer) in PREPARED:
            layer.__class__ = PREPARED[type(layer)]
        if not isinstance(layer, PreparedConv2d | PreparedLinear | PreparedUpsample):
            continue
        weight = (layer.conv if isinstance(layer, PreparedUpsample) else layer).weight
        layer.plan = plan_for(weight.dtype, keep_copies=keep_copies, half_as_fp32=half_as_fp32)
        layer.kept = Kept()


def restore_layers(module: nn.Module) -> None:
    """Undo `prepare_layers`: the layers have their own classes again, and no copies of weights."""
    originals = {prepared: original for original, prepared in PREPARED.items()}
    for layer in module.modules():
        if (original := originals.get(type(layer))) is not None:
            layer.__class__ = original
            for name in ("plan", "kept"):
                layer.__dict__.pop(name, None)


def plan_for(dtype: torch.dtype, *, keep_copies: bool, half_as_fp32: bool | None) -> Plan:
    """The plan of a layer whose weights have this dtype; logs once if it will compute in fp32."""
    wide = half_as_fp32
    if wide is None:
        wide = dtype in INSTRUCTIONS and not fast_half(dtype)
        if wide:
            _say_fp32(dtype)
    return Plan(keep_copies=keep_copies, half_as_fp32=wide)


def keep_freed_memory() -> None:
    """Let this process keep freed memory for its next tensors. fastdiff never calls this itself.

    glibc returns large blocks to the system, and each new one is cleared page by page: a tenth of
    the time of a decoder (docs/decisions/runtime.md). The setting affects the whole process and
    cannot be undone, and the process stays as large as it has ever been. If glibc cannot enlarge
    its main heap (seen in one of four processes), it maps large blocks anyway, and nothing is kept.

    Raises:
        OSError: the C library is not glibc, or the call failed.
    """
    largest_trim = 2**31 - 1  # mallopt takes an int
    settings = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, largest_trim)}
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    for name, setting in settings.items():
        if mallopt is None or mallopt(*setting) != 1:
            raise OSError(
                f"cannot set {name}, which needs glibc's mallopt; remove this call to go on without"
            )
