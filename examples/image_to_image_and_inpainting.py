"""Repaint a photo after a prompt, then only its middle.

python examples/image_to_image_and_inpainting.py stable-diffusion-v1-5/ photo.jpg "winter"
"""

from __future__ import annotations

import sys

import torch

import fastdiff
from fastdiff.generate.core import SampleSettings
from fastdiff.generate.image_to_image import image_to_image
from fastdiff.generate.inpainting import inpaint
from fastdiff.generate.text import TextDiffusion
from fastdiff.images import read_image, save_png


def main(path: str, photo: str, prompt: str, size: int = 512, steps: int = 30) -> None:
    model = TextDiffusion(fastdiff.load(path))  # device="cuda", dtype=torch.float16 on a GPU
    settings = SampleSettings(sampler="euler", steps=steps, guidance_scale=7.5, batch=1)
    image = read_image(photo, height=size, width=size)  # (3, H, W) in [-1, 1]

    # strength: the share of the steps that is done; less stays nearer to the photo
    whole = image_to_image(model, image, prompt, seeds=[0], strength=0.6, settings=settings)
    save_png("winter.png", whole[0])

    mask = torch.zeros(size, size)  # 1 where the image is to be new
    mask[size // 4 : -size // 4, size // 4 : -size // 4] = 1
    middle = inpaint(model, image, mask, prompt, seeds=[0], settings=settings)
    save_png("middle.png", middle[0])  # outside the mask the photo's own pixels


if __name__ == "__main__":
    main(*sys.argv[1:])
