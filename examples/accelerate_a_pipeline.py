"""A diffusers pipeline in one line faster; prints what became of each of its modules.

    python examples/accelerate_a_pipeline.py FOLDER "a lighthouse at dusk" lighthouse.png

FOLDER: a Stable Diffusion pipeline, saved by diffusers or downloaded as such.
"""

from __future__ import annotations

import sys

import torch
from diffusers import DiffusionPipeline

import fastdiff


def main(folder: str, prompt: str, picture: str, steps: int = 30) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)

    report = fastdiff.accelerate(pipe, pack_cpu_weights=device == "cpu")
    report.print()

    seed = torch.Generator(device).manual_seed(0)
    pipe(prompt, num_inference_steps=steps, generator=seed).images[0].save(picture)


if __name__ == "__main__":
    main(*sys.argv[1:4])
