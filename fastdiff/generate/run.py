"""`fastdiff.generate`: run any mix of jobs and yield their images in order, as they finish.

job -> check -> plan (x, table, conditions) -> engine -> [second pass -> engine] -> decode -> image
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.checkpoint.model import Model
from fastdiff.diffusion.gradients import Pull
from fastdiff.diffusion.samplers.rows import OUT_OF_NOISE
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
from fastdiff.memory import NotEnoughMemory
from fastdiff.runtime.blocks import block_size
from fastdiff.runtime.engine import Request
from fastdiff.runtime.graphs import no_graphs
from fastdiff.runtime.run import Engines
from fastdiff.runtime.run import run as run_requests

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[[int, int], None]
"""Called as progress(done, total) after each step."""
OnFailure = Callable[[int, Exception], None]
"""Called as on_failure(number, error) for the job at this position, counted from 0."""
FAILURES = (ValueError, OSError, NotEnoughMemory)
"""Errors of a single job: it does not fit the model or the memory, or its picture is unreadable."""
Clock = Callable[[str], contextlib.AbstractContextManager[None]]
"""Entered as `with clock("sample")`, `with clock("decode")` around the stages, to time them."""


def _no_clock(_: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """An image and what made it."""

    job: Job
    """The job, with the model's defaults filled in."""
    image: Tensor
    """(C, H, W) in [-1, 1], fp32 (fp64 from a model in fp64), on the CPU."""
    session: Session
    """Session of the model that made the image."""
    refiner: Session | None = None
    """Session of the refiner that finished the image, if one was used."""
    pulls: tuple[Pull, ...] = ()
    """Functions that guided the image besides the job's own guidance."""
    log_probs: Tensor | None = None
    """(rows,), log p(x after | x before) of each row of the sampler's tables, in order, 0 for rows
    without noise; on the CPU. None unless asked for."""

    @property
    def pil(self) -> Image:
        """The image as a PIL image, greyscale or RGB."""
        return to_pil(self.image)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Everything that the image depends on, as JSON-compatible values.

        The first recipe of a model hashes its weights, which takes about a second per GB. Of
        `pulls` it has only the names, so it cannot make the image again.
        """
        recipe = write_recipe(self.job, self.session, self.refiner)
        return {**recipe, "guided_by": list(map(str, self.pulls))} if self.pulls else recipe

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a PNG with its recipe: `fastdiff info` shows it, `--like` reproduces the image."""
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
    pulls: Sequence[Pull] = (),
    log_probs: bool = False,
) -> Iterator[Result]:
    """Run jobs of any kind, size and settings, and yield their results in the order of the jobs.

    On the CPU an image depends only on its job and the model, bit for bit.

    Args:
        jobs: read lazily, as slots become free, so there can be more than fit in memory.
        refiner: finishes the image of each `TextJob`, starting at the job's `switch`.
        batch: number of images computed at once; None: the first job's `settings.batch`, or chosen
            from its size. It bounds memory and does not change the images.
        progress: called as progress(done, total) after each step of the engine. Both count rows of
            the samplers' tables: rows finished, and rows of all jobs started so far.
        on_step: called with a `Step` after each step; an exception that it raises stops sampling.
        clock: context manager that times the stages.
        expected: number of jobs, for `progress`; None: the length of `jobs` if it has one.
        graphs: run each step as one CUDA graph on a GPU; False: launch kernel by kernel.
        pulls: functions whose gradients guide every image, such as `loss_pull(loss, scale)` of
            `fastdiff.diffusion.gradients`. They see latents if the model works on latents, and are
            left out where sigma / alpha is above OUT_OF_NOISE.
        log_probs: results contain the log-density of each row's noise (`Result.log_probs`), for
            training with rewards.

    Raises:
        ValueError: a job does not fit the model, a result is not finite, or log_probs are asked for
            where a mask replaces part of the steps' results.
        NotEnoughMemory: a job would not fit in memory (a MemoryError).
    """
    session, second = Session.of(model), None if refiner is None else Session.of(refiner)
    if expected is None and isinstance(jobs, list | tuple):
        expected = len(jobs)
    run = _Run(
        session,
        second,
        batch,
        progress,
        on_step,
        clock,
        expected or 0,
        graphs,
        tuple(pulls),
        log_probs=log_probs,
    )
    yield from _in_order(run.results(jobs))


