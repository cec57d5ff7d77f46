"""The examples about accelerate run, on small random models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.models import pipeline
from tests.integrations.tokenizer import text_encoder, tokenizer
from tests.support.peers import import_diffusers

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

    pipe = pipeline(text_encoder=text_encoder(24))
    pipe.register_modules(tokenizer=tokenizer(tmp_path))
    pipe.save_pretrained(tmp_path / "pipe")
    picture = tmp_path / "out.png"
    example("accelerate_a_pipeline").main(str(tmp_path / "pipe"), "a b", str(picture), steps=2)
    with Image.open(picture) as image:
        assert image.size == (16, 16)
    assert "residual block" in capsys.readouterr().out
