"""`--dry-run`."""

from __future__ import annotations

import json
from pathlib import Path

from fastdiff.training import describe
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
