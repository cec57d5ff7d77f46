"""What a job is: its rows, its model, its defaults, and how the images are written."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from fastdiff.checkpoint.options import LoadOptions
from fastdiff.extras import import_extra
from fastdiff.files import one_line_errors
from fastdiff.generate.job import check_seed
from fastdiff.jobs.store import url_of

Format = Literal["folder", "webdataset", "parquet"]
ImageKind = Literal["png", "webp", "jpeg"]
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """A job: which images to make and how to write them. `run_job` runs it."""

    rows: str
    """File of rows, or a pattern such as ``rows-*.jsonl``: .txt, .csv, .tsv, .jsonl, .parquet, or
    .tar of webdataset. Also a URL, such as ``s3://bucket/rows.jsonl``. One image per row."""
    model: str = "digits"
    """File or folder of a checkpoint, folder of a run, or name of a shipped model."""
    out: Path = Path("out/job")
    """Folder for the shards, created if it is missing, or the URL of a store, such as
    ``Path("s3://bucket/job")``."""
    columns: dict[str, str] = field(default_factory=dict)
    """field -> column; columns that have the name of a field need no entry."""
    ignore: tuple[str, ...] = ()
    """Columns that are not used. All others must have a meaning."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Values of the fields that a row leaves out, such as ``{"steps": 20}``."""
    seed: int = 0
    """Seed of row 0; row i without a seed of its own has seed + i."""
    shard_size: int = 1000
    """Rows per shard, the unit of work: a shard is a folder, a tar or a Parquet file."""
    format: Format = "folder"
    """How a shard is stored."""
    image: ImageKind = "png"
    """File format of the images."""
    quality: int = 90
    """Quality of WebP and JPEG, 1 to 100."""
    load: LoadOptions = field(default_factory=LoadOptions)
    """What the files of the model do not state."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: a GPU if there is one. Several workers on cuda take the GPUs in
    turns."""
    dtype: str = "float32"
    """Number format of the networks, by torch's name."""
    backend: str = "auto"
    """Backend of the ops."""
    graphs: bool = True
    """On a GPU, run each step as one CUDA graph."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "quality"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r:.40}")
        if self.quality > 100:
            raise ValueError(f"quality must be 1 to 100, got {self.quality}")
        check_seed(self.seed)
        for name, choices in (("format", get_args(Format)), ("image", get_args(ImageKind))):
            if getattr(self, name) not in choices:
                got = getattr(self, name)
                raise ValueError(f"unknown {name} {got!r}; expected one of {', '.join(choices)}")

    @property
    def recorded(self) -> dict[str, Any]:
        """The fields as JSON-compatible values."""
        data = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {
            **data,
            "out": url_of(self.out) or str(self.out),
            "ignore": sorted(self.ignore),
            "load": self.load.recorded,
        }

    @classmethod
    def of_recorded(cls, data: Any) -> JobSpec:
        """Inverse of `recorded`; fields that are missing have their defaults.

        Raises:
            ValueError: a field is unknown or missing, or a value is wrong.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a job must be an object with its fields, got {data!r:.40}")
        known = {entry.name: entry for entry in fields(cls)}
        for name, value in data.items():
            if name not in known:
                raise ValueError(f"unknown field {name!r}; expected one of {', '.join(known)}")
            wanted = KINDS_OF_FIELDS[name]
            if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
                raise ValueError(f"{name} must be {WORDS[wanted]}, got {value!r:.40}")
        if "rows" not in data:
            raise ValueError("the job lacks 'rows', the file of its rows")
        given = dict(data)
        if "ignore" in given:
            given["ignore"] = tuple(map(str, given["ignore"]))
        if "columns" in given:
            given["columns"] = {str(k): str(v) for k, v in given["columns"].items()}
        if "out" in given:
            given["out"] = Path(given["out"])
        if "load" in given:
            given["load"] = LoadOptions.of_recipe(given["load"])
        return cls(**given)


WORDS: dict[type, str] = {
    str: "text",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}
KINDS_OF_FIELDS: dict[str, type] = {
    **dict.fromkeys(["rows", "model", "out", "format", "image", "device", "dtype", "backend"], str),
    **dict.fromkeys(["seed", "shard_size", "quality"], int),
    **dict.fromkeys(["columns", "defaults", "load"], dict),
    "ignore": list,
    "graphs": bool,
}
"""Field of a job's file -> its type there."""


@one_line_errors()
def read_job(path: str | os.PathLike[str]) -> JobSpec:
    """Read a YAML file with the fields of a `JobSpec`.

    Paths in it start at the folder from which the program was called, as on the command line.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not YAML, a field is unknown or missing, or a value is wrong.
        ImportError: PyYAML is not installed.
    """
    yaml = import_extra("yaml", extra="jobs")
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    try:
        return JobSpec.of_recorded(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
