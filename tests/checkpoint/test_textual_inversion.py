"""Textual inversion files: equal to diffusers' with the same file, of either kind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastdiff
from fastdiff.checkpoint.options import LoadOptions
from fastdiff.checkpoint.textual_inversion import read_spec, read_vectors
from fastdiff.models.text import encode_prompt
from tests.checkpoint.pipelines import opened as peer
from tests.checkpoint.pipelines import pipeline
from tests.models.test_against_diffusers import randn

TOKEN = "<toy>"
PROMPT = "a <toy> and a cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("sd") / "pipeline"
    pipeline("sd1", found, torch.float32)
    return found


def width(folder: Path) -> int:
    encoder: Any = fastdiff.load(folder).text_encoders[0].model
    return int(encoder.config.hidden_size)


def written(path: Path, kind: str, vectors: Tensor) -> Path:
    if kind == "diffusers, one vector":
        vectors = vectors[0]
    if kind.startswith("diffusers"):
        state: dict[str, Any] = {"<learned>": vectors}
    elif path.suffix == ".safetensors":
        state = {"emb_params": vectors}
    else:
        state = {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": torch.nn.Parameter(vectors)},
            "name": "toy",
            "step": 100,
            "sd_checkpoint": None,
        }
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def tokens(model: Any, prompt: str) -> Tensor:
    return encode_prompt(model.text_encoders, prompt, emphasis=False).tokens


FILES = [
    ("diffusers, one vector", "x.safetensors"),
    ("diffusers", "x.safetensors"),
    ("diffusers", "x.bin"),
    ("web UI", "x.safetensors"),
    ("web UI", "x.pt"),
]


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_equal_to_diffusers(folder: Path, tmp_path: Path, kind: str, name: str) -> None:
    vectors = 3 * randn(3, width(folder), dtype=torch.float32, seed=1)
    path = written(tmp_path / name, kind, vectors)
    theirs = peer(folder)
    theirs.load_textual_inversion(str(path), token=TOKEN)
    expected, _ = theirs.encode_prompt(PROMPT, "cpu", 1, False)
    ours = fastdiff.load(folder, embedding={TOKEN: path})
    torch.testing.assert_close(tokens(ours, PROMPT), expected, rtol=0, atol=1e-5)
    plain = tokens(fastdiff.load(folder), PROMPT)
    assert (plain - expected).abs().max() > 1e-2, "the embedding does nothing"
    other = "a cat"
    torch.testing.assert_close(
        tokens(ours, other), tokens(fastdiff.load(folder), other), rtol=0, atol=0
    )
    assert ours.provenance["embedding"] == [f"{TOKEN}={path}"]
    assert ours.weights_hash != fastdiff.load(folder).weights_hash


def test_images_equal_to_diffusers(folder: Path, tmp_path: Path) -> None:
    vectors = 3 * randn(2, width(folder), dtype=torch.float32, seed=1)
    path = written(tmp_path / "x.safetensors", "diffusers", vectors)
    theirs = peer(folder)
    theirs.load_textual_inversion(str(path), token=TOKEN)
    ours = fastdiff.load(folder, embedding={TOKEN: path})
    t, x = torch.tensor([421]), randn(1, 4, 8, 8, dtype=torch.float32, seed=2)
    context, _ = theirs.encode_prompt(PROMPT, "cpu", 1, False)
    with torch.no_grad():
        expected = theirs.unet(x, t, context).sample
        found = ours.denoiser(x, t, context=tokens(ours, PROMPT))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_several_embeddings_and_weights(folder: Path, tmp_path: Path) -> None:
    vectors = randn(2, width(folder), dtype=torch.float32, seed=1)
    first = written(tmp_path / "a.safetensors", "diffusers", vectors)
    second = written(tmp_path / "b.safetensors", "diffusers", -vectors)
    model = fastdiff.load(folder, embedding={"<a>": first, "<b>": second})
    theirs = peer(folder)
    theirs.load_textual_inversion(str(first), token="<a>")
    theirs.load_textual_inversion(str(second), token="<b>")
    prompt = "<b> cat <a>"
    expected, _ = theirs.encode_prompt(prompt, "cpu", 1, False)
    torch.testing.assert_close(tokens(model, prompt), expected, rtol=0, atol=1e-5)
    weighted = encode_prompt(model.text_encoders, "(<b>:0) cat <a>").tokens
    assert (weighted - expected).abs().max() > 1e-3
    assert torch.equal(encode_prompt(model.text_encoders, prompt).tokens, tokens(model, prompt))


def test_a_recipe_keeps_them(tmp_path: Path) -> None:
    options = LoadOptions(embedding=("<a>=a.pt", "<b>=b.bin"))
    assert LoadOptions.of_recipe(options.recorded) == options
    with pytest.raises(ValueError, match="embedding must be a list of files, got 3"):
        LoadOptions.of_recipe({"embedding": 3})


@pytest.mark.parametrize("spec", ["toy", "=x.pt", "toy=", "a toy=x.pt"])
def test_specs_that_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="must be NAME=FILE with a name without spaces"):
        read_spec(spec)


def test_files_that_are_refused(folder: Path, tmp_path: Path) -> None:
    size = width(folder)
    for state, message in (
        ({"a": torch.ones(size), "b": torch.ones(size)}, r"expected one tensor .* got 2 \(a, b\)"),
        ({"a": torch.ones(1, 1, size)}, r"a must be \(D,\) or \(n, D\)"),
        ({"a": torch.ones(size, dtype=torch.int64)}, "floating point, got"),
        ({"a": torch.ones(size + 1)}, rf"vectors of width {size + 1}, the text encoder's have"),
    ):
        path = tmp_path / "x.safetensors"
        save_file(state, path)
        with pytest.raises(ValueError, match=message):
            fastdiff.load(folder, embedding={TOKEN: path})
    with pytest.raises(FileNotFoundError, match="give a textual inversion file"):
        read_vectors(tmp_path / "none.pt")
    save_file({"a": torch.ones(size)}, path)
    existing = next(iter(fastdiff.load(folder).text_encoders[0].tokenizer.get_vocab()))
    with pytest.raises(ValueError, match=f"already has the token '{re.escape(existing)}'"):
        fastdiff.load(folder, embedding={existing: path})
    with pytest.raises(ValueError, match="needs a model with one CLIP text encoder, got 0 of 0"):
        fastdiff.load(folder, text_encoders=False, embedding={TOKEN: path})
