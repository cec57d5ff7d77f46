"""The condition of a sample, and checks of class labels and guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.models.network import NetworkConfig


@dataclass(frozen=True, eq=False, kw_only=True)
class Condition:
    """What a sample is conditioned on; samples with the same object share its precomputation."""

    label: int | None = None
    """Row of the label embedding; see :func:`check_label`."""
    toward: tuple[int, float] | None = None
    """Another row, and its share: an embedding between the two classes."""
    context: Tensor | None = None
    """(1, T, D): the tokens for cross-attention."""
    mask: Tensor | None = None
    """(1, T) bool: False for tokens that are padding; None: all are there."""
    added: Tensor | None = None
    """(1, A): the vector added to the time embedding."""

    @property
    def tokens(self) -> int:
        """T; all samples of one evaluation must have the same."""
        return 0 if self.context is None else self.context.shape[1]

    @property
    def key(self) -> tuple[int | None, tuple[int, float] | None, int]:
        """Identifies the embedding."""
        return self.label, self.toward, id(self.added)

    def mixed(self, other: Condition, share: float) -> Condition:
        """Interpolate linearly between this condition and another one of the same kind.

        share: 0 gives this condition, 1 the other. Context tokens, added vectors and rows of the
        label embedding are interpolated, each before the network sees them.
        """
        if (self.label is None) != (other.label is None) or self.tokens != other.tokens:
            raise ValueError(
                f"only conditions of the same kind can be mixed, got {self.tokens} and "
                f"{other.tokens} tokens, labels {self.label} and {other.label}"
            )
        pairs = (self.context, other.context), (self.added, other.added)
        context, added = (
            None if a is None or b is None else torch.lerp(a, b, share) for a, b in pairs
        )
        toward = None if other.label is None else (other.label, share)
        mask = self.mask
        if mask is not None and other.mask is not None:
            mask = mask | other.mask
        return Condition(label=self.label, toward=toward, context=context, mask=mask, added=added)

    def labels(self, count: int, rows: int, device: torch.device) -> Tensor | None:
        """The labels that `Network.embed` expects, for `count` samples.

        rows: number of rows of the label embedding.
        """
        if self.label is None:
            return None
        if self.toward is None:
            return torch.full((count,), self.label, dtype=torch.int64, device=device)
        other, share = self.toward
        weights = torch.zeros(rows, dtype=torch.float64, device=device)
        weights[self.label] += 1 - share
        weights[other] += share
        return weights.expand(count, -1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Control:
    """What one of the network's ControlNets adds to a sample."""

    hint: Tensor
    """(C', *spatial), its embedding of the sample's picture, of the size of x."""
    scale: float = 1.0
    """Factor of what it adds."""
    start: float = 0.0
    """Fraction of the table's rows before which it adds nothing."""
    end: float = 1.0
    """Fraction of the table's rows after which it adds nothing."""

    def covers(self, row: int, rows: int) -> bool:
        """Whether it is used in this row of a table: as in diffusers, if the row, as an interval of
        1 / rows, lies within [start, end]."""
        return row / rows >= self.start and (row + 1) / rows <= self.end


def class_conditions(
    config: NetworkConfig, labels: Sequence[int | None], *, guided: bool
) -> tuple[list[Condition], list[Condition] | None]:
    """Conditions for classes and, if guided, the unconditional ones; one object per class.

    labels: one per sample: a class, or None for no class.

    Raises:
        ValueError: a label is out of range, or the model lacks the null class that a label of None
            or guidance needs.
    """
    rows = [check_label(label, config.num_classes, config.null_class) for label in labels]
    null = check_guidance(config.num_classes, config.null_class) if guided else None
    kinds = {row: Condition(label=row) for row in [*rows, null]}
    return [kinds[row] for row in rows], [kinds[null]] * len(rows) if guided else None


def check_label(label: int | None, num_classes: int | None, null_class: bool) -> int | None:
    """The row of the label embedding for a class or for None; None if the model has no classes.

    Raises:
        ValueError: the label is out of range, or the model has no such class.
    """
    if label is None:
        if num_classes is None:
            return None
        if not null_class:
            raise ValueError(
                f"this model has no null class, got None; pass a class from 0 to {num_classes - 1}"
            )
        return num_classes
    if num_classes is None:
        raise ValueError(f"this model has no classes, got class {label}; pass None")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_classes:
        raise ValueError(f"class must be from 0 to {num_classes - 1}, got {label!r}")
    return label


def check_guidance(num_classes: int | None, null_class: bool) -> int:
    """The row of the label embedding for "no class", which guidance needs.

    Raises:
        ValueError: the model cannot be guided.
    """
    if num_classes is None or not null_class:
        lacks = "has no classes" if num_classes is None else "was trained without a null class"
        raise ValueError(f"this model {lacks}, so it cannot be guided; set guidance_scale=1")
    return num_classes