def stream(
    model: Model,
    jobs: Iterable[Job],
    *,
    on_failure: OnFailure,
    batch: int | None = None,
    progress: Progress | None = None,
    graphs: bool = True,
) -> Iterator[tuple[int, Result]]:
    """Run jobs as `generate` does, but yield results as they finish, and go on after failures.

    Yields (number, result): the position of the job in `jobs`, counted from 0, in any order. Each
    job is either yielded or reported to `on_failure`.

    Args:
        on_failure: called for a job that does not fit the model or the memory, whose picture cannot
            be read, or for which the network returns NaN or infinity. The others continue.

    Other arguments are those of `generate`.
    """
    run = _Run(Session.of(model), None, batch, progress, None, _no_clock, 0, graphs, (), on_failure)
    yield from run.results(jobs)


def plan(session: Session, job: Job, refiner: Session | None = None) -> Pass:
    """Plan the first pass of a checked job."""
    if isinstance(job, ClassJob | TextJob):
        return from_noise.plan(session, job, refiner)
    if isinstance(job, ImageToImageJob):
        return image_to_image.plan(session, job)
    if isinstance(job, InpaintJob):
        return inpainting.plan(session, job)
    if isinstance(job, InterpolationJob):
        return interpolation.plan(session, job)
    return upscale.plan(session, job)


def engine_request(now: Pass, pulls: Sequence[Pull] = (), tag: Any = None) -> Request:
    """The request of a pass for the engine.

    pulls: guide the image besides those of its job. All are left out in nearly pure noise.
    """
    assert now.request is not None, "a pass with steps to take"
    limited = [
        replace(pull, max_sigma=min(pull.max_sigma, OUT_OF_NOISE))
        for pull in (*now.request.pulls, *pulls)
    ]
    return replace(now.request, tag=tag, pulls=tuple(limited))


@dataclass(frozen=True, eq=False)
class _Task:
    """A job in progress; its requests carry it as their tag."""

    number: int
    job: Job
    now: Pass
    log_probs: tuple[Tensor, ...] = ()
    """Of each pass so far, if asked for."""


