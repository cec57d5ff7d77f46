"""Guidance by gradients: functions predict -> predict that pull samples along a gradient.

Dhariwal & Nichol 2021 (arXiv 2105.05233), section 4; Bansal et al. 2023 (arXiv 2302.07121), eq. 6.
With g the gradient with respect to x of scale * log p(y | x), or of minus a loss:

    score form, every sampler but "ddpm"       eps_hat' = eps_hat - sigma g               (eq. 14)
    mean shift, "ddpm"                         mean' = mean + variance g         (algorithm 1)

Both are a shift of the x0 estimate, D' = D + m g. The score form has m = sigma² / alpha, with the
alpha and sigma of x = alpha x0 + sigma n; at a level without signal, where log p(y | x) does not
depend on x, nothing is shifted. The mean
is A x + B D in a row of a table, so there m = variance / B, whether the variance is fixed or
learned. For the fixed variances of "ddpm" the mean shift is the score form times

    variance alpha / (B sigma²) = alpha / alpha'                            "fixed_large"
                                  alpha sigma'² / (alpha' sigma²)           "fixed_small"

so `sampler_step` needs no column for it: the prediction is replaced by the F' that gives D'. As in
the authors' code, D is clamped before it is shifted, and the gradient is taken at x.

A prediction that is guided in this way is complete: weight, rescale and clamp of the row have been
applied, so the row that takes it has none of them (`SamplerTable.unguided`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastdiff.diffusion.samplers import COLUMN, SAMPLERS, SamplerTable

NO_LABEL = -1
T, SIGMA, SHIFTS_MEAN, SCALE = range(len(COLUMN), len(COLUMN) + 4)
"""Columns of `rows_of` after those of the table."""


class Objective(Protocol):
    """What a sample is pulled to increase, such as a classifier's log p(y | x_t)."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Differentiable in x, without effects of one sample on another.

        x: (n, C, *spatial), noisy or an x0 estimate. t: (n,) timesteps. y: (n,) int64 labels.
        Returns (n,).
        """


@dataclass(frozen=True, kw_only=True)
class Pull:
    """One term of g: scale times the gradient of an objective."""

    objective: Objective
    scale: float
    label: int = NO_LABEL
    """The y that the objective gets. Checked with `check_label(label)`, if the objective is a
    method of an object that has it, such as `Classifier`."""
    on: Literal["x", "x0"] = "x"
    """What the objective sees: the noisy x, or the estimate of x0. Then g also needs the gradient
    of the network, which takes about three times as long as an evaluation."""
    max_sigma: float = math.inf
    """The pull is left out where sigma / alpha is larger. An exact g is proportional to alpha /
    sigma² there, which m makes up for; that of a trained network is not, so its errors grow by m,
    which is 20,000 at the first level of a cosine schedule."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"the scale of a pull must be finite, got {self.scale}")
        if not self.max_sigma > 0:
            raise ValueError(f"max_sigma must be positive, got {self.max_sigma}")
        if self.on not in ("x", "x0"):
            raise ValueError(f"on must be x or x0, got {self.on!r:.40}")
        # On the host, since on a GPU a label out of range would end the process's CUDA context.
        owner = getattr(self.objective, "__self__", None)
        if (check_label := getattr(owner, "check_label", None)) is not None:
            check_label(self.label)

    def __str__(self) -> str:
        """The name of its function, and its scale."""
        function = getattr(self.objective, "loss", self.objective)
        name = getattr(function, "__name__", type(function).__name__)
        return f"{name} on {self.on}, scale {self.scale:g}"


@dataclass(frozen=True)
class _Minus:
    """An objective that is minus a loss; equal for equal losses."""

    loss: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return -self.loss(x)


def loss_pull(
    loss: Callable[[Tensor], Tensor], scale: float = 1.0, *, on: Literal["x", "x0"] = "x0"
) -> Pull:
    """A pull that lowers a loss (universal guidance, Bansal et al. 2023, eq. 6).

    loss: (n, C, *spatial) -> (n,), differentiable, without effects of one sample on another. It
    sees x0 estimates, or with on="x" the noisy x.
    """
    return Pull(objective=_Minus(loss), scale=scale, on=on)


