"""``fastdiff generate``: the images of a file of rows, in shards; run again, it resumes."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastdiff.cli.console import print_pairs, seconds
from fastdiff.cli.machine import (
    TORCH_NAMES,
    SamplingCompute,
    device_and_dtype,
    output_folder,
    size,
)
from fastdiff.cli.options import FLAT, NO_NONE, LoadOptions
from fastdiff.cli.parsing import OptionalInt, OptionalName, parse
from fastdiff.configs import from_dict
from fastdiff.generate.job import PLAIN, SampleSettings

if TYPE_CHECKING:
    from fastdiff.jobs import JobSpec, Status

YAML = (".yaml", ".yml")
Pairs = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=COLUMN", help_behavior_hint="")]
Values = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE", help_behavior_hint="")]
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Make an image per row of a file, thousands or millions of them.

    ROWS is a .txt, .csv, .tsv, .jsonl or .parquet file, a .tar of webdataset, a pattern for several
    such as 'rows-*.jsonl', or a job.yaml. Columns are fields of a job: prompt or label, seed,
    height, width, image, strength, steps, sampler, guidance_scale, negative and so on. Images are
    written in shards of a fixed range of rows, each of which is whole or not there. Run again with
    the same options, the command makes what is missing. Rows that cannot be made are listed in
    OUT/*.errors.jsonl and stop nothing. OUT/report.html shows samples, rates and errors.

    Examples:
      fastdiff generate rows.jsonl --model digits --shard-size 20 --format webdataset --out out/job
      fastdiff generate prompts.csv --model sd15 --column prompt=caption --ignore id --steps 20
      fastdiff generate rows.jsonl --out out/job --workers 2 --retry-errors
    """

    rows: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ROWS")]
    """File of rows, a pattern for several in quotes, or a job.yaml."""
    model: str = "digits"
    """File or folder of a checkpoint, folder of a run, or name of a shipped model."""
    out: Path = Path("out/job")
    """Folder for the shards, created if it is missing, or a URL such as s3://bucket/job. A job that
    is in it is resumed."""
    column: Pairs = ()
    """Columns whose name is not that of their field, such as prompt=caption."""
    ignore: Names = ()
    """Columns that are not used. Any other must have a meaning."""
    default: Values = ()
    """Values of fields that a row leaves out, such as height=64; those of the settings below have
    options of their own."""
    seed: int = 0
    """Seed of row 0; row i without a seed of its own has seed + i."""
    shard_size: int = 1000
    """Rows per shard."""
    format: Literal["folder", "webdataset", "parquet"] = "folder"
    """How a shard is stored: a folder of images, a .tar of webdataset, or a .parquet file."""
    image: Literal["png", "webp", "jpeg"] = "png"
    """File format of the images. A PNG contains its recipe; the others have it beside them."""
    quality: int = 90
    """Quality of WebP and JPEG, 1 to 100."""
    workers: int = 1
    """Processes on this machine; with --device cuda they take the GPUs in turns."""
    on: Literal["local", "ray"] = "local"
    """Where the workers run: on this machine, or on the Ray cluster at RAY_ADDRESS (without it, a
    cluster of this machine), each with one device."""
    shard: OptionalName = None
    """I/N: make only the I-th of N shares of the shards, counted from 1, for schedulers that start
    N jobs. Under torchrun, RANK and WORLD_SIZE say so."""
    threads: OptionalInt = None
    """CPU threads per worker; by default all, divided among the workers, when the job begins."""
    retry_errors: tyro.conf.FlagCreatePairsOff[bool] = False
    """Make the rows again that are listed in OUT/*.errors.jsonl."""
    timeout: float = 600.0
    """Seconds without progress after which one of several workers is replaced."""
    interval: float = 10.0
    """Seconds between two lines of progress, if the output is not a terminal."""
    settings: Annotated[SampleSettings, FLAT, NO_NONE] = PLAIN
    load: Annotated[LoadOptions, FLAT, NO_NONE] = field(default_factory=LoadOptions)
    compute: Annotated[SamplingCompute, FLAT, NO_NONE] = field(default_factory=SamplingCompute)


def main(words: Sequence[str]) -> int:
    default = spec = None
    if words and Path(words[0]).suffix.lower() in YAML:
        from fastdiff.jobs import read_job

        spec = read_job(words[0])
        default = _options_of(spec)
    options = parse(Generate, words, prog="fastdiff generate", default=default)
    if options is None:
        return 0
    if spec is not None and options.rows == words[0]:
        options = replace(options, rows=spec.rows)
    return run(options, spec)


def run(options: Generate, spec: JobSpec | None = None) -> int:
    """``spec``: of the job.yaml, whose defaults hold where no option was given."""
    from fastdiff.jobs import run_job
    from fastdiff.jobs.store import url_of

    share = _share(options.shard)
    job = _spec(options, spec)
    with _output(options.out), _shown(options.interval) as listen:
        summary = run_job(
            job,
            workers=options.workers,
            on=options.on,
            share=share,
            batch=options.settings.batch,
            threads=options.threads,
            retry_errors=options.retry_errors,
            timeout=options.timeout,
            listen=listen,
        )
    status = summary.status
    place = url_of(options.out) or str(options.out)
    print(place)
    errors = f", {summary.errors:,} rows have none: {place}/*.errors.jsonl"
    print_pairs(
        [
            ("images", f"{summary.images:,}{errors if summary.errors else ''}"),
            ("shards", f"{summary.shards:,} of {summary.of:,}"),
            (
                "this run",
                f"{status.made:,} images in {seconds(status.seconds)}, {status.rate:,.2f} images/s",
            ),
            ("report", summary.report),
        ]
    )
    return 0


