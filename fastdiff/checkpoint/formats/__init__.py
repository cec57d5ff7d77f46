"""Open files of weights of any format.

    safetensors       the header, checked against the file (`safetensors.py`)
    torch.save        the zip format and the older one, read without running code (`pickles.py`)
    NAME.index.json   several of these files, for one model

The format is recognised by the first bytes, not by the name, and sizes stated in a file are checked
against the size of the file before they are used.
"""

from __future__ import annotations

import os
from pathlib import Path

from fastdiff.checkpoint.formats.pickles import looks_like_torch_save, read_torch_save
from fastdiff.checkpoint.formats.safetensors import header_fits, read_safetensors
from fastdiff.checkpoint.weights import Place, Weights, read_json, some
from fastdiff.files import one_line_errors

_CONVERT = "write the weights as safetensors with the program that made it"
_PAGE = ("a web page", "the address wants a login or another link; download the file again")
KNOWN = {
    b"GGUF": ("GGUF", "download the safetensors of the model instead"),
    b"\x89HDF": ("HDF5, as Keras writes", _CONVERT),
    b"\x93NUMPY": ("a NumPy array", _CONVERT),
    b"(dp": ("a pickle in text form", _CONVERT),
    b"(lp": ("a pickle in text form", _CONVERT),
    b"version ": ("a Git LFS pointer, not the file", "run git lfs pull where it was cloned"),
    b"<!DOCTYP": _PAGE,
    b"<html": _PAGE,
    b"<!doctyp": _PAGE,
}
"""First bytes of files that people give by mistake -> what they are, and what to do."""


@one_line_errors()
def open_weights(path: str | os.PathLike[str]) -> Weights:
    """Open a file of weights, or the index of several.

    Raises:
        FileNotFoundError: the file does not exist, or a shard is missing.
        ValueError: the file is damaged, of another kind, or a pickle with more than tensors; the
            message is one line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, or is not a file; give a file of weights")
    if path.name.endswith(".json"):
        return _open_sharded(path)
    with path.open("rb") as file:
        start = file.read(8)
    # Check for a header first, because its length may begin with the bytes of a zip or a pickle.
    if header_fits(start, path.stat().st_size):
        return read_safetensors(path)
    if looks_like_torch_save(start):
        return read_torch_save(path)
    size = path.stat().st_size
    for begins, (kind, advice) in KNOWN.items():
        if start.lstrip().startswith(begins):
            raise ValueError(
                f"{path}: expected safetensors or a file of torch.save, got {kind}; {advice}"
            )
    if not size:
        raise ValueError(f"{path}: the file is empty; download it again")
    raise ValueError(
        f"{path}: expected safetensors or a file of torch.save, got {size} bytes that begin with "
        f"{start!r}; the file is truncated or of another kind"
    )


def _open_sharded(path: Path) -> Weights:
    """Open the shards that an index names ({"weight_map": {tensor: file}}), in the same folder."""
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ValueError(f"{path}: expected 'weight_map' with a file name for each tensor")
    places: dict[str, Place] = {}
    for name in sorted(set(table.values())):
        if Path(name).name != name or name == ".." or name.endswith(".json"):
            raise ValueError(
                f"{path}: a shard must be a file in the folder of the index, got {name!r:.60}"
            )
        shard = path.parent / name
        if not shard.is_file():
            keys = sum(other == name for other in table.values())
            raise FileNotFoundError(
                f"{shard} is missing: according to {path.name} it contains {keys} tensors; "
                "download all files of the model"
            )
        opened = open_weights(shard).places
        wanted = {key for key, other in table.items() if other == name}
        if opened.keys() != wanted:
            raise ValueError(
                f"{shard}: its tensors are not those of {path.name} "
                f"({some(sorted(opened.keys() ^ wanted))}); download both again"
            )
        places.update(opened)
    return Weights(path, places)
