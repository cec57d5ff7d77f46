"""The tensors of a file of weights, and the modules that hold them.

Names, shapes and dtypes are known at once, numbers when asked for.

A tensor is read from its place in the file straight into the memory where it stays
(`Weights.copy_into`): nothing is held twice. `formats.open_weights` finds the places.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdiff.files import printable
from fastdiff.memory import check_memory
from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from fastdiff.models.bert import BERT, BERTConfig
from fastdiff.models.contrastive import Contrastive, ContrastiveConfig
from fastdiff.models.controlnet import ControlNet, ControlNetConfig
from fastdiff.models.glide import GLIDEText, GLIDETextConfig
from fastdiff.models.network import kind_of, network_family
from fastdiff.models.text_transformer import TextTransformer, TextTransformerConfig
from fastdiff.models.unclip import (
    ImageNoise,
    ImageNoiseConfig,
    ImageProjection,
    ImageProjectionConfig,
)

CHUNK = 2**24  # bytes read at once where numbers change their dtype on the way
LARGE = 2**26  # bytes of weights from which on memory is asked for before they are read
MAX_JSON_BYTES = 100 * 2**20  # of an index; safetensors' own limit for a header
MAX_DIMS = 64  # of a tensor; the product of a million sizes takes for ever

Shapes = Mapping[str, tuple[int, ...]]
Sources = dict[str, tuple[str, ...]]
"""Our parameter -> those of a file, whose rows are concatenated."""
Progress = Callable[[str, int], None]
"""Called as progress(tensor, bytes) after each tensor."""
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Record:
    """Bytes of a file with their CRC-32."""

    offset: int
    length: int
    crc: int


@dataclass(frozen=True)
class Place:
    """Location of a tensor: `offset` bytes into a file, `shape` contiguous numbers of `dtype`."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    """Strides in elements if the tensor is not contiguous; then `span` elements are read."""
    record: Record | None = None
    """The record that contains the tensor, if the file has a checksum for it."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Numbers from the first to the last."""
        if self.stride is None or self.numel == 0:
            return self.numel
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))


@dataclass
class Weights:
    """The tensors of one model, on disk."""

    path: Path
    """The file or the index that was opened: what messages name."""
    places: dict[str, Place]
    facts: dict[str, Any] = field(default_factory=dict)
    """Other contents of the file: metadata, global_step."""
    checked: set[tuple[Path, int]] = field(default_factory=set)
    """The records (file, offset) whose checksums have been compared."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: place.shape for key, place in self.places.items()}

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """Those tensors of ours that `names` (new -> ours) names, under their new names."""
        places = {new: self.places[key] for new, key in names.items()}
        return Weights(self.path, places, self.facts, self.checked)

    def under(self, prefix: str) -> Weights:
        """The tensors whose names begin with `prefix`, without it."""
        names = {key[len(prefix) :]: key for key in self.places if key.startswith(prefix)}
        return self.renamed(names)

    def tensor(self, key: str) -> Tensor:
        """One tensor, in memory of its own, dtype and shape as in the file."""
        place = self.places[key]
        out = torch.empty(place.span, dtype=place.dtype)
        self._read(place, out)
        if place.stride is not None:
            return out.as_strided(place.shape, place.stride).contiguous()
        return out.view(place.shape)

    def copy_into(self, key: str, out: Tensor) -> None:
        """Fill `out`, of as many numbers, any dtype and device, contiguous."""
        place = self.places[key]
        assert out.is_contiguous()
        assert out.numel() == place.numel
        flat = out.view(-1)
        if place.stride is not None:
            flat.copy_(self.tensor(key).view(-1))
        elif out.dtype == place.dtype and out.device.type == "cpu":
            self._read(place, flat)
        else:
            step = CHUNK // place.dtype.itemsize
            for start in range(0, place.numel, step):
                part = flat[start : start + step]
                read = torch.empty(part.numel(), dtype=place.dtype)
                self._read(place, read, start)
                part.copy_(read)

    def _read(self, place: Place, out: Tensor, start: int = 0) -> None:
        """Fill the one-dimensional `out` with the numbers from `start` on.

        Raises:
            ValueError: the file ends too early, or its bytes do not have the checksum that it says.
        """
        self._check(place)
        view = out.view(torch.uint8).numpy().data if out.numel() else memoryview(b"")
        with place.path.open("rb", buffering=0) as file:
            file.seek(place.offset + start * place.dtype.itemsize)
            while len(view):
                count = file.readinto(view[: 2**30])
                if not count:
                    raise ValueError(
                        f"{place.path}: the file ends inside a tensor; was it changed?"
                    )
                view = view[count:]

    def _check(self, place: Place) -> None:
        """Compare the checksum of the record that a tensor lies in, once."""
        record = place.record
        if record is None or (place.path, record.offset) in self.checked:
            return
        crc, left = 0, record.length
        with place.path.open("rb", buffering=0) as file:
            file.seek(record.offset)
            while left and (part := file.read(min(left, CHUNK))):
                crc, left = zlib.crc32(part, crc), left - len(part)
        if crc != record.crc:
            raise ValueError(
                f"{place.path}: damaged: the checksum of the {record.length} bytes from "
                f"{record.offset} on is {crc:08x}, expected {record.crc:08x}; download the file "
                "again"
            )
        self.checked.add((place.path, record.offset))


class _Unfilled(TorchFunctionMode):
    """Leaves out the first values of parameters.

    On the meta device PyTorch fills an embedding through its decompositions, whose import takes
    Dynamo along: more than a second in every command.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


