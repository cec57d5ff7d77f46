"""Repaint a photo after a prompt, then only its middle.

python examples/image_to_image_and_inpainting.py stable-diffusion-v1-5/ photo.jpg "winter"
"""

from __future__ import annotations

import sys

import torch

import fastdiff
from fastdiff.images import read_image


def main(path: str, photo: str, prompt: str, size: int = 512, steps: int = 30) -> None:
    model = fastdiff.load(path)  # device="cuda", dtype=torch.float16 on a GPU
    settings = {"sampler": "euler", "steps": steps, "guidance_scale": 7.5}
    image = read_image(photo, height=size, width=size)  # (3, H, W) in [-1, 1]; a path does too

    # strength: the share of the steps that is done; less stays nearer to the photo
    whole = model.generate(prompt, image=image, strength=0.6, **settings)
    whole[0].save("winter.png")

    mask = torch.zeros(size, size)  # 1 where the image is to be replaced
    mask[size // 4 : -size // 4, size // 4 : -size // 4] = 1
    middle = model.generate(prompt, image=image, mask=mask, **settings)
    middle[0].save("middle.png")  # outside the mask the photo's own pixels


if __name__ == "__main__":
    main(*sys.argv[1:])