@dataclass(frozen=True)
class _Run:
    """State of one call of `generate`."""

    session: Session
    refiner: Session | None
    batch: int | None
    progress: Progress | None
    on_step: OnStep | None
    clock: Clock
    expected: int
    graphs: bool
    pulls: tuple[Pull, ...]
    on_failure: OnFailure | None = None
    log_probs: bool = False

    def results(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Result]]:
        """Yield (job number, result) in the order in which the jobs finish."""
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
        """Yield each job's x after its last pass, in the order in which the jobs finish."""
        done: list[tuple[_Task, Tensor]] = []
        second: list[_Task] = []

        seen: set[Any] = set()

        def begin() -> Iterator[_Task]:
            for number, given in enumerate(jobs):
                task = self._begun(number, given, seen)
                if task is None:
                    continue
                if task.now.request is not None:
                    yield task
                else:
                    assert task.now.x is not None
                    done.append((task, task.now.x))

        for task, x in self._run(self.session, begin()):
            if task.now.then is None:
                done.append((task, x))
            else:
                second += self._next(task, x)
            if second and len(second) >= self._count(second[-1]):
                done += self._again(second)
                second = []
            yield from done
            done.clear()
        done += self._again(second)
        yield from done

    def _begun(self, number: int, given: Job, seen: set[Any]) -> _Task | None:
        """Check and plan a job; None if it failed, which was reported."""
        try:
            job = check(given, self.session.facts)
            self._check_memory(job, seen)
            return _Task(number, job, plan(self.session, job, self.refiner))
        except FAILURES as error:
            self._report(number, error)
            return None

    def _next(self, task: _Task, x: Tensor) -> list[_Task]:
        """A task's next pass, planned from x, the result of the one before; none if it failed."""
        assert task.now.then is not None
        try:
            return [replace(task, now=task.now.then(x))]
        except FAILURES as error:
            self._report(task.number, error)
            return []

    def _report(self, number: int, error: Exception) -> None:
        """Report an error of a job to `on_failure`; raise it if there is none."""
        if self.on_failure is None:
            raise error
        self.on_failure(number, error)

    def _check_memory(self, job: Job, seen: set[Any]) -> None:
        """Check the memory of a job, once per kind and size; `seen` collects what was checked.

        Raises:
            NotEnoughMemory: the job would not fit.
        """
        size = getattr(job, "height", None), getattr(job, "width", None)
        cache = job.settings.caching
        branch = None if cache is None else cache.branch
        key = (type(job), size, getattr(job, "upscale", None), branch)
        if key in seen:
            return
        session, batch = self.session, self.batch or job.settings.batch or MOST_AT_ONCE
        # a stream goes on with fewer slots when memory runs out: one image has to fit
        batch = min(batch, self.expected or batch) if self.on_failure is None else 1
        if not is_small(job, session.facts, batch, on_cpu=session.device.type == "cpu"):
            from fastdiff.generate.memory import Call, check_fits

            check_fits(
                [session.model, None if self.refiner is None else self.refiner.model],
                job,
                Call(
                    device=session.device,
                    dtype=session.dtype,
                    count=batch,
                    batch=self.batch if self.on_failure is None else 1,
                ),
                way_out="use a smaller height, width or batch",
                loaded=True,
            )
        if None not in size:  # else the picture decides, and there may be millions of them
            seen.add(key)

    def _again(self, tasks: list[_Task]) -> Iterator[tuple[_Task, Tensor]]:
        """Run second passes, which all use the same network, and those that follow them."""
        for task in tasks:
            if task.now.request is None:
                assert task.now.x is not None
                yield task, task.now.x
        left = [task for task in tasks if task.now.request is not None]
        third: list[_Task] = []
        for task, x in self._run(left[0].now.session, iter(left)) if left else ():
            if task.now.then is None:
                yield task, x
            else:
                third += self._next(task, x)
        if third:
            yield from self._again(third)

    def _run(self, session: Session, tasks: Iterator[_Task]) -> Iterator[tuple[_Task, Tensor]]:
        first = next(tasks, None)
        if first is None:
            return
        results = run_requests(
            session.network,
            (
                engine_request(task.now, self.pulls, task)
                for task in itertools.chain([first], tasks)
                if task.now.request is not None
            ),
            slots=self._count(first),
            engines=session.engines if self.graphs else Engines(session.network, graphs=no_graphs),
            on_step=self.on_step,
            progress=self._estimated(first),
            check=self.on_failure is None,
            log_probs=self.log_probs,
        )
        while True:
            with self.clock("sample"):
                result = next(results, None)
            if result is None:
                return
            if result.error is None:
                task = result.request.tag
                if result.log_probs is not None:
                    task = replace(task, log_probs=(*task.log_probs, result.log_probs))
                yield task, result.x
            else:
                self._report(result.request.tag.number, ValueError(result.error))

    def _estimated(self, first: _Task) -> Progress | None:
        """`progress`, with a total that assumes later jobs to take as many rows as the first."""
        progress, request = self.progress, first.now.request
        if progress is None or request is None:
            return progress
        least = self.expected * len(request.table)
        return lambda done, total: progress(done, max(total, least))

    def _count(self, task: _Task) -> int:
        """Number of samples to run at once, from the first job of its kind."""
        asked = self.batch or task.job.settings.batch
        if asked is not None or task.now.request is None:
            return asked or 1
        height, width = task.now.request.x.shape[1:]
        return default_batch(height, width, text=task.now.session.facts.reads_text)

    def _piece(self, z: Tensor) -> int:
        """Number of latents to decode at once: on the CPU, one block of the computation."""
        return block_size(z.shape[1], z.shape[2], z.device) or self.batch or 4

    def _decode(self, tasks: list[tuple[_Task, Tensor]]) -> Iterator[tuple[int, Result]]:
        if not tasks:
            return
        session, tile = tasks[0][0].now.session, tasks[0][0].job.settings.tile or 0
        with self.clock("decode"):
            z = torch.stack([z for _, z in tasks])
            images = session.latents.decode(z, tile=tile).cpu()
        refiner = self.refiner if session is self.refiner else None
        for (task, _), image in zip(tasks, images, strict=True):
            made = Result(
                job=task.job,
                image=pasted(image, task.now.paste),
                session=self.session,
                refiner=refiner,
                pulls=self.pulls,
                log_probs=torch.cat(task.log_probs).cpu() if task.log_probs else None,
            )
            yield task.number, made


def pasted(image: Tensor, paste: tuple[Tensor, Tensor] | None) -> Tensor:
    """The image, with the original pixels restored where the mask is 0."""
    if paste is None:
        return image
    mask, original = paste
    return torch.where(mask.bool(), image, original.to(image))


def _kind(task: tuple[_Task, Tensor]) -> tuple[Any, ...]:
    """Key of a decoding batch: latents with equal keys can be decoded together."""
    return task[0].now.session, task[1].shape, task[0].job.settings.tile


def _in_order(results: Iterator[tuple[int, Result]]) -> Iterator[Result]:
    early: dict[int, Result] = {}
    wanted = 0
    for number, result in results:
        early[number] = result
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1
