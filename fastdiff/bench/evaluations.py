"""Predicted times of one evaluation of a network on an H200, with the host's time.

An evaluation takes the longer of two: the GPU's time, and without a CUDA graph the host's. The
GPU's time is a sum over three groups of launches, of the term that binds each:

    products    convolutions and linear layers: FLOPs at the speed of a large product, bytes at the
                speed of a copy, 2 us per launch
    attention   what predict.py says of each call, ours or padded like a library kernel
    the rest    bytes at the speed of a copy, 2 us per launch

Launches and bytes are those of launches.py and inductor.py. Times of a group are no better than its
mean: a launch that binds by bytes does not fill another's products. The host's time is counted in
tiny adds (docs/counts.json); a graph replaces it by one launch.

These are lower bounds, made before any GPU was measured; ratios of two of them say what may be
expected, not what is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from fastdiff.bench import counted, eager, inductor, launches
from fastdiff.bench.launches import DIFFUSERS, Count
from fastdiff.bench.predict import H200, Device, of_attention
from fastdiff.bench.run import Case
from fastdiff.bench.shapes import GPU_JOBS, Job
from fastdiff.bench.subjects import SUBJECTS

ADD_S = 0.8e-6
"""Seconds of one tiny `torch.add` on the host of a GPU."""
IMAGES = {"SD 1.5 U-Net": (1, 16), "SDXL U-Net": (1,), "ADM-256 U-Net": (4,)}
"""Guided images at a time: two rows of the network each."""
PRODUCTS = ("convolution", "linear")
WEIGHTS = {
    "SD 1.5 U-Net": 2 * 859_520_964,
    "SDXL U-Net": 2 * 2_567_463_684,
    "ADM-256 U-Net": 2 * 553_838_086,
}
"""Bytes of a network's parameters, which a larger batch does not read again."""
CLUSTER_BYTES = 21 * 10**6
"""The largest sample that CUDA's GroupNorm keeps in the shared memory of a cluster's blocks."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of a network."""

    network: str
    images: int
    implementation: str
    terms: Mapping[str, float]
    """What binds a group of launches -> seconds of the GPU."""
    host: float
    """Seconds."""

    @property
    def gpu(self) -> float:
        return sum(self.terms.values())

    @property
    def seconds(self) -> float:
        return max(self.gpu, self.host)

    @property
    def bound(self) -> str:
        if self.host > self.gpu:
            return "host"
        return max(self.terms, key=lambda name: self.terms[name])


def cuda_norms(n: int, c: int, pixels: int, groups: int) -> int:
    """Launches of CUDA's GroupNorm in bf16: one on chip, otherwise three."""
    return 1 if 2 * c * pixels <= CLUSTER_BYTES else 3


def of_launches(
    found: Count | inductor.Compiled, job: Job, device: Device, *, ours: bool
) -> dict[str, float]:
    """What binds -> seconds, for the launches of one evaluation of a job."""
    terms: defaultdict[str, float] = defaultdict(float)
    rest = [kind for kind in found.launches if kind not in (*PRODUCTS, "attention")]
    for kinds in (PRODUCTS, rest):
        moved = sum(found.bytes_of[kind] for kind in kinds) / device.copy
        times = {
            "products": sum(found.flops_of[kind] for kind in kinds) / device.matmul,
            "bytes": moved,
            "launches": sum(found.launches[kind] for kind in kinds) * device.launch,
        }
        bound = max(times, key=lambda name: times[name])
        terms[bound] += times[bound]
    for call, times_called in replace(job, batch=1).collect().items():
        if call.op == "attention":
            at = call.at_batch(job.batch)
            case = Case(subject=SUBJECTS["attention"], job_name=job.preset, job=job, call=at)
            found_floor = of_attention(case, device)
            seconds = found_floor.floor_s if ours else found_floor.rival_s
            terms["attention"] += times_called * max(seconds, device.launch)
    return dict(terms)


def at_batch(found: inductor.Compiled, times: int, weights: int) -> inductor.Compiled:
    """The same launches on a batch that is `times` as large: weights are read once."""
    bytes_of = Counter({kind: times * moved for kind, moved in found.bytes_of.items()})
    for kind in PRODUCTS:  # its share of the weights, by what it moves
        share = found.bytes_of[kind] / sum(found.bytes_of[each] for each in PRODUCTS)
        bytes_of[kind] -= round((times - 1) * weights * share)
    flops_of = Counter({kind: times * flops for kind, flops in found.flops_of.items()})
    return replace(found, bytes_of=bytes_of, flops_of=flops_of)


def evaluations(device: Device = H200) -> Iterator[Evaluation]:
    """Ours in a graph against the rivals; Inductor only if docs/counts.json has its launches."""
    for name, several in IMAGES.items():
        for images in several:
            yield from _of_network(name, images, device)


def _of_network(name: str, images: int, device: Device) -> Iterator[Evaluation]:
    job = replace(GPU_JOBS[name], batch=2 * images)

    def one(
        implementation: str,
        found: Count | inductor.Compiled,
        host: float = device.launch,
        *,
        ours: bool = True,
    ) -> Evaluation:
        return Evaluation(
            network=name,
            images=images,
            implementation=implementation,
            terms=of_launches(found, job, device, ours=ours),
            host=host,
        )

    yield one("fastdiff, graph", launches.native(job, cuda_norms))
    yield one("fastdiff, graph, Triton's norms", launches.native(job))
    if images == 1:
        yield from _of_diffusers(name, one)
    whose = "diffusers" if name in DIFFUSERS else "fastdiff, plain operators"
    compiled = inductor.compiled_networks().get(name)
    if compiled is not None:
        found = at_batch(compiled, job.batch // GPU_JOBS[name].batch, WEIGHTS[name])
        yield one(f"{whose}, Inductor, graph", found, ours=False)


def _of_diffusers(name: str, one: Callable[..., Evaluation]) -> Iterator[Evaluation]:
    """Accelerated and plain; the host's time is counted for the modules of SD 1.5 only."""
    for kept in (False, True):
        found = launches.of_diffusers(name, accelerated=True, keep_text=kept, norms=cuda_norms)
        yield one(f"diffusers, accelerated, graph{', keep_text' if kept else ''}", found)
    hosts = counted.recorded(eager.SECTION) if name == "SD 1.5 U-Net" else {}
    for backend, each in hosts.items():
        norms = cuda_norms if backend == "cuda" else None
        found = launches.of_diffusers(name, accelerated=True, norms=norms)
        host = each["adds"][1] * ADD_S
        yield one(f"diffusers, accelerated, eager, {backend}", found, host)
    if hosts:
        plain = max(each["adds"][0] for each in hosts.values()) * ADD_S
        yield one("diffusers, eager", launches.counts()[name, "diffusers"], plain, ours=False)


HEAD = ("network", "images", "implementation", "bound by", "GPU, ms", "host, ms", "of Inductor")


def rows(device: Device = H200) -> list[tuple[str, ...]]:
    """One row per evaluation, after the header; the last column is Inductor's time over its own."""
    found = list(evaluations(device))
    rival = {(e.network, e.images): e.seconds for e in found if "Inductor" in e.implementation}
    table: list[tuple[str, ...]] = [HEAD]
    for e in found:
        case = e.network, e.images
        ratio = f"{rival[case] / e.seconds:.3f} x" if case in rival else ""
        times = f"{1e3 * e.gpu:.2f}", f"{1e3 * e.host:.2f}"
        table.append((e.network, f"{e.images}", e.implementation, e.bound, *times, ratio))
    return table
