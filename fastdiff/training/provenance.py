"""The origin of exported weights, for those who use them."""

from __future__ import annotations

import datetime
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff.training.trainer import Run

EXPORT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def provenance(run: Run, step: int, origin: dict[str, str] | None = None) -> dict[str, Any]:
    """Command, versions, steps, data, date and the full config, without this machine's paths.

    origin: name and hash of the model whose weights the run started from.
    """
    config = run.to_json()
    config["output"]["folder"] = Path(run.output.folder).name
    for name in ("autoencoder", "guides"):
        if config.get(name) and not isinstance(config[name], dict):
            config[name] = Path(config[name]).name
    config["data"]["path"] = Path(run.data.path).name
    if "init_from" in config:
        config["init_from"] = Path(config["init_from"]).name
    return {
        "command": shlex.join([program(), *sys.argv[1:]]),
        "fastdiff": fastdiff.__version__,
        "torch": torch.__version__,
        "steps": step,
        "data": run.data.source,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "run": config,
        **({"init_from": origin} if origin else {}),
    }


def program() -> str:
    """The name that this program was started with; ``fastdiff`` for ``python -m fastdiff``."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name
