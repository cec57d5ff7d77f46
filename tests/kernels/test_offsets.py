"""Tensors of more than 2^31 elements, at both ends of each kernel's grid.

The tensors are virtual memory, and pages that no program touches take no physical memory. So only
the first and the last program run, in the interpreter, whose integers are as wide as a GPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels import COLUMNS, OPS, backend, philox_normal, sampler_step
from fastdiff.kernels.geglu import triton as geglu
from fastdiff.kernels.group_norm_silu.triton_backward import backward as group_norm_backward
from fastdiff.kernels.group_norm_silu.triton_forward import forward as group_norm_forward
from fastdiff.kernels.group_norm_silu.triton_tiles import mean_and_rstd
from fastdiff.kernels.layer_norm.triton import backward as layer_norm_backward
from fastdiff.kernels.layer_norm.triton import forward as layer_norm_forward
from fastdiff.kernels.philox_normal import normals_of_blocks
from fastdiff.kernels.philox_normal.triton import forward as philox_forward
from fastdiff.kernels.sampler_step.triton import forward as run_step
from fastdiff.kernels.triton import Launch, recording_launches
from fastdiff.kernels.tuning import override_config
from tests.kernels import cases
from tests.kernels.norms import regime

pytestmark = cases.needs_interpreter
MANY = 2**31
ENDS = 2**16
"""The number of random elements at each end of a tensor; all others are 0."""


def huge(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """A tensor of zeros that takes no memory, with random numbers at both ends."""
    x = torch.empty(shape, dtype=torch.float16, memory_format=layout)
    assert x.numel() > MANY
    for end in ends(x):
        end.copy_(torch.randn(ENDS))
    return x


def ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last `ENDS` elements in memory."""
    flat = x.as_strided((x.numel(),), (1,))
    return flat[:ENDS], flat[-ENDS:]


def launched(call: Callable[[], Any]) -> tuple[dict[str, Launch], Any]:
    """A dict from kernel to its launch, and the result of the call, which is not written yet."""
    with recording_launches() as launches:
        result = call()
    return {launch.kernel.__name__.strip("_"): launch for launch in launches}, result


def run_program(launch: Launch, index: Sequence[int]) -> None:
    """Run only the program at `index` in the grid of a recorded launch."""
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    grid, index = ((*whole, *[one] * 3)[:3] for whole, one in ((launch.grid, 1), (index, 0)))
    set_dim, set_index = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter_builder, "set_grid_dim", lambda *_: set_dim(*grid))
        patch.setattr(interpreter_builder, "set_grid_idx", lambda *_: set_index(*index))
        patch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)  # copies whole tensors
        launch.kernel[(1,)](**launch.arguments)


def run_ends(launch: Launch) -> None:
    run_program(launch, [0] * len(launch.grid))
    run_program(launch, [count - 1 for count in launch.grid])


def check_ends(result: Tensor, expected: Callable[[int], Tensor]) -> None:
    """Assert that both ends of `result` were written, with `expected(0)` and `expected(1)`."""
    for place, have in enumerate(ends(result)):
        want = expected(place).flatten()
        written = have != 0
        assert written[:1].all() if place == 0 else written[-1:].all()
        torch.testing.assert_close(have[written], want[written], rtol=2e-3, atol=2e-3)


