"""Planned calls: the same results as calls without a plan, and no plan where it would be wrong.

Without a GPU the plans start kernels in Triton's interpreter and in the emulation of CUDA, at the
addresses that they work out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import kernels
from fastdiff.kernels import op as op_module
from fastdiff.kernels import plans
from fastdiff.kernels.attention import cuda as attention_cuda
from fastdiff.kernels.plans import Address, Plan, Step
from fastdiff.kernels.tuning import override_config
from tests.kernels import cases, norms, routes
from tests.support.imports import ROOT

Inputs = cases.Inputs


@contextmanager
def counted() -> Iterator[list[Plan]]:
    """The plans that run inside the block."""
    ran: list[Plan] = []
    run = Plan.run

    def counting(self: Plan, args: Any, pointers: Any) -> Any:
        ran.append(self)
        return run(self, args, pointers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "run", counting)
        yield ran


def copied(inputs: Inputs) -> Inputs:
    """New tensors with the same values, strides and aliases."""
    made: dict[int, Tensor] = {}

    def copy(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        if id(a) not in made:
            room = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device)
            made[id(a)] = room.copy_(a)
        return made[id(a)]

    args, kwargs = inputs
    return tuple(map(copy, args)), {name: copy(a) for name, a in kwargs.items()}


def results(op: str, inputs: Inputs) -> list[Tensor]:
    """What a call returns, and what it leaves in its arguments."""
    args, kwargs = copied(inputs)
    returned = getattr(kernels, op)(*args, **kwargs)
    outputs = [] if returned is None else cases.flat(returned)
    return [*outputs, *(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))]


def planned(op: str, inputs: Inputs) -> list[Tensor]:
    """`results` of a call that is planned: the third."""
    for _ in range(2):
        results(op, inputs)
    with counted() as ran:
        found = results(op, inputs)
    assert len(ran) == 1
    return found


COPYING = ("added mask",)
"""Routes on which an argument is converted first, so that their calls are not planned."""


@pytest.mark.parametrize(
    ("backend", "route"), [p for p in routes.EVERY if p.values[1].name not in COPYING]
)
def test_every_op_on_every_route(backend: str, route: routes.Route) -> None:
    """A plan made of one call repeats the kernels of another one, bit for bit, and they agree with
    the reference in fp64."""
    device = cases.device_of(backend)
    first, other = (route.inputs(device, seed) for seed in (0, 1))
    if route.op == "sampler_step":  # the reference refuses what kernels answer with NaN
        other[1]["cond"].clamp_(max=len(other[0][1]) - 1)
    with torch.inference_mode(), route.forced():
        with plans.paused():
            expected = results(route.op, other)
        planned(route.op, first)
        with counted() as ran, kernels.record_backends() as served:
            found = results(route.op, other)
        assert len(ran) == 1
        assert served == {route.op: {backend}}
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True)

    def exact(a: Any) -> Any:
        return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a

    wide = tuple(map(exact, other[0])), {name: exact(a) for name, a in other[1].items()}
    with torch.inference_mode(), kernels.backend("reference"):
        for have, want in zip(found, results(route.op, wide), strict=True):
            tolerance = 1e-4 if route.dtype == torch.float32 else 2e-3
            torch.testing.assert_close(
                have.double(), want.double(), rtol=tolerance, atol=tolerance, equal_nan=True
            )


def attention_inputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    device = cases.device_of("triton")
    return {
        name: torch.randn(2, tokens, 2, 40, generator=generator).to(device)
        for name, tokens in (("q", 16), ("k", 24), ("v", 24))
    }


def close(have: Tensor, want: Tensor) -> bool:
    return torch.allclose(have.double(), want.double(), rtol=1e-4, atol=1e-4)


@cases.needs_triton
def test_arguments_of_one_memory_are_told_apart() -> None:
    """The plan is recorded with k and v in one tensor, with k as v, and used with neither."""
    given = attention_inputs()
    kv = torch.stack([given["k"], given["v"]], dim=2)  # as a packed projection leaves them
    packed = {"q": given["q"], "k": kv[:, :, 0], "v": kv[:, :, 1]}
    for example in (packed, {**given, "v": given["k"]}):
        wide = {name: t.double() for name, t in example.items()}
        with torch.inference_mode(), kernels.backend("triton"):
            for _ in range(3):
                found = kernels.attention(**example)
            assert close(found, kernels.OPS["attention"].formula(**wide))
            fresh = attention_inputs(1)
            fresh = {
                name: torch.empty_strided(t.shape, t.stride(), device=t.device).copy_(fresh[name])
                for name, t in example.items()
            }
            wide = {name: t.double() for name, t in fresh.items()}
            with counted() as ran:
                found = kernels.attention(**fresh)
            assert len(ran) == 1
            assert close(found, kernels.OPS["attention"].formula(**wide))


@cases.needs_triton
def test_strides_are_part_of_the_signature() -> None:
    x = torch.randn(2, 64, 4, 4, device=cases.device_of("triton"))
    exact = kernels.OPS["group_norm_silu"].formula(x.double(), 32)
    with torch.inference_mode(), kernels.backend("triton"):
        for layout in (torch.contiguous_format, torch.channels_last):
            for _ in range(3):
                found = kernels.group_norm_silu(x.contiguous(memory_format=layout), 32)
                assert close(found, exact)
                assert found.is_contiguous(memory_format=layout)


@cases.needs_triton
def test_a_call_that_copies_is_not_planned() -> None:
    """Rows that are not dense are copied, which a plan does not repeat."""
    x = torch.randn(2, 24, 16, device=cases.device_of("triton")).mT
    with torch.inference_mode(), kernels.backend("triton"), counted() as ran:
        for _ in range(4):
            assert close(kernels.layer_norm(x), kernels.OPS["layer_norm"].formula(x.double()))
    assert not ran


def test_what_pytorch_computes_is_not_repeated() -> None:
    """The tensor is one that the plan could allocate; its values would be missing."""

    def call(x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(x)

    x = torch.randn(3)
    y, plan = plans.record(kernels.OPS["geglu"].backends["reference"], call, (x,), ())
    assert torch.equal(y, x)
    assert plan is None


@cases.needs_triton
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_launches_for_parts_of_a_batch(layout: torch.memory_format) -> None:
    """Samples that do not fit the L2 together are normalized one after the other: the kernels get
    addresses inside of x, y and the scales."""
    op, device = kernels.OPS["add_group_norm_silu"], cases.device_of("triton")
    draw = cases.Draw(torch.float32, device, torch.Generator().manual_seed(0))
    with norms.regime("large", L2_MIB=0), torch.inference_mode(), kernels.backend("triton"):
        for turn in range(4):
            x, residual = (draw(3, 32, 6, 6).contiguous(memory_format=layout) for _ in range(2))
            more = {"channel_add": draw(3, 32), "scale_shift": draw(3, 64), "residual": residual}
            with counted() as ran:
                found = kernels.add_group_norm_silu(x, 8, **more)
            assert len(ran) == (turn > 1)
            wide = {name: t.double() for name, t in more.items()}
            for have, want in zip(found, op.formula(x.double(), 8, **wide), strict=True):
                assert close(have, want.reshape(have.shape))


class Sub(Tensor):
    pass


def _unaligned(x: Tensor) -> Tensor:
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].reshape(x.shape)


@cases.needs_triton
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.as_subclass(Sub),
        lambda x: x.clone().requires_grad_(),
        _unaligned,
        lambda x: torch._neg_view(-x),
        lambda x: x[:0],
    ],
    ids=["subclass", "gradient", "unaligned", "negated view", "empty"],
)
def test_other_tensors_take_the_other_way(change: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 16, 64, device=cases.device_of("triton"))
    with kernels.backend("triton"):
        with torch.no_grad():
            planned("geglu", ((x,), {}))
        with counted() as ran:
            for _ in range(3):
                found = kernels.geglu(change(x))
    assert not ran
    expected = kernels.OPS["geglu"].formula(x.double()[: len(found)])
    assert close(found.detach().as_subclass(Tensor), expected)


def test_transformations_and_graphs_take_the_other_way() -> None:
    x = torch.randn(2, 16, 64)
    expected = kernels.OPS["geglu"].formula(x.double())
    with torch.no_grad(), kernels.backend("triton"):
        planned("geglu", ((x,), {}))
    with torch.no_grad(), counted() as ran:
        assert close(torch.func.vmap(kernels.geglu)(x), expected)
        with kernels.backend("triton"):
            compiled = torch.compile(kernels.geglu, backend="aot_eager", fullgraph=True)
            assert close(compiled(x), expected)
        fake = torch._subclasses.FakeTensorMode()
        with fake:
            assert kernels.geglu(fake.from_tensor(x)).shape == expected.shape
    assert not ran


@cases.needs_triton
def test_the_requested_backend_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 16, 64, device=cases.device_of("triton"))
    with torch.inference_mode():
        monkeypatch.setenv("FASTDIFF_BACKEND", "triton")
        planned("geglu", ((x,), {}))
        for name in ("reference", "triton"):
            monkeypatch.setenv("FASTDIFF_BACKEND", name)
            with kernels.record_backends() as served:
                kernels.geglu(x)
            assert served == {"geglu": {name}}
        with kernels.backend("reference"), kernels.record_backends() as served:
            kernels.geglu(x)
        assert served == {"geglu": {"reference"}}


@cases.needs_triton
def test_new_configs_and_backends_forget_plans() -> None:
    op = kernels.OPS["geglu"]
    inputs = (torch.randn(2, 16, 64, device=cases.device_of("triton")),), {}
    with torch.inference_mode(), kernels.backend("triton"):

        def is_planned() -> bool:
            with counted() as ran:
                results("geglu", inputs)
            return bool(ran)

        planned("geglu", inputs)
        with override_config("geglu", {"ROWS": 2, "COLUMNS": 16, "num_warps": 4}):
            assert not is_planned()
            planned("geglu", inputs)
        assert not is_planned()
        planned("geglu", inputs)
        op.use(op.backends)
        assert not is_planned()
        planned("geglu", inputs)
        with cases.recording("geglu") as ran:
            for _ in range(3):
                results("geglu", inputs)
        assert ran == ["triton"] * 3


@pytest.mark.parametrize(
    ("backend", "route"), [p for p in routes.EVERY if p.values[1].name in COPYING]
)
def test_a_converted_argument_is_not_planned(backend: str, route: routes.Route) -> None:
    given = route.inputs(cases.device_of(backend))
    with torch.inference_mode(), route.forced(), counted() as ran:
        found = [results(route.op, given)[0] for _ in range(4)]
    assert not ran
    wide = {name: a.double() for name, a in given[1].items() if isinstance(a, Tensor)}
    exact = kernels.OPS[route.op].formula(*(a.double() for a in given[0]), **wide)
    for y in found:
        torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=cases.needs_cuda)])
def test_other_settings_make_other_plans(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (t.half().to(cases.device_of("cuda")) for t in attention_inputs().values())
    with torch.inference_mode(), kernels.backend(backend):
        planned("attention", ((q, k, v), {}))
        monkeypatch.setattr(attention_cuda, "ON_CHIP", 0)
        with counted() as ran:
            kernels.attention(q, k, v)  # recorded, because an older plan exists
            assert not ran
            kernels.attention(q, k, v)
            assert len(ran) == 1


@cases.needs_triton
def test_a_bounded_number_of_calls_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_module, "LIMIT", 4)
    op, device = kernels.OPS["geglu"], cases.device_of("triton")
    with torch.inference_mode(), kernels.backend("triton"):
        for rows in range(1, 12):
            x = torch.randn(rows, 32, device=device)
            assert close(kernels.geglu(x), op.formula(x.double()))
            assert len(op.plans) <= 4


@cases.needs_triton
def test_arguments_are_checked_where_there_is_no_plan() -> None:
    x = torch.randn(2, 64, 4, 4, device=cases.device_of("triton"))
    with torch.inference_mode(), kernels.backend("triton"):
        planned("group_norm_silu", ((x, 32), {}))
        for _ in range(3):
            with pytest.raises(ValueError, match="num_groups must divide the 64 channels"):
                kernels.group_norm_silu(x, 33)
            with pytest.raises(ValueError, match="activation must be one of"):
                kernels.group_norm_silu(x, 32, activation="relu")


def test_threads_share_a_plan() -> None:
    """Each launch gets the addresses of its own call."""
    backend, wrong = kernels.OPS["geglu"].backends["reference"], []

    def start(stream: int | None, arguments: list[Any]) -> None:
        first, room, number, second = arguments
        if (first + 16, number) != (second, 7) or room != made.rooms[-1].data_ptr():
            wrong.append(arguments)

    made = threading.local()
    steps = [Step(start, [Address(0, 0), Address(1, 0), 7, Address(0, 16)])] * 3
    rooms = [(torch.Size([8]), (1,), torch.float32)]
    plan = Plan(backend, torch.device("cpu"), rooms, steps, 1)
    empty = plans._empty

    def noted(*args: Any, **options: Any) -> Tensor:
        made.rooms = [*getattr(made, "rooms", []), empty(*args, **options)][-2:]
        return made.rooms[-1]

    def many(first: int) -> None:
        for i in range(2000):
            y = plan.run((None,), [first + 1000 * i])
            if y is not made.rooms[-1]:
                wrong.append(y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "_empty", noted)
        threads = [threading.Thread(target=many, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


LAUNCHED = """
import json, sys
import torch
from fastdiff.bench import host
from fastdiff import kernels

