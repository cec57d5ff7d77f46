"""Stable Diffusion XL: the base for the first 80% of the noise, the refiner for the rest.

python examples/sdxl_with_refiner.py stable-diffusion-xl-base/ stable-diffusion-xl-refiner/ "a fox"
"""

from __future__ import annotations

import sys

import torch

import fastdiff
from fastdiff.generate.core import SampleSettings
from fastdiff.generate.refine import refine
from fastdiff.generate.text import TextDiffusion, TextSettings
from fastdiff.images import save_png


def main(base: str, refiner: str, prompt: str, size: int = 1024, steps: int = 30) -> None:
    gpu = torch.cuda.is_available()
    where = {
        "device": "cuda" if gpu else "cpu",
        "dtype": torch.float16 if gpu else torch.float32,  # the autoencoder stays in fp32
    }
    images = refine(
        TextDiffusion(fastdiff.load(base), **where),
        TextDiffusion(fastdiff.load(refiner), **where),
        prompt,
        seeds=[0],
        switch=0.8,
        height=size,
        width=size,
        text=TextSettings(original_size=(size, size), crop=(0, 0), aesthetic_score=6.5),
        settings=SampleSettings(steps=steps, guidance_scale=6.0, tile=128, batch=1),
    )
    save_png("fox.png", images[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
