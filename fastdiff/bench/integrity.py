"""Check that a kernel does the work that it is timed for.

A time means something only if each call computes its result from its operands, before whatever
follows on the same stream. Kernels that do not are refused with the reason: wrong results (zeros
above all), results kept from earlier calls, work left to another thread or stream, operands that
change. `contest.py` adds the last reason, a rate beyond the hardware's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fastdiff.bench.parity import Draw, Parity, measure_expected_parity
from fastdiff.bench.providers import Arguments
from fastdiff.bench.tune import agrees

DRAWS = 4
"""Inputs over which the errors are averaged."""
SETTLE_S = 0.02
"""Seconds that work left to another thread gets to show itself, on a CPU."""
REPEATS = 9
REPEATED_FASTER = 3.0
"""How many times as fast a call on unchanged operands may be as the first one on new ones, compared
with eager PyTorch: caches of the hardware help both."""
ENOUGH_S = 0.1
"""Seconds after which fewer repetitions do."""
LEAST_S = 20e-6
"""Differences below this are not held against a kernel."""


class RefusedError(Exception):
    """A kernel whose times would mean nothing; the message says why."""


class Checked:
    """A kernel of one op with one signature, checked on drawn operands.

    Args:
        kernel: the function to check; eager: PyTorch's, which computes the yardstick in fp64 too.
        draw: seed -> fresh operands (positional, keywords) on the device.
    """

    def __init__(
        self,
        kernel: Callable[..., Any],
        *,
        eager: Callable[..., Any],
        draw: Callable[[int], Arguments],
    ) -> None:
        self.kernel, self.eager, self.draw = kernel, eager, draw
        self.seed = 0

    def check(self) -> Parity:
        """All checks, on operands that no earlier check has used.

        Raises:
            RefusedError: with the reason.
        """
        self.seed += 100
        first = self.seed
        self._returns_finished_results(first)
        self._follows_its_operands(first + 10)
        parity = self._computes_the_formula(first + 20)
        self._does_not_cache(first + 30)
        return parity

    def _call(self, arguments: Arguments) -> list[Tensor]:
        args, kwargs = arguments
        return outputs(self.kernel(*args, **kwargs))

    def _returns_finished_results(self, seed: int) -> None:
        kept: list[Tensor] = []
        for one in range(3):
            args, kwargs = self.draw(seed + one)
            before = [t.clone() for t in tensors((args, kwargs))]
            expected = outputs(self.eager(*args, **kwargs))
            result = self.kernel(*args, **kwargs)
            found = outputs(result)
            copies = [t.clone() for t in found if type(t) is Tensor]
            self._fits(result, found, expected)
            late = settle(found[0].device)
            if late or not all(map(same, copies, found)):
                raise RefusedError(
                    "its output changed after the call: it leaves its work to another thread or "
                    "stream, so the clock stops before it is done"
                )
            if not all(map(same, before, tensors((args, kwargs)))):
                raise RefusedError("it changes its operands; write the result into a new tensor")
            if any(t.data_ptr() == k.data_ptr() for t in found for k in kept if t.numel()):
                raise RefusedError(
                    "it returns the same memory in every call, so an earlier result is lost; "
                    "allocate the output"
                )
            kept.extend(found)

    @staticmethod
    def _fits(result: Any, found: list[Tensor], expected: list[Tensor]) -> None:
        foreign = [t for t in found if type(t) is not Tensor]
        if foreign or not found:
            kind = type(foreign[0] if foreign else result).__name__
            raise RefusedError(f"it returns a {kind}, expected a torch.Tensor")
        for got, wanted in zip(found, expected, strict=False):
            for what in ("shape", "dtype", "device"):
                pair = getattr(got, what), getattr(wanted, what)
                if pair[0] != pair[1]:
                    raise RefusedError(
                        f"its output has {what} {_said(pair[0])}, expected {_said(pair[1])}"
                    )
        if len(found) != len(expected):
            raise RefusedError(f"it returns {len(found)} tensors, expected {len(expected)}")

    def _computes_the_formula(self, seed: int) -> Parity:
        """The parity of the output with the largest error, as a share of its bound."""

        def drawn(function: Callable[..., Any], place: int, double: bool = False) -> Draw:
            def result(number: int) -> Tensor:
                args, kwargs = self.draw(seed + number)
                if double:
                    args, kwargs = in_fp64((args, kwargs))
                return outputs(function(*args, **kwargs))[place]

            return result

        found = []
        for place in range(len(self._call(self.draw(seed)))):
            actual = drawn(self.kernel, place)
            exact, eager = drawn(self.eager, place, double=True), drawn(self.eager, place)
            parity = measure_expected_parity(actual, exact, eager, draws=DRAWS)
            if not parity.holds:
                raise RefusedError(
                    f"{_kind_of_wrong(actual(0))} (error {parity.error:.2g}, eager PyTorch's is "
                    f"{parity.eager_error:.2g}, the bound {parity.bound:.2g})"
                )
            found.append(parity)
        return max(found, key=lambda p: p.error / p.bound if p.bound else 0.0)

    def _follows_its_operands(self, seed: int) -> None:
        """New numbers at the same addresses, as in every step of a sampler."""
        arguments, others = self.draw(seed), self.draw(seed + 1)
        before = [t.clone() for t in self._call(arguments)]
        replace_values(arguments, others)
        found, fresh = self._call(arguments), self._call(others)
        if all(map(same, before, found)) and not all(map(same, before, fresh)):
            raise RefusedError(CACHES)
        if not all(map(agrees, found, fresh)):
            raise RefusedError(
                "equal operands at other addresses give other results: it keeps something between "
                "calls"
            )

    def _does_not_cache(self, seed: int) -> None:
        """A cache that notices changes is faster on unchanged operands than on changed ones."""
        arguments, others = self.draw(seed), self.draw(seed + 1)

        def gain(function: Callable[..., Any]) -> tuple[float, float]:
            args, kwargs = arguments
            fresh, repeated = [], []
            for number in range(REPEATS):
                renew(arguments, others, number)
                fresh.append(_seconds(function, args, kwargs))
                repeated.append(_seconds(function, args, kwargs))
                if number >= 2 and sum(fresh) > ENOUGH_S:
                    break
            return median(fresh), median(repeated)

        new, again = gain(self.kernel)
        eager_new, eager_again = gain(self.eager)
        allowed = REPEATED_FASTER * max(1.0, eager_new / eager_again)
        if new > allowed * again and new - again > LEAST_S:
            raise RefusedError(
                f"{CACHES} (a call takes {new / again:.0f} times as long once its operands have "
                "changed)"
            )


CACHES = "it caches its output: it returns the result of an earlier call"


def outputs(result: Any) -> list[Tensor]:
    """The tensors that an op returns, in order."""
    return [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]


def tensors(arguments: Arguments) -> list[Tensor]:
    return [t for t in tree_flatten(arguments)[0] if isinstance(t, Tensor)]


def in_fp64(arguments: Arguments) -> Arguments:
    """The same operands with floating-point tensors in fp64."""

    def double(a: Any) -> Any:
        return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a

    args, kwargs = arguments
    return tuple(map(double, args)), {name: double(a) for name, a in kwargs.items()}


def replace_values(arguments: Arguments, others: Arguments) -> None:
    """Copy the values of other operands of the same shapes into these."""
    for mine, other in zip(tensors(arguments), tensors(others), strict=True):
        mine.copy_(other)


def renew(arguments: Arguments, others: Arguments, number: int) -> None:
    """Give operands values that they have not had before, near those of the others; integers stay.

    number: a different one each time.
    """
    for mine, other in zip(tensors(arguments), tensors(others), strict=True):
        if mine.is_floating_point():
            mine.copy_(other).mul_(1 + 1e-3 * (number + 1))


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; NaN equals NaN."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def settle(device: torch.device) -> bool:
    """Wait until work that a call left behind must be done. Returns whether a GPU was still busy
    after its current stream was done."""
    if device.type != "cuda":
        time.sleep(SETTLE_S)
        return False
    torch.cuda.current_stream(device).synchronize()
    start = time.perf_counter()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start > LEAST_S


def _seconds(function: Callable[..., Any], args: Any, kwargs: Any) -> float:
    on_gpu = any(t.is_cuda for t in tensors((args, kwargs)))
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*args, **kwargs)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _kind_of_wrong(found: Tensor) -> str:
    numbers = found.float()
    if not numbers.isfinite().all():
        return "its output is not finite"
    if not numbers.any():
        return "it returns zeros"
    if bool((numbers == numbers.flatten()[0]).all()):
        return "it returns a constant"
    return "its output is wrong"


def _said(value: Any) -> str:
    return str(tuple(value) if isinstance(value, torch.Size) else value).removeprefix("torch.")
