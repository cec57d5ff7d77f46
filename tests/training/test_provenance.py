"""The command stored with exported weights is one that a reader can type."""

from __future__ import annotations

import sys

import pytest

from fastdiff.training import TRAINING_PRESETS
from fastdiff.training.provenance import provenance


@pytest.mark.parametrize(
    "program", ["/somewhere/bin/fastdiff", "/somewhere/site-packages/fastdiff/__main__.py"]
)
def test_command_can_be_typed(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, "train", "diffusion", "--output.folder", "my runs"])
    record = provenance(TRAINING_PRESETS["digits-diffusion"], 7)
    assert record["command"] == "fastdiff train diffusion --output.folder 'my runs'"
    assert "somewhere" not in str(record)