_MODULES: dict[type[Any], type[nn.Module]] = {
    AutoencoderConfig: Autoencoder,
    TextTransformerConfig: TextTransformer,
    GLIDETextConfig: GLIDEText,
    BERTConfig: BERT,
    ImageProjectionConfig: ImageProjection,
    ControlNetConfig: ControlNet,
    ImageNoiseConfig: ImageNoise,
    ContrastiveConfig: Contrastive,
}
"""Config -> module, for those that are no denoisers."""


def empty_model(config: Any, file: str, tensors: int) -> nn.Module:
    """The module that a config describes, on the meta device: without memory.

    config: of an autoencoder, a ControlNet, a text transformer or a registered network; (rows,
        width) of an embedding.
    tensors: how many the file has.

    Raises:
        ValueError: the module has more blocks than the file has tensors (building it might never
            end), or sizes beyond 64 bits.
    """
    blocks = 1 if isinstance(config, tuple) else config.num_blocks
    if blocks > tensors:
        raise ValueError(
            f"{file}: the config asks for {blocks} blocks or more, the file has {tensors} tensors; "
            "use the weights that belong to this config"
        )
    try:
        with torch.device("meta"), _Unfilled():
            if isinstance(config, tuple):
                return nn.Embedding(*config)
            for kind, module in _MODULES.items():
                if isinstance(config, kind):
                    return module(config)
            return network_family(kind_of(config)).network(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{file}: the config describes a network that cannot be built "
            f"({str(error).splitlines()[0]:.120}); use the config that belongs to these weights"
        ) from error


def fill(
    model: Module,
    sources: Sources,
    weights: Weights,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    progress: Progress | None = None,
) -> Module:
    """Give a model on the meta device its numbers; eval mode, no gradients.

    dtype: what they become; None: what most of them are in the file. device: "meta" reads none.

    Raises:
        NotEnoughMemory: they would not fit.
    """
    dtype = dtype or common_dtype(weights)
    if torch.device(device).type == "meta":
        return model.to(dtype).eval().requires_grad_(False)
    shapes = model.state_dict()
    need = sum(tensor.numel() for tensor in shapes.values()) * dtype.itemsize
    if need > LARGE:
        check_memory(
            need,
            f"{weights.path}: a model of this size",
            device=device,
            way_out="free some, or load in another dtype or on another device",
        )
    state: dict[str, Tensor] = {}
    for name, expected in shapes.items():
        value = torch.empty(expected.shape, dtype=dtype, device=device)
        row = 0
        for key in sources[name]:
            shape = weights.places[key].shape
            part = value[row : row + shape[0]] if shape else value  # numbers have no rows
            weights.copy_into(key, part)
            row += shape[0] if shape else 0
        state[name] = value
        if progress is not None:
            progress(name, value.nbytes)
    model.load_state_dict(state, assign=True)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.eval().requires_grad_(False)


def common_dtype(weights: Weights) -> torch.dtype:
    """The floating-point dtype of most numbers; fp32 where there are none."""
    counts: dict[torch.dtype, int] = {}
    for place in weights.places.values():
        if place.dtype.is_floating_point:
            counts[place.dtype] = counts.get(place.dtype, 0) + place.numel
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_JSON_BYTES} bytes of JSON")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def some(names: Iterable[str], count: int = 5) -> str:
    """The first names of a list, for messages."""
    names = list(map(printable, names))
    return ", ".join(names[:count]) + (f", … ({len(names)})" if len(names) > count else "")
