"""Check a folder of this package: every op against its formula in fp64, with gradients.

    python test_parity.py FOLDER [--backend triton]

Loads it through the library `kernels`. Without a GPU, TRITON_INTERPRET=1 runs the Triton kernels in
Triton's interpreter.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

FACTOR = {False: 2.0, True: 3.0}
"""Gradients or not -> how many times eager PyTorch's error is allowed."""
SEEDS = 4


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).abs().max())


def drawn(op: Any, device: str, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    example: dict[str, Any] = op.example(lambda *shape: torch.randn(shape, device=device) + 0.5)
    return example


def results(op: Any, arguments: dict[str, Any], backend: Any, gradients: bool) -> list[Tensor]:
    """The outputs, then the gradients of all tensors in the order of the arguments."""

    def leaf(a: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        return a.detach().clone().requires_grad_(gradients)

    leaves = tree_map(leaf, arguments)
    with backend:
        outputs = tensors(op.public(**leaves))
        if not gradients:
            return outputs
        roots = [t for t in outputs if t.requires_grad]
        wanted = [t for t in tensors(leaves) if t.requires_grad]
        return [*outputs, *torch.autograd.grad(roots, wanted, [torch.ones_like(t) for t in roots])]


def check(ops: Any, name: str, backend: str, device: str) -> str:
    """Compare one op: the mean errors over `SEEDS` inputs. Returns what to print.

    Raises:
        AssertionError: an error exceeds its bound.
    """
    op = ops.OPS[name]
    errors: dict[int, float] = {}
    bounds: dict[int, float] = {}
    for seed in range(SEEDS):
        arguments = drawn(op, device, seed)
        double = tree_map(
            lambda a: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a,
            arguments,
        )
        found = results(op, arguments, ops.backend(backend), op.differentiable)
        eager = results(op, arguments, ops.backend("reference"), op.differentiable)
        exact = results(op, double, ops.backend("reference"), op.differentiable)
        outputs = len(results(op, arguments, ops.backend("reference"), False))
        for place, (mine, theirs, right) in enumerate(zip(found, eager, exact, strict=True)):
            rms = float(right.detach().square().mean().sqrt())
            bound = FACTOR[place >= outputs] * error(theirs, right)
            bounds[place] = bounds.get(place, 0.0) + bound + torch.finfo(mine.dtype).eps * rms
            errors[place] = errors.get(place, 0.0) + error(mine, right)
    worst = max(errors[place] / bounds[place] for place in errors)
    assert worst <= 1, f"{name}: {worst:.2f} times its bound on {backend}"
    return f"{name}: {worst:.2f} of the bound on {backend}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backend", default="triton")
    options = parser.parse_args()
    from kernels import get_local_kernel

    ops: Any = get_local_kernel(options.folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checked = 0
    for name, op in ops.OPS.items():
        if options.backend not in op.backends or op.formula is None:
            print(f"{name}: left out, no {options.backend} backend or no formula")
            continue
        print(check(ops, name, options.backend, device))
        checked += 1
    print(f"{checked} ops agree with fp64")
    return 0 if checked else 1


if __name__ == "__main__":
    sys.exit(main())
