"""Train a diffusion model on a folder of images, a class per sub-folder, and sample from it.

python examples/train_on_your_images.py photos/ runs/photos

Stopped, it goes on where it was when it is started again.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import fastdiff
from fastdiff.data import DataConfig
from fastdiff.training import TRAINING_PRESETS, for_data, train_diffusion


def main(photos: str, folder: str, steps: int = 20_000) -> None:
    # on pixels, 32 x 32; channels, classes and augmentation follow from the images
    preset = replace(TRAINING_PRESETS["digits-diffusion"], autoencoder="", latent_views=0)
    run = for_data(preset, DataConfig(source="folder", path=photos))
    optimization, output = run.optimization, run.output
    run = replace(
        run,
        optimization=replace(optimization, steps=steps),
        output=replace(output, folder=folder),
    )
    train_diffusion(run, resume=(Path(folder) / "checkpoints").exists())

    model = fastdiff.load(folder)  # the averaged weights
    model.generate(seeds=[0, 1, 2, 3], steps=20)[0].save("sample.png")


if __name__ == "__main__":
    main(*sys.argv[1:3])
