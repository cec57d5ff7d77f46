"""The training loop of both stages.

A `Task` defines batches and losses; the loop does the rest: learning rate, accumulation, mixed
precision, clipping, averaged weights, logging, checkpoints, interruption, resuming.

All randomness is a function of (seed, purpose, step), so a checkpoint holds weights, moments and
counters but no generator state, and a resumed run repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from fastdiff.data import DataConfig, derive_seed
from fastdiff.files import (
    locked_folder,
    one_line_errors,
    remove_leftovers,
    write_json,
)
from fastdiff.images import save_png
from fastdiff.training import checkpoints
from fastdiff.training.config import OptimizationConfig, OutputConfig
from fastdiff.training.ema import EMA
from fastdiff.training.interrupts import Interrupts
from fastdiff.training.monitor import Monitor
from fastdiff.training.precision import autocast, check_precision
from fastdiff.training.ranks import Silent, ranks
from fastdiff.training.rates import learning_rate

Batch = dict[str, Tensor]
_LOWER_THE_RATE = "restart with a lower learning rate, with clip_norm, or with precision fp32"
CONFIG = "config.json"
STEPS = "optimization.steps"
PREVIEW_CELL = 96
"""Least edge of an image on a preview sheet, in pixels."""
MAX_SKIPPED = 50  # consecutive fp16 steps that may overflow before the run is aborted


class Run(Protocol):
    """What the configs of both stages have in common."""

    @property
    def data(self) -> DataConfig: ...
    @property
    def optimization(self) -> OptimizationConfig: ...
    @property
    def output(self) -> OutputConfig: ...
    @property
    def seed(self) -> int: ...

    def to_json(self) -> dict[str, Any]: ...
    @classmethod
    def from_json(cls, data: Any) -> Run: ...


class Task(Protocol):
    """One stage: its networks, its batches, its losses.

    Attributes:
        networks: the networks to train, each with its own optimizer.
        averaged: name of the network whose averaged weights are sampled from and exported.
        device: device of the networks and batches.
    """

    networks: dict[str, nn.Module]
    averaged: str
    device: torch.device

    def batch(self, step: int, rows: Tensor | None = None) -> Batch:
        """Tensors (batch_size, ...) of step `step`, on the device; rows (N,) int64: only these
        rows of them, with the same values."""
        ...

    def losses(self, part: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss per network (one that is left out is not updated), and scalars to log."""
        ...

    def preview(self, network: nn.Module, step: int) -> Image.Image:
        """A labelled sheet made with the averaged network after `step` steps."""
        ...

    def export(self, network: nn.Module, step: int) -> None:
        """Write the bundle model/ with the averaged network."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON-compatible facts that must not change before the run is resumed."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """State of the task itself, on the CPU, saved as task.safetensors; often empty."""
        ...

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned; called only if that is not empty."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; raise ValueError if it is of another run."""
        ...