def test_geglu() -> None:
    d = 1024
    x = huge(MANY // d + 64, 2 * d)
    dy = huge(len(x), d)
    kernels, (y, _) = launched(lambda: geglu.forward(x, False))
    run_ends(kernels["geglu_kernel"])
    rows = ENDS // d
    sides = [side.float().requires_grad_() for side in (x[:rows], x[-rows:])]
    expected = [OPS["geglu"].formula(side) for side in sides]
    check_ends(y, lambda i: expected[i].half())
    kernels, (dx,) = launched(lambda: geglu.backward(dy, x, (True,)))
    run_ends(kernels["geglu_backward_kernel"])
    gradients = [
        torch.autograd.grad(out, side, one.float().view(-1, d))[0].flatten()
        for out, side, one in zip(expected, sides, ends(dy), strict=True)
    ]
    check_ends(dx, lambda i: (gradients[0][:ENDS], gradients[1][-ENDS:])[i].half())


@pytest.mark.parametrize("d", [512, 8192])
def test_layer_norm(d: int) -> None:
    x, dy = huge(MANY // d + 64, d), huge(MANY // d + 64, d)
    kind = "layer_norm" if d == 512 else "layer_norm_wide"
    sides = [side.view(-1, d).float().requires_grad_() for side in ends(x)]
    expected = [F.layer_norm(side, (d,)) for side in sides]
    kernels, ((y, total), _) = launched(lambda: layer_norm_forward(x, x, None, None, 1e-5))
    run_ends(kernels[f"{kind}_kernel"])
    check_ends(total, lambda i: 2 * ends(x)[i])
    check_ends(y, lambda i: expected[i].half())  # except for eps, 2 x has the same norm as x
    with override_config("layer_norm_backward", {"ELEMENTS": 2048, "num_warps": 4, "PROGRAMS": 4}):
        kernels, (dx, *_) = launched(
            lambda: layer_norm_backward(dy, dy, x, None, None, None, 1e-5, [True, False, False])
        )
    run_ends(kernels[f"{kind}_backward_kernel"])
    gradients = [
        torch.autograd.grad(out, side, one.view(-1, d).float())[0] + one.view(-1, d)
        for out, side, one in zip(expected, sides, ends(dy), strict=True)
    ]
    check_ends(dx, lambda i: gradients[i].half())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_group_norm_of_many_samples(layout: torch.memory_format) -> None:
    """Many samples are normalized in the small regime."""
    n, c = MANY // ENDS + 2, 1024
    x, dy = (huge(n, c, 8, 8, layout=layout) for _ in range(2))
    sides = [x[i : i + 1].float().requires_grad_() for i in (0, -1 % n)]
    with regime("small"):
        kernels, ((y, _), statistics) = launched(
            lambda: group_norm_forward(x, 32, None, None, None, None, None, 1e-5, "silu")
        )
        run_ends(kernels["small_kernel"])
        backward, (dx, *_) = launched(
            lambda: group_norm_backward(
                *(dy, None, x, 32, *[None] * 5, 1e-5, "silu", statistics),
                [True, *[False] * 4],
            )
        )
        mean, rstd = mean_and_rstd(statistics)
        for i in (0, n - 1):
            groups = x[i].float().reshape(32, -1)
            mean[i] = groups.mean(1)
            rstd[i] = (groups.var(1, correction=0) + 1e-5).rsqrt()
        run_ends(backward["small_backward_kernel"])
    expected = [OPS["group_norm_silu"].formula(side, 32) for side in sides]
    gradients = [
        torch.autograd.grad(out, side, dy[i : i + 1].float())[0]
        for out, side, i in zip(expected, sides, (0, n - 1), strict=True)
    ]
    in_memory = lambda t: ends(t.half().contiguous(memory_format=layout))[0]  # noqa: E731
    check_ends(y, lambda i: in_memory(expected[i].detach()))
    check_ends(dx, lambda i: in_memory(gradients[i]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_group_norm_of_a_sample(layout: torch.memory_format) -> None:
    """A large sample is normalized in the large regime. With mean 0 and scale 1, its last kernels
    apply only the activation."""
    x, dy = (huge(1, 256, 2900, 2900, layout=layout) for _ in range(2))
    with regime("large", PROGRAMS=2**30, MERGE=2**20):
        kernels, ((y, _), statistics) = launched(
            lambda: group_norm_forward(x, 32, None, None, None, None, None, 1e-5, "silu")
        )
        backward, (dx, *_) = launched(
            lambda: group_norm_backward(
                *(dy, None, x, 32, *[None] * 5, 1e-5, "silu", statistics),
                [True, *[False] * 4],
            )
        )
        mean, rstd = mean_and_rstd(statistics)
    moments = kernels["apply_kernel"].arguments["moments"]  # mean and squares of each part
    moments.zero_()[:, :, 1, 0] = x.numel() / 32 * (1 - 1e-5)
    backward["apply_backward_kernel"].arguments["table"].zero_()[:, 1] = 1
    mean.zero_()
    rstd.fill_(1)
    run_ends(kernels["apply_kernel"])
    run_ends(backward["apply_backward_kernel"])
    sides = [side.float().requires_grad_() for side in ends(x)]
    outs = [F.silu(side) for side in sides]
    check_ends(y, lambda i: outs[i].half())
    gradients = [
        torch.autograd.grad(out, side, one.float())[0]
        for out, side, one in zip(outs, sides, ends(dy), strict=True)
    ]
    check_ends(dx, lambda i: gradients[i].half())
    # the last spatial chunk, of the last channel (NCHW) or of all channels (NHWC)
    run_ends(kernels["moments_kernel"])
    run_ends(backward["sums_backward_kernel"])
    constants = kernels["moments_kernel"].arguments
    chunk_rows = constants["steps"] * constants["UNROLL"] * constants["ROWS"]
    rows = 2900 * 2900 - (constants["chunks"] - 1) * chunk_rows
    count = constants["COLUMNS"] if layout == torch.channels_last else 1
    parts = x.flatten(2)[0, -count:, -rows:].float().reshape(-(-count // 8), -1)  # by group
    found = moments[0, -len(parts) :, :, -1]
    squares = parts.shape[1] * parts.var(1, correction=0)
    torch.testing.assert_close(found[:, 0], parts.mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, 1], squares, rtol=1e-3, atol=1e-3)
    sums = backward["sums_backward_kernel"].arguments
    rows = 2900 * 2900 - (sums["chunks"] - 1) * sums["steps"] * sums["ROWS"]
    tail = x.flatten(2)[0, -count:, -rows:].float()
    tail.requires_grad_()
    (g,) = torch.autograd.grad(F.silu(tail), tail, dy.flatten(2)[0, -count:, -rows:].float())
    sums = backward["sums_backward_kernel"].arguments["sums"][0, -1, :, -count:]
    torch.testing.assert_close(sums[0], (g * tail.detach()).sum(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sums[1], g.sum(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("n", "elements"), [(MANY // 2**14 + 2, 2**14), (1, MANY - 1), (1, MANY + 5)]
)
def test_philox_normal(n: int, elements: int) -> None:
    """Many images, and one image whose elements or last tile end just beyond 32 bits."""
    seeds = torch.arange(n)
    kernels, (z, _) = launched(lambda: philox_forward(seeds, (elements,), None, 3, 1))
    launch = kernels["philox_normal_kernel"]
    run_ends(launch)
    tile = 4 * launch.arguments["BLOCK"]
    begin = (elements - 1) // tile * tile
    blocks = torch.arange(begin // 4, (elements + 3) // 4)
    expected = normals_of_blocks(seeds[-1:], blocks, 3, 1)[0, : elements - begin]
    torch.testing.assert_close(z[-1, begin:], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        z[0, :tile], philox_normal(seeds[:1], (tile,), step=3, stream=1)[0], rtol=1e-6, atol=1e-6
    )


def test_sampler_step_of_an_image_of_almost_2_31_elements() -> None:
    x, f = torch.empty(1, MANY - 1), torch.empty(1, MANY - 1, dtype=torch.float16)
    table, rows, seeds = torch.zeros(1, 20), torch.tensor([0]), torch.tensor([5])
    table[0, COLUMNS.A], table[0, COLUMNS.SLOT] = 0.5, -1
    tail = x[0, -5:].normal_().clone()
    kernels, _ = launched(lambda: run_step(x, f, x.expand(3, 1, -1), table, rows, seeds))
    run_ends(kernels["sampler_step_kernel"])
    assert torch.equal(x[0, -5:], 0.5 * tail)


def test_sampler_step_over_images_far_apart() -> None:
    """x, prediction and history have a stride between images that reaches 2^31 after a few."""
    shape, apart = (3, 2, 8, 8), MANY // 2 + 64

    def far(t: Tensor, step: int) -> Tensor:
        room = torch.empty((len(t) - 1) * step + t[0].numel(), dtype=t.dtype)
        return room.as_strided(t.shape, (step, *t.stride()[1:])).copy_(t)

    x, f, history = torch.randn(shape), torch.randn(6, *shape[1:]).half(), torch.randn(3, *shape)
    row = [1.0, -0.5, 0.9, 0.4, 0.1, 0.2, 0.3, 0.5, 0.6, -1, 2, 3, 1, *[0] * 7]
    table = torch.tensor([row, row])
    table[1, COLUMNS.RESCALE] = 0.7
    seeds = torch.arange(3)
    distant = far(x, apart), far(f, MANY // 4), far(history, apart)
    pair = {"cond": seeds + 3, "uncond": seeds}
    estimates = torch.zeros(shape), far(torch.zeros(shape), apart)
    with backend("triton"):
        for row in (0, 1):
            rest = table, torch.full((3,), row), seeds
            sampler_step(x, f, history, *rest, **pair, denoised=estimates[0])
            sampler_step(*distant, *rest, **pair, denoised=estimates[1])
            assert torch.equal(x, distant[0])
            assert torch.equal(history, distant[2])
            assert torch.equal(*estimates)
