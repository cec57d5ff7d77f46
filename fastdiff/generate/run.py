"""`fastdiff.generate`: any mix of jobs in, their images out, in the jobs' order, as they are done.

job -> check -> plan (x, table, conditions) -> engine -> [second pass -> engine] -> decode -> image
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.diffusion.sampling import OnStep
from fastdiff.generate import from_noise, image_to_image, inpainting, interpolation, upscale
from fastdiff.generate.facts import MOST_AT_ONCE, check, default_batch, is_small
from fastdiff.generate.job import (
    ClassJob,
    ImageToImageJob,
    InpaintJob,
    InterpolationJob,
    Job,
    TextJob,
)
from fastdiff.generate.recipe import write_recipe
from fastdiff.generate.session import Pass, Session
from fastdiff.generate.webui import to_parameters
from fastdiff.images import save_png, to_pil
from fastdiff.runtime.blocks import block_size
from fastdiff.runtime.graphs import no_graphs
from fastdiff.runtime.run import Engines
from fastdiff.runtime.run import run as run_requests

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[[int, int], None]
"""Called as progress(done, total) after each step."""
Clock = Callable[[str], contextlib.AbstractContextManager[None]]
"""Entered as `with clock("sample")`, `with clock("decode")` around the stages, to time them."""


def _no_clock(_: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """An image, and what it came from."""

    job: Job
    """What was done: the job that was given, with the model's defaults filled in."""
    image: Tensor
    """(C, H, W) in [-1, 1], fp32 (fp64 from a model in fp64), on the CPU."""
    session: Session
    """What made it."""
    refiner: Session | None = None
    """What ended it."""

    @property
    def pil(self) -> Image:
        """The image for Pillow, grey or RGB."""
        return to_pil(self.image)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Everything that the image depends on, JSON-able. The first of a model hashes its weights,
        which takes about a second per GB."""
        return write_recipe(self.job, self.session, self.refiner)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a PNG that carries its recipe; `fastdiff info` shows it, --like makes it again."""
        save_png(path, self.image, self.recipe, parameters=to_parameters(self.recipe))


def generate(
    model: Model,
    jobs: Iterable[Job],
    *,
    refiner: Model | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
    clock: Clock = _no_clock,
    expected: int | None = None,
    graphs: bool = True,
) -> Iterator[Result]:
    """Do jobs of any kinds, sizes and settings, and yield their results in the jobs' order.

    On the CPU an image depends on its job and the model only, bit for bit.

    Args:
        jobs: taken as there is room for them, so there may be more than fit into memory.
        refiner: ends the images of each `TextJob`, from its `switch` on.
        batch: images at once; None: the first job's `settings.batch`, or by its size. It bounds
            memory and changes no image.
        progress: called as progress(done, total) after each step of the engine, in rows of the
            samplers' tables: those taken, and those of all jobs that have been begun.
        on_step: called with a `Step` after each step; an exception of its own ends the sampling.
        clock: times the stages.
        expected: how many jobs there are, for `progress`; None: their length, if they have one.
        graphs: on a GPU each step is one CUDA graph; False: it is launched kernel by kernel.

    Raises:
        ValueError: a job that does not fit the model, or a result that is not finite.
        NotEnoughMemory: a job that would not fit into memory (a MemoryError).
    """
    session, second = Session.of(model), None if refiner is None else Session.of(refiner)
    if expected is None and isinstance(jobs, list | tuple):
        expected = len(jobs)
    run = _Run(session, second, batch, progress, on_step, clock, expected or 0, graphs)
    yield from _in_order(run.results(jobs))


def plan(session: Session, job: Job, refiner: Session | None = None) -> Pass:
    """The first pass of a checked job."""
    if isinstance(job, ClassJob | TextJob):
        return from_noise.plan(session, job, refiner)
    if isinstance(job, ImageToImageJob):
        return image_to_image.plan(session, job)
    if isinstance(job, InpaintJob):
        return inpainting.plan(session, job)
    if isinstance(job, InterpolationJob):
        return interpolation.plan(session, job)
    return upscale.plan(session, job)


@dataclass(frozen=True, eq=False)
class _Task:
    """A job on its way: the tag of its requests."""

    number: int
    job: Job
    now: Pass


