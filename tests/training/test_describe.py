"""`--dry-run`."""

from __future__ import annotations

import json
from pathlib import Path

from fastdiff.training import TRAINING_PRESETS, describe
from fastdiff.training.autoencoder import AutoencoderTask
from tests.training import runs


def test_describe_shows_the_config_and_counts(images: Path, tmp_path: Path) -> None:
    run = runs.autoencoder_run(images, tmp_path / "run")
    text = describe(run)
    config = json.loads(text[: text.index("\n\n")])
    assert config["optimization"]["learning_rate"] == 1e-3
    count = sum(p.numel() for p in AutoencoderTask(run).networks["discriminator"].parameters())
    assert f"discriminator: {count:,} parameters" in text
    assert not (tmp_path / "run").exists()


def test_a_text_transformer_is_counted_with_its_largest_vocabulary() -> None:
    """Embeddings of tokens and places, attention (one bias), GEGLU, the output, three norms."""
    text = describe(TRAINING_PRESETS["emoji-text"])
    width, vocabulary, places = 192, 2048, 24
    attention, geglu, out = 4 * width**2 + width, 8 * width**2 + 8 * width, 4 * width**2 + width
    expected = (vocabulary + places) * width + attention + geglu + out + 3 * 2 * width
    assert f"text transformer, at most: {expected:,} parameters" in text