class Trainer:
    """Weights, optimizers, averages and counters of a run, and its optimizer step."""

    def __init__(self, task: Task, run: Run) -> None:
        self.task = task
        self.run = run
        self.config = config = run.optimization
        self.ranks = ranks()
        self.ranks_before = self.ranks.world
        self.rows = self.ranks.rows(config.batch_size, config.accumulate)
        check_precision(config.precision, task.device)
        self.names: dict[str, list[str]] = {}
        self.parameters: dict[str, list[nn.Parameter]] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, network in task.networks.items():
            named = dict(network.named_parameters())
            self.names[name] = list(named)
            self.parameters[name] = list(named.values())
            self.optimizers[name] = torch.optim.AdamW(
                named.values(),
                lr=config.learning_rate,
                betas=(config.beta1, config.beta2),
                weight_decay=config.weight_decay,
                fused=task.device.type in ("cpu", "cuda"),
            )
        self.ema = EMA(
            task.networks[task.averaged], decay=config.ema_decay, warmup=config.ema_warmup
        )
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=config.precision == "fp16")
        self.done = 0
        self._skipped = 0
        self._pending: list[dict[str, Tensor]] = []
        self._sums: dict[str, list[float]] = {}

    def step(self) -> None:
        """One optimizer step of every network that has a loss."""
        config, step = self.config, self.done
        alone = self.rows is None
        batch = self.task.batch(step) if alone else self.task.batch(step, self.rows)
        world = self.ranks.world
        size = config.batch_size // (config.accumulate * world)
        scalars: dict[str, Tensor] = {}
        active: list[str] = []
        for index in range(config.accumulate):
            part = {name: value[index * size : (index + 1) * size] for name, value in batch.items()}
            place = index * world + self.ranks.rank
            torch.manual_seed(derive_seed(self.run.seed, "dropout", step, place))
            with autocast(config.precision, self.task.device):
                losses, logged = self.task.losses(part, step)
            for name, loss in losses.items():
                # inputs=: the autoencoder's loss must not train the discriminator it passes through
                scaled = self.scaler.scale(loss / (config.accumulate * world))
                torch.autograd.backward(scaled, inputs=self.parameters[name])
            active = list(losses)
            shown = {_loss_name(name, self.task): loss for name, loss in losses.items()}
            for name, value in {**shown, **logged}.items():
                scalars[name] = scalars.get(name, 0) + value.detach().float() / config.accumulate
        for name in active:
            self.ranks.sum_gradients(self.parameters[name])
            scalars[f"grad_norm/{name}"] = self._update(name, learning_rate(step, config))
        self.scaler.update()
        self.ema.update()
        self.done += 1
        self._pending.append(scalars)

    def _update(self, name: str, rate: float) -> Tensor:
        """Clip and apply one network's gradient; returns its norm before clipping."""
        optimizer, parameters = self.optimizers[name], self.parameters[name]
        for group in optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(optimizer)
        limit = self.config.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def settle(self) -> None:
        """Average the scalars of the steps since the last call over the ranks, and check them.

        All ranks must call this after the same steps.

        Raises:
            ValueError: a loss is not finite; the message names the step. With fp16, where the loss
                scaler skips such steps, only after many consecutive ones.
        """
        if not self._pending:
            return
        first = self.done - len(self._pending)
        pending, self._pending = self._pending, []
        own = torch.cat([torch.stack(list(scalars.values())).float() for scalars in pending])
        means = iter(self.ranks.mean(own).tolist())  # one reduction, one transfer
        for step, scalars in enumerate(pending, start=first):
            named = {name: next(means) for name in scalars}
            finite = all(_finite(value) for value in named.values())
            self._skipped = 0 if finite else self._skipped + 1
            if not finite and (not self.scaler.is_enabled() or self._skipped >= MAX_SKIPPED):
                bad = {name: value for name, value in named.items() if not _finite(value)}
                raise ValueError(f"step {step + 1}: not finite: {bad}; {_LOWER_THE_RATE}")
            for name, value in named.items():
                if finite:
                    entry = self._sums.setdefault(name, [0.0, 0.0])
                    entry[0] += value
                    entry[1] += 1

    def take_means(self) -> dict[str, float]:
        """Mean of every scalar since the last call."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def save(self, root: Path) -> None:
        """Write a checkpoint below `root` and delete the oldest.

        Raises:
            ValueError: a weight is not finite; the good checkpoints are kept.
        """
        networks = {
            f"{name}/{key}": value
            for name, network in self.task.networks.items()
            for key, value in network.state_dict().items()
        }
        bad = [key for key, value in networks.items() if not value.isfinite().all()]
        if bad:
            raise ValueError(
                f"step {self.done}: {len(bad)} weights are not finite ({bad[0]}); {_LOWER_THE_RATE}"
            )
        optimizers: dict[str, Tensor] = {}
        for name, optimizer in self.optimizers.items():
            optimizers |= checkpoints.optimizer_tensors(optimizer, self.names[name], name)
        tensors = {
            "networks": networks,
            "ema": self.ema.network.state_dict(),
            "optimizers": optimizers,
        }
        if own := self.task.tensors():
            tensors["task"] = own
        state = {
            "ema_updates": self.ema.updates,
            "skipped": self._skipped,
            "scaler": self.scaler.state_dict(),
            "sums": self._sums,
            "task": self.task.state(),
            "torch": torch.__version__,
        }
        if self.ranks.world > 1:
            state["ranks"] = self.ranks.world
        checkpoints.save_checkpoint(root, self.done, tensors, state)
        checkpoints.delete_old(root, self.done, self.run.output.keep)

    @one_line_errors()
    def load(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: the checkpoint is damaged or belongs to another run.
        """
        stems = ("networks", "ema", "optimizers", *(["task"] if self.task.tensors() else []))
        tensors, state = checkpoints.load_checkpoint(folder, stems)
        try:
            self._take_over(tensors, state)
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"checkpoint {folder} does not fit this run: {' '.join(str(error).split()):.200}; "
                f"write an older one's name into {folder.parent / checkpoints.LATEST}"
            ) from error

    def _take_over(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        self.task.load_state(state["task"])
        if "task" in tensors:
            self.task.load_tensors(tensors["task"])
        for name, network in self.task.networks.items():
            prefix = f"{name}/"
            network.load_state_dict(
                {
                    key.removeprefix(prefix): value
                    for key, value in tensors["networks"].items()
                    if key.startswith(prefix)
                }
            )
            checkpoints.load_optimizer(
                self.optimizers[name], self.names[name], name, tensors["optimizers"]
            )
        self.ema.network.load_state_dict(tensors["ema"])
        self.ema.updates = state["ema_updates"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self._skipped = state["skipped"]
        self._sums = {name: list(entry) for name, entry in state["sums"].items()}
        self.done = state["step"]
        self.ranks_before = state.get("ranks", 1)


def train(task: Task, run: Run, *, resume: bool) -> Path:
    """Open and lock the run's folder, then :func:`fit`.

    Raises:
        ValueError: another process is training there, or the folder contains another run.
        FileNotFoundError: there is nothing to resume.
    """
    folder = Path(run.output.folder)
    if resume and not (folder / CONFIG).exists():
        raise FileNotFoundError(f"nothing to resume in {folder}: it has no {CONFIG}")
    if not ranks().first:
        ranks().wait()  # until the first one has opened the folder
        return fit(task, run, resume=resume)
    with locked_folder(folder, what="is training"):
        changes = open_run(run, resume=resume)
        for place in (folder, folder / "checkpoints", folder / "samples"):
            remove_leftovers(place)
        ranks().wait()
        return fit(task, run, resume=resume, notice=changes)


def fit(task: Task, run: Run, *, resume: bool, notice: str = "") -> Path:
    """Train to the last step of `run`, from its newest checkpoint if `resume`.

    notice: a line to print when training starts.

    Returns:
        The run's folder; its model/ is the bundle of the averaged weights.

    Raises:
        ValueError: a loss is not finite, or the checkpoint does not fit.
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C, both after saving.
        OSError: for example a full disk; earlier checkpoints are left untouched.
    """
    folder = Path(run.output.folder)
    root = folder / "checkpoints"
    trainer = Trainer(task, run)
    checkpoint = checkpoints.latest_checkpoint(root) if resume else None
    if checkpoint is not None:
        trainer.load(checkpoint)
    trainer.ranks.wait()  # no rank may look for the newest checkpoint once a newer one is written
    monitor: Monitor | Silent = Silent(folder)
    if trainer.ranks.first:
        monitor = Monitor(
            folder,
            first_step=trainer.done,
            steps=run.optimization.steps,
            tensorboard=run.output.tensorboard,
        )
    stopped = False
    with monitor, Interrupts() as interrupts:
        if checkpoint is not None:
            monitor.say(f"resumed {folder} at step {trainer.done}")
        if trainer.ranks_before != trainer.ranks.world:
            monitor.say(
                f"the checkpoint is of {trainer.ranks_before} ranks, this run has "
                f"{trainer.ranks.world}: sums are taken in another order from here on"
            )
        if notice:
            monitor.say(notice)
        if trainer.rows is not None:
            monitor.say(f"{trainer.ranks.world} ranks, {len(trainer.rows)} images each")
        while trainer.done < run.optimization.steps and not stopped:
            _one_step(trainer, monitor, folder)
            stopped = trainer.ranks.any(interrupts.received is not None)
        trainer.settle()
        save(trainer, monitor, folder)
        stopped = trainer.ranks.any(stopped or interrupts.received is not None)
        if stopped:
            monitor.say(f"stopped at step {trainer.done}; resume to continue")
            raise SystemExit(interrupts.exit_code)
        monitor.say(f"finished: {folder / 'model'}")
    return folder


def _one_step(trainer: Trainer, monitor: Monitor | Silent, folder: Path) -> None:
    """Take one step, then log, preview and save if due."""
    output, config = trainer.run.output, trainer.config
    rate = learning_rate(trainer.done, config)
    trainer.step()
    done = trainer.done
    monitor.tick(done)
    due = {
        "log": done % output.log_every == 0 or done == config.steps,
        "save": bool(output.save_every) and done % output.save_every == 0 and done < config.steps,
    }
    # Reading a loss synchronizes with the device: on a GPU, only do so when the value is used.
    if trainer.task.device.type == "cpu" or any(due.values()):
        trainer.settle()
    if due["log"]:
        monitor.record(done, {**trainer.take_means(), "learning_rate": rate})
    if output.preview_every and (done % output.preview_every == 0 or done == config.steps):
        preview(trainer, monitor, folder)
    if due["save"]:
        save(trainer, monitor, folder)


def preview(trainer: Trainer, monitor: Monitor | Silent, folder: Path) -> None:
    """Write samples/step_N.png, made with the averaged weights."""
    if isinstance(monitor, Silent):
        return
    sheet = trainer.task.preview(trainer.ema.network, trainer.done)
    save_png(folder / "samples" / f"step_{trainer.done:08d}.png", sheet)
    monitor.sheet(trainer.done, sheet, "samples")
    monitor.pause()


def save(trainer: Trainer, monitor: Monitor | Silent, folder: Path) -> None:
    """Write a checkpoint and the bundle model/; of several ranks, the first one does."""
    root = folder / "checkpoints"
    if not trainer.ranks.first:
        trainer.ranks.wait()
        return
    if checkpoints.latest_checkpoint(root) != checkpoints.step_folder(root, trainer.done):
        trainer.save(root)
    else:  # a run that was killed here may not have got to it
        checkpoints.delete_old(root, trainer.done, trainer.run.output.keep)
    trainer.task.export(trainer.ema.network, trainer.done)
    monitor.pause()
    trainer.ranks.wait()


def open_run(run: Run, *, resume: bool) -> str:
    """Write config.json to the run's folder, or check that it matches this run.

    A run can be resumed with another number of steps and other output settings; config.json is then
    updated. Anything else must not change, or the result would match neither config.

    Returns:
        What changed, in one line; empty if nothing did.

    Raises:
        ValueError: the folder contains a run and `resume` is not set, or that run's config differs
            (all differing fields are named; the folder itself may have moved).
    """
    folder = Path(run.output.folder)
    path = folder / CONFIG
    config = json.loads(json.dumps(run.to_json()))
    newest = checkpoints.latest_checkpoint(folder / "checkpoints")
    if not resume:
        if newest is not None:
            raise ValueError(f"{folder} already holds a run; resume it or choose another folder")
        write_json(path, config)
        return ""
    try:
        saved = type(run).from_json(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not the config of this kind of run: {error}") from error
    started = json.loads(json.dumps(saved.to_json()))
    changes = differences(started, config)
    changes.pop("output.folder", None)  # the folder may be moved
    fixed = [name for name in changes if name != STEPS and not name.startswith("output.")]
    if fixed:
        listed = "; ".join(f"{n}: {changes[n][0]!r} there, {changes[n][1]!r} now" for n in fixed)
        raise ValueError(
            f"{folder} was started with another config ({listed}); resume with the same config or "
            "choose another folder"
        )
    done = checkpoints.step_of(newest) if newest is not None else 0
    if run.optimization.steps < done:
        raise ValueError(
            f"{folder} has already been trained for {done} steps, more than the "
            f"{run.optimization.steps} asked for; set optimization steps to {done} or more"
        )
    if started != config:
        write_json(path, config)
    notice = "; ".join(
        f"{name}: {old!r} before, {new!r} now" for name, (old, new) in changes.items()
    )
    before, now = (learning_rate(done, r.optimization) for r in (saved, run))
    if before != now:
        notice += f"; the learning rate of the next step changes from {before:.3g} to {now:.3g}"
    return notice


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted field name -> (old, new) wherever two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(old.keys() | new.keys()):
            name = f"{prefix}.{key}" if prefix else key
            found |= differences(old.get(key, "(absent)"), new.get(key, "(absent)"), name)
        return found
    return {} if old == new else {prefix: (old, new)}


def _loss_name(network: str, task: Task) -> str:
    """Name in the log: "loss" for the averaged network, "loss/NAME" for any other."""
    return "loss" if network == task.averaged else f"loss/{network}"


def _finite(value: float) -> bool:
    return value - value == 0
