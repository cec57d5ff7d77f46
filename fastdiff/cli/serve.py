"""``fastdiff serve``: OpenAI's image endpoints for a model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastdiff.checkpoint.options import LoadOptions
from fastdiff.cli.machine import SamplingCompute, chosen_backend, device_and_dtype
from fastdiff.cli.options import FLAT, NO_NONE
from fastdiff.cli.parsing import OptionalInt, OptionalName, OptionalPath, parse
from fastdiff.serve.limits import KeyLimits, Limits

if TYPE_CHECKING:
    import torch

    from fastdiff.serve.metrics import Metrics
    from fastdiff.serve.pool import Pool
    from fastdiff.serve.worker import Worker

EXTRA = "serve"
PACKAGES = ("starlette", "uvicorn", "prometheus_client", "python_multipart")
SHORTEST_KEY = 16


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a model with OpenAI's image endpoints, /v1/images/generations and /v1/images/edits.

    Requests of any settings share one batch: they join and leave between steps, and on a CPU each
    image has the bits that `model.generate` gives it alone. SIGTERM and Ctrl-C finish what runs.

    Examples:
      fastdiff serve --model digits --port 8000
      fastdiff serve --model stable-diffusion-v1-5/ --dtype fp16 --slots 8
      fastdiff serve --host 0.0.0.0 --api-key-file keys.txt --limits.queue 64 --limits.deadline 60
    """

    model: str = "digits"
    """File or folder of a checkpoint, folder of a run, or name of a shipped model."""
    name: OptionalName = None
    """Name of the model in /v1/models; by default that of its file or folder."""
    host: str = "127.0.0.1"
    """Address to listen on; any other than this machine's own needs --api-key-file."""
    port: int = 8000
    """Port to listen on; 0 chooses a free one."""
    api_key_file: OptionalPath = None
    """File with one API key per line, of at least 16 characters; requests must send one of them.
    After a key, priority=low, normal or high limits what its requests may ask for, and images=N how
    many images they may wait for at a time."""
    slots: OptionalInt = None
    """Images in a batch: bounds memory; by default chosen by their size."""
    workers: int = 1
    """Engine processes, each with a copy of the model; with --device cuda one after the other on
    each GPU. One that dies is replaced, and its images are made again. 1: none but the server's."""
    threads: OptionalInt = None
    """Threads of the CPU for the networks, per worker; by default PyTorch's choice, shared among
    the workers."""
    limits: Limits = field(default_factory=Limits)
    load: Annotated[LoadOptions, FLAT, NO_NONE] = field(default_factory=LoadOptions)
    compute: Annotated[SamplingCompute, FLAT, NO_NONE] = field(default_factory=SamplingCompute)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"--port must be 0 to 65535, got {self.port}")
        numbers = {"slots": self.slots, "threads": self.threads, "workers": self.workers}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")


def main(words: Sequence[str]) -> int:
    options = parse(Serve, words, prog="fastdiff serve")
    return 0 if options is None else run(options)


def run(options: Serve) -> int:
    from fastdiff.extras import import_extra

    for package in PACKAGES:
        import_extra(package, extra=EXTRA)
    from fastdiff.serve.app import Service
    from fastdiff.serve.http import bind, is_loopback, serve
    from fastdiff.serve.metrics import Metrics

    keys = {} if options.api_key_file is None else read_keys(options.api_key_file)
    local = is_loopback(options.host)
    if not local and not keys:
        raise ValueError(
            f"--host {options.host} lets other machines connect, so it needs --api-key-file"
        )
    device, dtype = device_and_dtype(options.compute)
    with chosen_backend(options.compute.backend), bind(options.host, options.port) as listener:
        metrics = Metrics()
        worker, name = made_worker(options, device, dtype, metrics)
        service = Service(
            name=options.name or name,
            worker=worker,
            limits=options.limits,
            metrics=metrics,
            keys=keys,
            local=local,
        )
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {service.name} at http://{shown}:{port}/v1 on {device}", flush=True)
        return serve(service, listener)


def made_worker(
    options: Serve, device: torch.device, dtype: torch.dtype, metrics: Metrics
) -> tuple[Worker | Pool, str]:
    """The worker of this process, or several processes; and the name of the model."""
    import torch

    from fastdiff.checkpoint.open import load
    from fastdiff.kernels.choose import selected_backend
    from fastdiff.serve.engine import Setup
    from fastdiff.serve.pool import Pool
    from fastdiff.serve.worker import Worker

    graphs, threads, queue = options.compute.graphs, options.threads, options.limits.queue
    if options.workers == 1:
        model = load(options.model, options=options.load, device=device, dtype=dtype)
        slots = options.slots
        worker = Worker(model, metrics, queue=queue, slots=slots, graphs=graphs, threads=threads)
        return worker, model.name
    model = load(options.model, options=options.load)
    devices = [str(device)] * options.workers
    if devices[0] == "cuda":
        count = torch.cuda.device_count()
        devices = [f"cuda:{index % count}" for index in range(options.workers)]
    if devices[0] == "cpu" and threads is None:
        threads = max(1, torch.get_num_threads() // options.workers)
    setups = [
        Setup(
            model=options.model,
            load=options.load,
            device=each,
            dtype=str(dtype).removeprefix("torch."),
            backend=selected_backend(),
            slots=options.slots,
            graphs=graphs,
            threads=threads,
        )
        for each in devices
    ]
    return Pool(model, setups, metrics, queue=queue, step=options.limits.step), model.name


def read_keys(path: Path) -> dict[bytes, KeyLimits]:
    """The sha256 of each key in a file, and what the key allows.

    Raises:
        ValueError: there are none, one is too short, not ASCII or there twice, or what follows it
            is unknown.
        OSError: the file cannot be read.
    """
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [words for words in lines if words]
    if not lines:
        raise ValueError(f"{path} contains no API key; write one per line")
    found: dict[bytes, KeyLimits] = {}
    for number, (key, *words) in enumerate(lines, 1):
        where = f"API key {number} in {path}"
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable():
            raise ValueError(
                f"{where} must have at least {SHORTEST_KEY} letters; python -c 'import secrets; "
                "print(secrets.token_urlsafe())' makes one"
            )
        digest = hashlib.sha256(key.encode("ascii")).digest()
        if digest in found:
            raise ValueError(f"{where} is there twice; remove one of the lines")
        found[digest] = _key_limits(words, where)
    return found


def _key_limits(words: Sequence[str], where: str) -> KeyLimits:
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in ("priority", "images") or name in given:
            raise ValueError(f"{where} may be followed by priority=NAME and images=N, got {word!r}")
        given[name] = value
    priority, images = given.get("priority", "high"), given.get("images")
    if priority not in ("low", "normal", "high"):
        raise ValueError(f"{where}: priority must be low, normal or high, got {priority!r}")
    if images is not None and (not images.isdecimal() or int(images) < 1):
        raise ValueError(f"{where}: images must be at least 1, got {images!r}")
    return KeyLimits(priority=priority, images=None if images is None else int(images))
