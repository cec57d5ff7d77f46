"""Stable Diffusion XL: the base for the first 80% of the noise, the refiner for the rest.

python examples/sdxl_with_refiner.py stable-diffusion-xl-base/ stable-diffusion-xl-refiner/ "a fox"
"""

from __future__ import annotations

import sys

import torch

import fastdiff


def main(base: str, refiner: str, prompt: str, size: int = 1024, steps: int = 30) -> None:
    gpu = torch.cuda.is_available()
    where = {
        "device": "cuda" if gpu else "cpu",
        "dtype": torch.float16 if gpu else torch.float32,  # the autoencoder stays in fp32
    }
    model, second = fastdiff.load(base, **where), fastdiff.load(refiner, **where)
    images = model.generate(
        prompt,
        refiner=second,
        switch=0.8,
        height=size,
        width=size,
        original_size=(size, size),
        crop=(0, 0),
        aesthetic_score=6.5,
        steps=steps,
        guidance_scale=6.0,
    )
    images[0].save("fox.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
