"""The worker of against.py: calls full-size networks and the digits with any checkout's package.

So it imports nothing from this checkout, and looks up each name wherever a version has it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch


def first(*places: str) -> Any:
    """The first ``module:name`` that exists."""
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"this version has none of {', '.join(places)}")


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """Move a module to the CPU, with random weights that preserve the scale of activations."""
    module = module.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(float(name.endswith("weight")))
    return module


def prepared(module: torch.nn.Module) -> torch.nn.Module:
    """Fill a module with random weights, then prepare it for inference."""
    filled(module)
    prepare = first("fastdiff.runtime.prepare:prepare", "fastdiff.runtime:prepare")
    prepare(module)
    return module


def unet() -> Callable[[], Any]:
    """The U-Net of Stable Diffusion 1 on 4 x 32 x 32, one row."""
    presets = first("fastdiff.models.presets:UNETS", "fastdiff.presets:UNETS")
    with torch.device("meta"):
        network = import_module("fastdiff.models.unet").UNet(presets["sd1"])
    module: Any = prepared(network)
    x, t, context = torch.randn(1, 4, 32, 32), torch.tensor([500.0]), torch.randn(1, 77, 768)
    return lambda: module(x, t, context=context)


def decoder() -> Callable[[], Any]:
    """The KL-f8 decoder on 4 x 32 x 32, one row."""
    presets = first("fastdiff.models.presets:AUTOENCODERS", "fastdiff.presets:AUTOENCODERS")
    with torch.device("meta"):
        network = import_module("fastdiff.models.autoencoder").Autoencoder(presets["kl-f8"])
    module: Any = prepared(network)
    z = torch.randn(1, 4, 32, 32)
    return lambda: module.decode(z)


def digits() -> Callable[[], Any]:
    """The command ``fastdiff sample``, from start to end: 64 images with the shipped weights."""

    def call() -> None:
        with tempfile.TemporaryDirectory() as out:
            words = ["sample", "--count", "8", "--classes", *"01234567", "--out", out]
            command = [sys.executable, "-m", "fastdiff", *words]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    return call


CALLS = {"unet": unet, "decoder": decoder, "digits": digits}


class Worker:
    def open(self, name: str) -> None:
        """Build one of `CALLS`, and call it once."""
        self.call = CALLS[name]()
        self.measure()

    def measure(self) -> tuple[float, float]:
        """Call it once: seconds by the clock, and CPU seconds of this process and its children."""
        before, start = cpu_seconds(), time.perf_counter()
        with torch.inference_mode():
            self.call()
        return time.perf_counter() - start, cpu_seconds() - before


def cpu_seconds() -> float:
    taken = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in taken)


def main() -> None:
    worker = Worker()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