@dataclass(frozen=True, eq=False)
class Similarity:
    """The dot product of the embeddings of noised samples and of one caption.

    GLIDE's objective (Nichol et al. 2022, arXiv 2112.10741, section 2.3); samples that are pulled
    towards the same caption should share the object, whose gradient is then taken at once.
    """

    embed: Callable[[Tensor, Tensor], Tensor]
    """embed(x, t): (n, C, *spatial) and (n,) timesteps to (n, D), differentiable in x."""
    caption: Tensor
    """(D,), times the inverse temperature that the embeddings were trained with."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """An `Objective`: (n,); y is not used."""
        embedded = self.embed(x, t)
        return (embedded * self.caption.to(embedded)).sum(1)


@dataclass(frozen=True, eq=False)
class At:
    """Where in their tables the N samples of an evaluation are.

    rows: (N, columns), rows of `rows_of`, in the dtype of x.
    """

    rows: Tensor

    @property
    def t(self) -> Tensor:
        """(N,) timesteps."""
        return self.rows[:, T]

    def column(self, name: str, x: Tensor) -> Tensor:
        """A column of the table that broadcasts with x: (N, C, *spatial)."""
        return self._like(COLUMN[name], x)

    def _like(self, column: int, x: Tensor) -> Tensor:
        return self.rows[:, column].reshape(-1, *(1,) * (x.ndim - 1))

    def shift(self, x: Tensor, v: Tensor) -> Tensor:
        """m, the factor of g in D' = D + m g: broadcasts with x.

        With r = sigma / alpha and x scaled by c = 1 / (alpha + sigma) under flow matching, else by
        1, the score form has m = c r² / sqrt(1 + r²). The mean shift has m = c / c' variance / B,
        where c' belongs to the next level: g is taken at x, the mean is of the next x.

        x: (N, C, *spatial). v: (N, C or 0, *spatial), the learned variance.
        """
        sigma, shifts_mean, scale = (
            self._like(column, x) for column in (SIGMA, SHIFTS_MEAN, SCALE)
        )
        score = scale * sigma**2 / torch.sqrt(1 + sigma**2)
        score = torch.where(sigma.isfinite(), score, 0.0)
        s, b = self.column("S", x), self.column("B", x)
        variance = s**2
        if v.shape[1]:
            fraction = (v + 1) / 2
            low, high = self.column("LOGVAR_MIN", x), self.column("LOGVAR_MAX", x)
            variance = torch.exp(fraction * high + (1 - fraction) * low)
        mean = torch.where(s != 0, scale * variance / torch.where(s != 0, b, 1.0), 0.0)
        return torch.where(shifts_mean != 0, mean, score)


def rows_of(table: SamplerTable) -> Tensor:
    """A table's columns and what guidance by gradients needs besides them, fp64 on the CPU.

    Returns (rows, len(COLUMN) + 4); the last columns are the timestep, sigma / alpha, whether the
    mean is shifted (1) or the score (0), and the scale of x (`SamplerTable.scales`), where the mean
    is shifted as a multiple of that of the next level.
    """
    ancestral = SAMPLERS[table.name].ancestral
    shifts_mean = torch.full_like(table.sigmas, float(ancestral))
    scales = table.scales.expand(len(table) + 1)
    scales = scales[:-1] / scales[1:] if ancestral else scales[:-1]
    more = torch.stack([table.timesteps, table.sigmas, shifts_mean, scales], dim=1)
    return torch.cat([table.columns, more], dim=1)


PredictAt = Callable[[Tensor, At], Tensor]
"""predict(x, at): x (N, C, *spatial) -> (N, C or 2C, *spatial)."""
Guidance = Callable[[PredictAt], PredictAt]


def classifier_free(predict: PredictAt) -> PredictAt:
    """Classifier-free guidance as a function, for guidance that follows it.

    predict: returns [unconditional; conditional], (2N, ...), for x (N, ...). The result combines
    them with the W and RESCALE of the rows, as `sampler_step` does.
    """

    def combined(x: Tensor, at: At) -> Tensor:
        both = predict(x, at)
        if len(both) != 2 * len(x):
            raise ValueError(
                f"a guided row needs {2 * len(x)} outputs, [unconditional; conditional], got "
                f"{len(both)}; build the table with guidance_scale=1 to leave guidance out"
            )
        base, own = both.to(x.dtype).chunk(2)
        return combine(own, base, at, x)

    return combined


def combine(own: Tensor, base: Tensor, at: At, x: Tensor) -> Tensor:
    """Classifier-free guidance: own + (W - 1)(own - base), rescaled; rows with W = 1 keep `own`.

    own, base: (N, C or 2C, *spatial), in the dtype of x. A learned variance is that of `own`.
    """
    c, w, phi = x.shape[1], at.column("W", x), at.column("RESCALE", x)
    own, v, base = own[:, :c], own[:, c:], base[:, :c]
    f = base + w * (own - base)
    dims = tuple(range(1, x.ndim))
    wanted, have = (y.std(dim=dims, keepdim=True, correction=0) for y in (own, f))
    rescaled = phi * f * torch.where(have > 0, wanted / have, 1.0) + (1 - phi) * f
    f = torch.where(phi != 0, rescaled, f)
    return torch.cat([torch.where(w != 1, f, own), v], dim=1)


def classifier_guidance(
    log_prob: Objective, labels: Sequence[int] | Tensor, scale: float | Sequence[float]
) -> Guidance:
    """Classifier guidance of N samples towards their labels.

    log_prob: log p(y | x_t), such as `Classifier.log_prob`. labels: (N,). scale: one for all
    samples, or one each.
    """
    labels = [int(label) for label in labels]
    scales = [scale] * len(labels) if isinstance(scale, int | float) else list(scale)
    pulls = [
        [Pull(objective=log_prob, scale=own, label=label)]
        for label, own in zip(labels, scales, strict=True)
    ]
    return by_gradients(pulls)


def clip_guidance(
    embed: Callable[[Tensor, Tensor], Tensor], captions: Tensor, scale: float | Sequence[float]
) -> Guidance:
    """CLIP guidance of N samples (Nichol et al. 2022, section 2.3): with "ddpm",

        mean' = mean + scale * variance * gradient of f(x_t, t) . g(c)

    embed: f of a CLIP that was trained on noised pictures, see `Similarity`. captions: (N, D), g of
    the captions, times the inverse temperature (as in the authors' code). scale: one for all
    samples, or one each.
    """
    scales = [scale] * len(captions) if isinstance(scale, int | float) else list(scale)
    pulls = [
        [Pull(objective=Similarity(embed, caption), scale=own)]
        for caption, own in zip(captions, scales, strict=True)
    ]
    return by_gradients(pulls)


def loss_guidance(
    loss: Callable[[Tensor], Tensor], scale: float = 1.0, *, on: Literal["x", "x0"] = "x0"
) -> Guidance:
    """Guidance of all samples by a loss; see `loss_pull`."""
    pull = loss_pull(loss, scale, on=on)

    def guidance(predict: PredictAt) -> PredictAt:
        return lambda x, at: by_gradients([[pull]] * len(x))(predict)(x, at)

    return guidance


def guided(
    predict: Callable[[Tensor, int], Tensor], table: SamplerTable, guidances: Sequence[Guidance]
) -> Callable[[Tensor, int], Tensor]:
    """A `sampling.Predict` with guidance by gradients, for `table.unguided`.

    predict: a `sampling.Predict` along `table`, differentiable if a pull is on x0. guidances: from
    the innermost to the outermost; each sees the prediction of the one before it.

    """
    rows = rows_of(table)

    def whole(x: Tensor, row: int) -> Tensor:
        at = At(rows[row].to(x).expand(len(x), -1))
        inner: PredictAt = lambda x, _: predict(x, row)  # noqa: E731
        if table.guided[row]:
            inner = classifier_free(inner)
        for guidance in guidances:
            inner = guidance(inner)
        return inner(x, at)

    return whole


def by_gradients(pulls: Sequence[Sequence[Pull]], *, block: int | None = None) -> Guidance:
    """Guidance by the sum of each sample's pulls.

    All pulls of a sample on x0 see the same estimate, that of the prediction without them. Samples
    without pulls keep their prediction, except that it is clamped.

    Args:
        pulls: (N,), those of each sample.
        block: rows in a call of an objective, the last filled up with copies, so that a sample's
            bits do not depend on its neighbours; None: all samples of an objective at once.

    The prediction may have an outer gradient: then the shift counts as constant.
    """

    def guidance(predict: PredictAt) -> PredictAt:
        def pulled(x: Tensor, at: At) -> Tensor:
            with torch.inference_mode(False), torch.enable_grad():
                return _pulled(predict, x, at, pulls, block)

        return pulled

    return guidance


def _pulled(
    predict: PredictAt, x: Tensor, at: At, pulls: Sequence[Sequence[Pull]], block: int | None
) -> Tensor:
    outer = x.requires_grad
    leaf = x if outer else x.clone().detach().requires_grad_()
    at = At(at.rows.clone())  # autograd cannot save inference tensors
    deep = any(pull.on == "x0" for own in pulls for pull in own)
    with torch.set_grad_enabled(deep or outer):
        prediction = predict(leaf, at).to(x.dtype)
        if deep and not prediction.requires_grad:
            raise ValueError(
                "guidance on x0 needs the gradient of the network, got a prediction without one; "
                "call the network without torch.no_grad or detach"
            )
        f, v = prediction[:, : x.shape[1]], prediction[:, x.shape[1] :]
        estimate = at.column("U", x) * leaf + at.column("V", x) * f
        bound = at.column("CLAMP", x)
        clamped = estimate.clamp(-bound, bound)
    gradient = _gradient("x", leaf, at, pulls, block)
    if deep:
        cotangent = _gradient("x0", clamped, at, pulls, block)
        gradient = gradient + torch.autograd.grad(clamped, leaf, cotangent, retain_graph=outer)[0]
    shift = (clamped - estimate).detach() + at.shift(x, v.detach()) * gradient
    f = f + shift / at.column("V", x)
    return torch.cat([f, v], dim=1) if outer else torch.cat([f, v], dim=1).detach()


def _gradient(
    on: str, seen: Tensor, at: At, pulls: Sequence[Sequence[Pull]], block: int | None
) -> Tensor:
    """The sum of scale * gradient over each sample's pulls on x or x0: like `seen`."""
    groups: dict[Objective, list[tuple[int, Pull]]] = {}
    for sample, own in enumerate(pulls):
        for pull in own:
            if pull.on == on:
                groups.setdefault(pull.objective, []).append((sample, pull))
    total = torch.zeros(seen.shape, dtype=seen.dtype, device=seen.device)
    for objective, members in groups.items():
        size = block or len(members)
        for start in range(0, len(members), size):
            part = members[start : start + size]
            filled = part + part[-1:] * (size - len(part))
            samples = torch.tensor([sample for sample, _ in filled], device=seen.device)
            labels = torch.tensor([pull.label for _, pull in filled], device=seen.device)
            found = gradient_of(objective, seen.detach()[samples], at.t[samples], labels)
            samples, found = samples[: len(part)], found[: len(part)]
            numbers = torch.tensor(
                [(pull.scale, pull.max_sigma) for _, pull in part], dtype=torch.float64
            ).to(seen)
            scale, most, sigma = (
                column.reshape(-1, *(1,) * (seen.ndim - 1))
                for column in (*numbers.T, at.rows[samples, SIGMA])
            )
            total.index_add_(0, samples, torch.where(sigma <= most, scale * found, 0.0))
    return total


def gradient_of(objective: Objective, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The gradient of each sample's objective with respect to the sample: like x.

    Raises:
        ValueError: the objective does not return one number per sample, or has no gradient.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Strides affect the order of sums, so they must not depend on those of the caller's x.
        x = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        values = objective(x, t, y)
        if not isinstance(values, Tensor) or values.shape != (len(x),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"an objective or loss must return one number per sample, ({len(x)},), got {got}; "
                "take the sum or mean over all but the first dimension"
            )
        found = None
        if values.requires_grad:
            (found,) = torch.autograd.grad(values.sum(), x, allow_unused=True)
        if found is None:
            raise ValueError(
                "an objective or loss must be differentiable in the sample, got values without a "
                "gradient; compute them with torch operations, without torch.no_grad or detach"
            )
    return found
