"""Images from a prompt, with any Stable Diffusion checkpoint: a folder or a single file.

python examples/text_to_image.py stable-diffusion-v1-5/ "a (red:1.2) cat, oil painting"
"""

from __future__ import annotations

import sys

import torch

import fastdiff
from fastdiff.diffusion.sampling import Step
from fastdiff.images import save_png


def main(path: str, prompt: str, out: str = "cat.png", steps: int = 30) -> None:
    gpu = torch.cuda.is_available()
    model = fastdiff.load(
        path, device="cuda" if gpu else "cpu", dtype=torch.float16 if gpu else torch.float32
    )

    def show(step: Step) -> None:
        save_png("preview.png", model.preview(step.denoised)[0])

    images = model.generate(
        prompt,
        seeds=[0, 1],  # an image per seed; seed 1 alone gives the second of them
        negative="blurry, people",
        sampler="dpmpp-2m",
        steps=steps,
        guidance_scale=7.5,
        on_step=show,
        progress=lambda done, total: print(f"{done}/{total}", end="\r"),
    )
    images[0].save(out)  # with its recipe inside: fastdiff txt2img --like cat.png


if __name__ == "__main__":
    main(*sys.argv[1:])
