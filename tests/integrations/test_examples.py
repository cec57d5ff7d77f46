"""The examples about accelerate run, on small random models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.models import pipeline
from tests.peers import import_diffusers

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


def example(name: str) -> Any:
    import_diffusers("DiffusionPipeline")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_your_own_module(capsys: pytest.CaptureFixture[str]) -> None:
    losses = example("accelerate_your_own_module").main(steps=40)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert "group norm + silu" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(c) for c in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    (tmp_path / "vocab.json").write_text(str({w: i for i, w in enumerate(words)}).replace("'", '"'))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    pipe = pipeline(text_encoder=CLIPTextModel(config))
    pipe.tokenizer = CLIPTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=77
    )
    pipe.register_modules(tokenizer=pipe.tokenizer)
    pipe.save_pretrained(tmp_path / "pipe")
    picture = tmp_path / "out.png"
    example("accelerate_a_pipeline").main(str(tmp_path / "pipe"), "a b", str(picture), steps=2)
    with Image.open(picture) as image:
        assert image.size == (16, 16)
    assert "residual block" in capsys.readouterr().out
