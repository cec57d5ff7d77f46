"""Checkpoints of a training run: folders that are written atomically.

    checkpoints/step_00001000/networks.safetensors    weights of every trained network
                              ema.safetensors         averaged weights
                              optimizers.safetensors  AdamW's moments, by parameter name
                              task.safetensors        state of the task itself, if any
                              state.json              step, counters, loss scale
    checkpoints/latest                                name of the newest one

No random state is stored: all randomness is a function of (seed, purpose, step).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from fastdiff.files import atomic_folder, one_line_errors, write_text

FORMAT = "fastdiff training state 1"
LATEST = "latest"


def step_folder(root: Path, step: int) -> Path:
    """Path of the checkpoint written after `step` steps."""
    return root / f"step_{step:08d}"


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    """Write one checkpoint atomically.

    Args:
        root: the run's folder checkpoints/.
        step: finished steps.
        tensors: file stem -> name -> tensor.
        state: JSON-able counters.

    Raises:
        OSError: for example a full disk; earlier checkpoints are left untouched.
    """
    with atomic_folder(step_folder(root, step)) as folder:
        for stem, named in tensors.items():
            # Serialised in memory, because safetensors' own writer hides the kind of OSError.
            packed = to_bytes({name: _packed(tensor) for name, tensor in named.items()})
            (folder / f"{stem}.safetensors").write_bytes(packed)
        text = json.dumps({"format": FORMAT, "step": step, **state}, indent=2)
        (folder / "state.json").write_text(text + "\n")
    write_text(root / LATEST, step_folder(root, step).name + "\n")


def step_of(folder: Path) -> int:
    """Inverse of `step_folder`."""
    return int(folder.name.removeprefix("step_"))


def delete_old(root: Path, step: int, keep: int) -> None:
    """Delete all checkpoints up to `step`, which has just been saved, except the newest `keep`.

    Later checkpoints are kept: they belong to a run that had got further before it was set back, or
    that was killed before `latest` named them. This run overwrites them when it gets there.
    """
    folders = sorted((f for f in root.glob("step_*") if step_of(f) <= step), key=step_of)
    for folder in folders[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


@one_line_errors()
def latest_checkpoint(root: Path) -> Path | None:
    """The folder of the newest checkpoint, or None."""
    try:
        name = (root / LATEST).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    folder = root / name
    if not re.fullmatch(r"step_\d+", name) or not (folder / "state.json").is_file():
        raise ValueError(
            f"{root / LATEST} names {name!r}, which is not a checkpoint; write the name of another "
            f"checkpoint in {root} into it, or train in a new folder"
        )
    return folder


@one_line_errors()
def load_checkpoint(
    folder: Path, stems: tuple[str, ...]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Load a checkpoint: tensors by file stem and name, on the CPU, and the counters.

    Raises:
        ValueError: a file is missing, truncated or of another format.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT!r}, got {str(state)!r:.60}")
        tensors = {stem: load_file(folder / f"{stem}.safetensors") for stem in stems}
    except (SafetensorError, ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"cannot read checkpoint {folder}: {error}; write an older one's name into "
            f"{folder.parent / LATEST}"
        ) from error
    return tensors, state


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: list[str], prefix: str
) -> dict[str, Tensor]:
    """An optimizer's state as named tensors, `prefix/parameter/slot`; `names` in its order."""
    states = optimizer.state_dict()["state"]
    return {
        f"{prefix}/{names[index]}/{slot}": torch.as_tensor(value)
        for index, slots in states.items()
        for slot, value in slots.items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], prefix: str, tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`. A network that has not taken a step yet has no state.

    Files store moments in contiguous order. Fused AdamW reads parameter, gradient and moments by
    position in memory and ignores strides, so each moment gets the memory layout of its parameter.
    """
    index_of = {name: index for index, name in enumerate(names)}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, rest = key.partition("/")
        if owner == prefix:
            name, _, slot = rest.rpartition("/")
            parameter = parameters[index_of[name]]
            states.setdefault(index_of[name], {})[slot] = _laid_out_like(parameter, tensor)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Copy a moment with its parameter's strides; a counter () is returned unchanged."""
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, device="cpu", dtype=value.dtype).copy_(value)


def _packed(tensor: Tensor) -> Tensor:
    # A contiguous copy on the CPU: safetensors stores no strides and rejects shared memory.
    return tensor.detach().to("cpu", copy=True).contiguous()
