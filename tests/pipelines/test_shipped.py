"""The digits that come with the package."""

from __future__ import annotations

import pytest
import torch

from fastdiff.checkpoint.bundle import ASSETS, load_bundle
from fastdiff.pipelines.latent import LatentDiffusion, SampleSettings

pytestmark = pytest.mark.skipif(
    not (ASSETS / "digits").is_dir(), reason="fastdiff/assets/digits is not there"
)


def test_the_shipped_bundle_is_small_and_whole() -> None:
    bundle = load_bundle("digits")
    assert bundle.unet is not None
    assert bundle.autoencoder is not None
    assert bundle.config.class_names == tuple("0123456789")
    size = sum(path.stat().st_size for path in bundle.folder.glob("*.safetensors"))
    assert size <= 8 * 2**20
    assert bundle.provenance, "the command that trained it should be recorded"


def test_the_shipped_digits_are_digits() -> None:
    """Twenty samples: the right classes under a judge that saw real digits only."""
    pytest.importorskip("sklearn", reason="the judge needs fastdiff[train]")
    from fastdiff.evaluation import Judge, digits_reference

    pipeline = LatentDiffusion.from_bundle(load_bundle("digits"))
    labels = list(range(10)) * 2
    images = pipeline(labels, list(range(20)), SampleSettings(steps=15))
    assert Judge(digits_reference(32)).accuracy(images, torch.tensor(labels)) >= 0.85
