"""First checks of the attention kernel for sm_90a: which kernel runs, and what wgmma makes of V.

The kernel gives wgmma V as a B operand in MN-major order with as many columns as the head has: 40,
80 and 160 are parts of a swizzle atom of 64. The PTX manual allows it, and the emulation does it,
but no public kernel does. If a GPU addresses such columns in another way, `wrong_columns` says
which, by head dim. The way out is then ``fastdiff.kernels.attention.cuda.HOPPER_FROM = -1``, the
kernels with mma.sync, or tiles of V padded to 64 columns in csrc/cuda/attention_hopper.cuh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

HEAD_DIMS = (40, 80, 160)
LENGTHS = (513, 576, 640)
"""The first length with a ragged tile, one between two tiles of 128 keys, and whole tiles."""
KERNEL = "attention_hopper"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def wrong_columns(attention: Attention, d: int, length: int, device: str) -> list[int]:
    """The columns of the output that do not come from their own column of V.

    All scores are equal and all rows of V are (0, 1, ..., d - 1), numbers that bf16 holds exactly,
    so each row of the output is the same.
    """
    q = torch.zeros(1, length, 2, d, dtype=torch.bfloat16, device=device)
    row = torch.arange(d, device=device)
    v = row.to(q.dtype).expand(q.shape).contiguous()
    off = (attention(q, q, v).float() - row).abs().amax((0, 1, 2)) > 0.5
    return [int(column) for column in off.nonzero()]


def launched(attention: Attention, d: int, length: int) -> list[str]:
    """The names of the kernels of one call on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    q = torch.randn(3, 1, length, 2, d, device="cuda").bfloat16()
    attention(*q)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        attention(*q)
        torch.cuda.synchronize()
    return [event.key for event in profiled.key_averages()]


def checks() -> Iterator[tuple[str, str]]:
    """Name of a check on this GPU, and what is wrong, or "".

    Parity at these lengths is checked as well, against fp64, by the rule of all parity cases.
    """
    from fastdiff import kernels
    from tests.support.parity import assert_parity

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with kernels.backend("cuda"):
            return kernels.attention(q, k, v)

    for d, length in product(HEAD_DIMS, LENGTHS):
        label = f"d = {d}, {length} tokens, sm_90a"
        names = launched(ours, d, length)
        said = "" if any(KERNEL in name for name in names) else f"launched {names}, not {KERNEL}"
        yield f"the kernel of attention, {label}", said
        columns = wrong_columns(ours, d, length, "cuda")
        said = f"wgmma reads other columns of V at {columns}; set HOPPER_FROM = -1" * bool(columns)
        yield f"columns of wgmma's B operand, {label}", said

        def drawn(seed: int, dtype: torch.dtype, d: int = d, length: int = length) -> Tensor:
            generator = torch.Generator("cuda").manual_seed(seed)
            q = torch.randn(3, 2, length, 2, d, device="cuda", generator=generator)
            return q.bfloat16().to(dtype)

        def reference(
            seed: int, dtype: torch.dtype, drawn: Callable[..., Tensor] = drawn
        ) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in drawn(seed, dtype))
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return y.transpose(1, 2)

        try:
            assert_parity(
                lambda seed, drawn=drawn: ours(*drawn(seed, torch.bfloat16)),
                lambda seed, reference=reference: reference(seed, torch.float64),
                lambda seed, reference=reference: reference(seed, torch.bfloat16),
            )
        except AssertionError as error:
            yield f"parity of attention, {label}", " ".join(str(error).split())[:300]
        else:
            yield f"parity of attention, {label}", ""


def served() -> bool:
    """Whether this GPU is of compute capability 9.0."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
