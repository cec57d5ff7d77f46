"""Host time of an evaluation of diffusers' U-Net, plain and accelerated, without a GPU.

The network has all modules of Stable Diffusion 1.5's U-Net, but 32 channels and 8 x 8 latents. It
runs on the CPU, on tensors of bf16. fastdiff does what it does on GPUs only, and the launches of
its kernels are stubbed (host.py). PyTorch's kernels run, so the time they take is subtracted: it
grows with the batch, and the time of the host does not. Two batch sizes give both, and the time of
an evaluation of no samples at all is what counts: Python, checks, allocations, PyTorch's dispatch,
and what one of its kernels costs without data, which stands for a launch.

Plain and accelerated evaluations alternate, and the thread's own clock times them. The functions
that each calls, in Python and in C, are counted beside the time: they are the same in every run.

`counts.py` runs this file in a process of its own.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import sys
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastdiff.bench.host import ADDS, Stub, stubbed
from fastdiff.extras import import_extra

CONFIG: dict[str, Any] = {
    "block_out_channels": (32,) * 4,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,  # heads, of 8 channels
}
"""How it differs from Stable Diffusion 1.5's U-Net."""
TOKENS = 77
SECTION = "accelerated"
"""Of docs/counts.json."""
WARM_UP = 3
BATCHES = 2, 8


class Pair:
    """diffusers' U-Net, and the same one accelerated, on a backend with stubbed launches."""

    def __init__(self, backend: str) -> None:
        from fastdiff import integrations
        from fastdiff.models import layers

        diffusers = import_extra("diffusers", extra="diffusers")
        self._stack, self.stub = contextlib.ExitStack(), Stub()
        self._stack.enter_context(stubbed(backend, self.stub))
        layers.BIAS_IS_A_LAUNCH = ("cpu",)
        torch.manual_seed(0)
        plain = diffusers.UNet2DConditionModel(**CONFIG).to(torch.bfloat16).eval()
        ours = copy.deepcopy(plain)
        integrations.accelerate(ours)
        self._networks = plain, ours
        self._inputs = {n: self._input(n) for n in BATCHES}
        self._stack.enter_context(torch.inference_mode())
        for which, n in self._cases:
            for _ in range(WARM_UP):
                self._call(which, n)
        if left := ours._fastdiff_network.left:
            raise RuntimeError(f"the accelerated network ran block by block: {dict(left)}")

    @staticmethod
    def _input(n: int) -> tuple[Tensor, ...]:
        context = torch.zeros(n, TOKENS, CONFIG["cross_attention_dim"], dtype=torch.bfloat16)
        return torch.zeros(n, 4, 8, 8, dtype=torch.bfloat16), torch.zeros(()), context

    @property
    def _cases(self) -> list[tuple[int, int]]:
        return [(which, n) for n in BATCHES for which in (0, 1)]

    def _call(self, which: int, n: int) -> None:
        self._networks[which](*self._inputs[n])

    def launches(self) -> int:
        """Launches of our kernels in an accelerated evaluation."""
        self.stub.launches = 0
        self._call(1, BATCHES[0])
        return self.stub.launches

    def functions(self) -> list[int]:
        """Functions that each evaluation calls, in Python and in C."""
        found = []
        for which in (0, 1):
            count = [0]

            def counting(frame: Any, event: str, argument: Any, count: list[int] = count) -> None:
                count[0] += event in ("call", "c_call")

            sys.setprofile(counting)
            self._call(which, BATCHES[0])
            sys.setprofile(None)
            found.append(count[0])
        return found

    def rounds(self, count: int) -> list[list[float]]:
        """Tiny adds that each evaluation costs, in turns: one pair per round."""
        one = torch.ones(1)

        def adds() -> float:
            start = time.thread_time()
            for _ in range(20 * ADDS):
                torch.add(one, one)
            return (time.thread_time() - start) / (20 * ADDS)

        found = []
        few, many = BATCHES
        for number in range(count):
            unit, taken = adds(), {}
            for case in self._cases if number % 2 else self._cases[::-1]:
                start = time.thread_time()
                self._call(*case)
                taken[case] = time.thread_time() - start
            unit = (unit + adds()) / 2
            pair = []
            for which in (0, 1):
                per_sample = (taken[which, many] - taken[which, few]) / (many - few)
                pair.append((taken[which, few] - few * per_sample) / unit)
            found.append(pair)
        return found


def main() -> None:
    """Answer one request: `backend rounds`."""
    torch.set_num_threads(1)
    gc.disable()
    pair = Pair(sys.argv[1])
    plain, ours = pair.functions()
    rounds = pair.rounds(int(sys.argv[2]))
    print(
        json.dumps(
            {
                "launches": pair.launches(),
                "functions": [plain, ours],
                "adds": [round(median(each[which] for each in rounds)) for which in (0, 1)],
                "ratio": round(median(each[1] / each[0] for each in rounds), 3),
            }
        )
    )


if __name__ == "__main__":
    main()