seen = []

class Seeing(host.Stub):
    def __call__(self, *args):
        super().__call__(*args)
        seen.append(args)

def plain(a):  # tensors as their addresses
    if isinstance(a, torch.Tensor):
        return a.data_ptr()
    if isinstance(a, tuple):
        return [plain(part) for part in a]
    return a if isinstance(a, (int, float, str, bool)) else None

keep = []
for name, example in host.examples().items():
    seen.clear()
    stub = Seeing()
    with host.stubbed("triton", stub), torch.inference_mode():
        call = host.prepared(name, example, "inference")
        for _ in range(3):
            keep.append(call())
    assert len(seen) % 3 == 0, name
    own, again = seen[:len(seen) // 3], seen[2 * len(seen) // 3:]
    tensors = [t for t in (*example[0], *example[1].values()) if isinstance(t, torch.Tensor)]
    fixed = {t.data_ptr() for t in tensors}
    for first, third in zip(own, again):
        # x, y, z, stream, function, 2 flags, metadata; then a description, 2 hooks, 2 scratches
        assert plain(first[:8]) == plain(third[:8]), name
        assert plain(first[13:15]) == plain(third[13:15]), name
        before, after = plain(first[-1]), plain(third[-1])
        assert len(before) == len(after), name
        kinds = [isinstance(a, torch.Tensor) for a in first[-1]]
        for kind, a, b in zip(kinds, before, after):
            same = not kind or a in fixed or b in fixed
            assert a == b if same else type(b) is int, (name, a, b)
    print(name, len(own), any(kinds))
"""


def test_plans_launch_what_triton_would() -> None:
    """With Triton's own launcher and a driver that launches nothing: of the same example, the first
    call goes through Triton, the third through a plan."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHED],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(kernels.OPS)