@dataclass(frozen=True)
class _Run:
    """One call of `generate`."""

    session: Session
    refiner: Session | None
    batch: int | None
    progress: Progress | None
    on_step: OnStep | None
    clock: Clock
    expected: int
    graphs: bool

    def results(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Result]]:
        """(number of the job, result), in the order in which they are done."""
        waiting: list[tuple[_Task, Tensor]] = []
        for task, z in self._latents(jobs):
            if waiting and _kind(waiting[0]) != _kind((task, z)):
                yield from self._decode(waiting)
                waiting = []
            waiting.append((task, z))
            if len(waiting) >= self._piece(z):
                yield from self._decode(waiting)
                waiting = []
        yield from self._decode(waiting)

    def _latents(self, jobs: Iterable[Job]) -> Iterator[tuple[_Task, Tensor]]:
        """Each job's x after its last pass; whoever is done first comes first."""
        done: list[tuple[_Task, Tensor]] = []
        second: list[_Task] = []

        seen: set[Any] = set()

        def begin() -> Iterator[_Task]:
            for number, given in enumerate(jobs):
                job = check(given, self.session.facts)
                self._check_memory(job, seen)
                task = _Task(number, job, plan(self.session, job, self.refiner))
                if task.now.request is not None:
                    yield task
                else:
                    assert task.now.x is not None
                    done.append((task, task.now.x))

        for task, x in self._run(self.session, begin()):
            if task.now.then is None:
                done.append((task, x))
            else:
                second.append(replace(task, now=task.now.then(x)))
            if second and len(second) >= self._count(second[-1]):
                done += self._again(second)
                second = []
            yield from done
            done.clear()
        done += self._again(second)
        yield from done

    def _check_memory(self, job: Job, seen: set[Any]) -> None:
        """Once for all jobs alike, which are added to `seen`.

        Raises:
            NotEnoughMemory: a job would not fit.
        """
        size = getattr(job, "height", None), getattr(job, "width", None)
        picture = getattr(job, "image", None)
        key = (type(job), size, None if isinstance(picture, Tensor) else picture)
        if None not in size and key in seen:
            return
        seen.add(key)
        session, batch = self.session, self.batch or job.settings.batch or MOST_AT_ONCE
        batch = min(batch, self.expected or batch)
        if is_small(job, session.facts, batch, on_cpu=session.device.type == "cpu"):
            return
        from fastdiff.generate.memory import Call, check_fits

        check_fits(
            [session.model, None if self.refiner is None else self.refiner.model],
            job,
            Call(device=session.device, dtype=session.dtype, count=batch, batch=self.batch),
            way_out="give a smaller height, width or batch",
            loaded=True,
        )

    def _again(self, tasks: list[_Task]) -> Iterator[tuple[_Task, Tensor]]:
        """The second passes, which are all of one network."""
        for task in tasks:
            if task.now.request is None:
                assert task.now.x is not None
                yield task, task.now.x
        left = [task for task in tasks if task.now.request is not None]
        if left:
            yield from self._run(left[0].now.session, iter(left))

    def _run(self, session: Session, tasks: Iterator[_Task]) -> Iterator[tuple[_Task, Tensor]]:
        first = next(tasks, None)
        if first is None:
            return
        results = run_requests(
            session.network,
            (
                replace(task.now.request, tag=task)
                for task in itertools.chain([first], tasks)
                if task.now.request is not None
            ),
            slots=self._count(first),
            engines=session.engines if self.graphs else Engines(session.network, graphs=no_graphs),
            on_step=self.on_step,
            progress=self._telling(first),
        )
        while True:
            with self.clock("sample"):
                result = next(results, None)
            if result is None:
                return
            yield result.request.tag, result.x

    def _telling(self, first: _Task) -> Progress | None:
        """Progress whose total counts on jobs to come that take as many rows as the first."""
        progress, request = self.progress, first.now.request
        if progress is None or request is None:
            return progress
        least = self.expected * len(request.table)
        return lambda done, total: progress(done, max(total, least))

    def _count(self, task: _Task) -> int:
        """Samples at once, from a job that is the first of its kind."""
        asked = self.batch or task.job.settings.batch
        if asked is not None or task.now.request is None:
            return asked or 1
        height, width = task.now.request.x.shape[1:]
        return default_batch(height, width, text=task.now.session.facts.reads_text)

    def _piece(self, z: Tensor) -> int:
        """Latents that are decoded at once: on the CPU as many as are computed at once."""
        return block_size(z.shape[1], z.shape[2], z.device) or self.batch or 4

    def _decode(self, tasks: list[tuple[_Task, Tensor]]) -> Iterator[tuple[int, Result]]:
        if not tasks:
            return
        session, tile = tasks[0][0].now.session, tasks[0][0].job.settings.tile or 0
        with self.clock("decode"):
            z = torch.stack([z for _, z in tasks])
            images = session.latents.decode(z, tile=tile).cpu()
        refiner = None if session is self.session else session
        for (task, _), image in zip(tasks, images, strict=True):
            made = Result(
                job=task.job,
                image=_pasted(image, task.now.paste),
                session=self.session,
                refiner=refiner,
            )
            yield task.number, made


def _pasted(image: Tensor, paste: tuple[Tensor, Tensor] | None) -> Tensor:
    """The image, with the original's pixels where the mask is 0."""
    if paste is None:
        return image
    mask, original = paste
    return torch.where(mask.bool(), image, original.to(image))


def _kind(task: tuple[_Task, Tensor]) -> tuple[Any, ...]:
    """What latents that are decoded together share."""
    return task[0].now.session, task[1].shape, task[0].job.settings.tile


def _in_order(results: Iterator[tuple[int, Result]]) -> Iterator[Result]:
    early: dict[int, Result] = {}
    wanted = 0
    for number, result in results:
        early[number] = result
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1