def _output(out: Path) -> contextlib.AbstractContextManager[object]:
    from fastdiff.jobs.store import local_path, url_of

    url = url_of(out)
    path = out if url is None else local_path(url)
    return contextlib.nullcontext() if path is None else output_folder(path)


def _share(text: str | None) -> tuple[int, int]:
    """The value of --shard, or that of torchrun's environment; (1, 1) is the whole job.

    Raises:
        ValueError: it is not I/N with I from 1 to N.
    """
    if text is None:
        from fastdiff.jobs.run import share_of_environment

        return share_of_environment() or (1, 1)
    first, _, second = text.partition("/")
    if first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second):
        return int(first), int(second)
    raise ValueError(f"--shard must be I/N with I from 1 to N, such as 1/4, got {text!r:.40}")


def local_device(device: str, environment: Mapping[str, str]) -> str:
    """The GPU of this rank under torchrun, which starts one process per GPU of each machine."""
    rank = environment.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device


def _pairs(words: Sequence[str], flag: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise ValueError(f"{flag} takes pairs such as prompt=caption, got {name!r:.60}")
    return {name: value for name, _, value in pairs}


def _spec(options: Generate, spec: JobSpec | None) -> JobSpec:
    from fastdiff.jobs import JobSpec
    from fastdiff.jobs.fields import from_default

    device, _ = device_and_dtype(options.compute)
    given = _pairs(options.default, "--default")
    base = _settings_of(spec)  # what an option says wins over the file, also the usual value
    settings = {
        entry.name: getattr(options.settings, entry.name)
        for entry in fields(SampleSettings)
        if entry.name != "batch"
        and getattr(options.settings, entry.name) != getattr(base, entry.name)
    }
    return JobSpec(
        rows=options.rows,
        model=options.model,
        out=options.out,
        columns=_pairs(options.column, "--column"),
        ignore=options.ignore,
        defaults={
            **(spec.defaults if spec else {}),
            **settings,
            **{name: from_default(name, value) for name, value in given.items()},
        },
        seed=options.seed,
        shard_size=options.shard_size,
        format=options.format,
        image=options.image,
        quality=options.quality,
        load=options.load,
        device=local_device(str(device), os.environ),
        dtype=TORCH_NAMES[options.compute.dtype],
        backend=options.compute.backend,
        graphs=options.compute.graphs,
    )


def _settings_of(spec: JobSpec | None) -> SampleSettings:
    """The settings that a job's file gives to rows that leave them out.

    Raises:
        ValueError: one of them is wrong.
    """
    names = {entry.name for entry in fields(SampleSettings)} - {"batch"}
    given = {} if spec is None else {k: v for k, v in spec.defaults.items() if k in names}
    return from_dict(SampleSettings, given) if given else PLAIN


def _options_of(spec: JobSpec) -> Generate:
    """A job's file as the defaults of the options."""
    names = {name: short for short, name in TORCH_NAMES.items()}
    if spec.dtype not in names:
        raise ValueError(f"unknown dtype {spec.dtype!r}; expected one of {', '.join(names)}")
    compute: Any = SamplingCompute(
        backend=spec.backend,  # type: ignore[arg-type]
        device=spec.device,
        dtype=names[spec.dtype],
        graphs=spec.graphs,
    )
    return Generate(
        rows=spec.rows,
        model=spec.model,
        out=spec.out,
        column=tuple(f"{name}={column}" for name, column in spec.columns.items()),
        ignore=spec.ignore,
        seed=spec.seed,
        shard_size=spec.shard_size,
        format=spec.format,
        image=spec.image,
        quality=spec.quality,
        settings=_settings_of(spec),
        load=spec.load,
        compute=compute,
    )


@contextlib.contextmanager
def _shown(interval: float) -> Iterator[Callable[[Status], None]]:
    """Progress on stderr: a live line on a terminal, otherwise a line per interval."""
    if not sys.stderr.isatty():
        last = time.monotonic()

        def line(status: Status) -> None:
            nonlocal last
            if time.monotonic() >= last + interval:
                last = time.monotonic()
                print(status_line(status), file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading rows and model", total=None)
        yield lambda status: bar.update(
            task,
            description=status_line(status),
            completed=status.before + status.made + status.failed,
            total=status.rows,
        )


def status_line(status: Status) -> str:
    """``1,234 of 10,000 rows, 3 failed, 45.2 images/s, 3 min 14 s left, 60 of 64 slots, 1 GiB``"""
    done = status.before + status.made + status.failed
    parts = [f"{done:,} of {status.rows:,} rows"]
    if status.failed:
        parts.append(f"{status.failed:,} failed")
    parts.append(f"{status.rate:,.1f} images/s")
    if status.left is not None:
        parts.append(f"{seconds(status.left)} left")
    parts.append(f"{status.busy} of {status.slots} slots")
    parts.append(size(status.memory))
    if status.waiting:
        parts.append(f"waiting for {status.waiting} shards that another process makes")
    return ", ".join(parts)
