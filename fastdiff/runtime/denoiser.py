"""Evaluate a network under the conditions of many samples, in blocks of a fixed number of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.diffusion.stack import Stack
from fastdiff.kernels import gather_rows
from fastdiff.models.network import Context, Network, map_context
from fastdiff.runtime.blocks import filled, gather, row_blocks
from fastdiff.runtime.conditions import Condition

WIDE = (torch.float32, torch.float64)
"""Dtypes of the samples of an engine."""


@dataclass(frozen=True, eq=False)
class Guide:
    """The conditions of one sample, prepared for the timesteps of a table.

    Attributes:
        timesteps: the timesteps of the embeddings, as bytes.
        condition, unconditional: the conditions; `unconditional` is None if no row is guided.
        first, first_unconditional: indices into `Denoiser.embeddings` at which the embeddings of
            the two begin; the one for row i of the table is at index first + i.
    """

    timesteps: bytes
    condition: Condition
    unconditional: Condition | None
    first: int
    first_unconditional: int


class _Row(NamedTuple):
    """A row of an evaluation."""

    sample: int
    embedding: int
    condition: Condition
    deep: int  # index into the deep features; -1: the row that nobody reads


class Turn(NamedTuple):
    """One sample's part in an evaluation: its index in x, its guide, and the row of its table."""

    sample: int
    guide: Guide
    row: int
    guided: bool
    branch: int | None = None
    """Branch of its deep features; None if it neither keeps nor reuses any."""
    shallow: bool = False
    """Whether the evaluation reuses them; otherwise it keeps them."""
    controls: tuple[int, ...] = ()
    """The ControlNets that are used."""


class Controls(NamedTuple):
    """What the ControlNets of all samples read."""

    hints: Mapping[int, Tensor]
    """ControlNet -> (S, C', *spatial), the embedded pictures; only those that a sample uses."""
    scales: Tensor
    """(S, ControlNets), the strengths."""


class _Group(NamedTuple):
    """Turns that can share blocks."""

    size: int
    """Rows per block; 0: one block of any size."""
    branch: int | None
    """Branch whose deep features are reused; None: the whole network."""
    controls: tuple[int, ...]


class Part(NamedTuple):
    """The part of a network that a block runs."""

    shallow: int | None
    """Branch whose deep features are reused; None: the whole network."""
    keeps: tuple[int, ...]
    """Branches whose deep features are kept."""
    pairs: bool = False
    """Whether it runs what the two rows of a guided sample share only once."""
    controls: tuple[int, ...] = ()
    """The ControlNets that are used."""


@dataclass(eq=False)
class _Block:
    samples: Tensor  # (inputs,) int64, indices into x; inputs: rows, or half of them in pairs
    embeddings: Tensor  # (inputs,) int64, a view of Batch.embeddings
    deep: Tensor  # (inputs,) int64, indices into the deep features
    context: Context | None
    part: Part


@dataclass(eq=False)
class Batch:
    """The rows of an evaluation, packed into blocks; valid until a sample joins, leaves, or becomes
    guided or unguided.

    Attributes:
        cond: (S,) int64, index of each sample's prediction in the output of `Denoiser`.
        uncond: (S,) int64, index of its unconditional prediction, or -1; None: no sample is guided.
        rows: rows of the network's output, including the padding of blocks.
    """

    cond: Tensor
    uncond: Tensor | None
    rows: int
    embeddings: Tensor  # (inputs of all blocks,) int64
    blocks: list[_Block] = field(repr=False)

    @property
    def form(self) -> tuple[tuple[int, Part], ...]:
        """The number of inputs and the part of each block."""
        return tuple((len(block.samples), block.part) for block in self.blocks)

    def advance(self) -> None:
        """Advance to the next row of every sample's table."""
        self.embeddings += 1

    def copied(self, embeddings: Tensor) -> Batch:
        """A copy with its own tensors, including those of the blocks.

        embeddings: of the size of `self.embeddings`, memory for the indices of the embeddings.
        """
        embeddings, uncond = embeddings.copy_(self.embeddings), self.uncond
        sizes = [len(block.samples) for block in self.blocks]
        pieces = zip(self.blocks, embeddings.split(sizes), strict=True)
        blocks = [
            _Block(
                block.samples.clone(),
                piece,
                block.deep.clone(),
                None if block.context is None else map_context(torch.clone, block.context),
                block.part,
            )
            for block, piece in pieces
        ]
        uncond = None if uncond is None else uncond.clone()
        return Batch(self.cond.clone(), uncond, self.rows, embeddings, blocks)

    def copy_from(self, other: Batch) -> None:
        """Copy the values of another batch of the same shape."""
        self.cond.copy_(other.cond)
        self.embeddings.copy_(other.embeddings)
        if self.uncond is not None and other.uncond is not None:
            self.uncond.copy_(other.uncond)
        for mine, block in zip(self.blocks, other.blocks, strict=True):
            mine.samples.copy_(block.samples)
            mine.deep.copy_(block.deep)
            if mine.context is not None and block.context is not None:
                map_context(Tensor.copy_, mine.context, block.context)


class Denoiser:
    """A network with conditions, for samples of one size.

    The embeddings of all timesteps of a table under a condition are computed once, in one call
    whose shape depends only on the table. So is a condition's context as projected for
    cross-attention. Evaluations look them up.

    Samples may keep and reuse deep features of the network (`fastdiff.diffusion.caching`), each at
    its own evaluations: rows that run the whole network and rows that run a part of it lie in
    separate blocks, and so do rows that use other ControlNets.

    On a CPU, a sample's bits depend on its own x, condition and table and on whether the row is
    guided or shallow, but not on the other samples; see `fastdiff.runtime.blocks`. Calls are
    differentiable in x if gradients are enabled.

    Attributes:
        deep: branch -> (2 S + 1, C, *spatial), the deep features of each sample's unconditional and
            conditional row, and a last row that nobody reads.
    """

    def __init__(
        self,
        network: Network,
        sides: Sequence[int],
        *,
        rounded: Callable[[int], int] | None = None,
        room: int = 0,
    ) -> None:
        """
        sides: (H, W) of x, or any other number of spatial sides.
        rounded: maps the number of rows to evaluate to the size of the single block they are padded
            to. None: use the blocks of `row_blocks`.
        room: initial capacity for embeddings, in rows.
        """
        weight = next(network.parameters())
        self.network, self.dtype, self.device = network, weight.dtype, weight.device
        self._sides, self.deep = tuple(sides), dict[int, Tensor]()
        pixels = sides if network.row_pixels is None else (network.row_pixels,)
        self.blocks = row_blocks(pixels, weight.device) if rounded is None else None
        self._round = rounded or (lambda rows: rows)
        self.embeddings = Stack(room=room)
        self._contexts: dict[Condition, Context] = {}
        self._users: dict[Condition, int] = {}
        self._gathered: dict[tuple[Condition, ...], Context] = {}

    @torch.no_grad()
    def add(
        self, timesteps: Tensor, condition: Condition, unconditional: Condition | None = None
    ) -> Guide:
        """Prepare a sample's conditions for `batch`; :meth:`drop` releases them.

        timesteps: (rows,), the t of each row of the sample's table.
        unconditional: for guidance; None if no row is guided.

        Raises:
            ValueError: the network does not support the condition.
        """
        key = timesteps.double().cpu().numpy().tobytes()
        first = self._add(key, timesteps, condition)
        if unconditional is None:
            return Guide(key, condition, None, first, first)
        try:
            other = self._add(key, timesteps, unconditional)
        except BaseException:
            self._drop(key, condition)
            raise
        return Guide(key, condition, unconditional, first, other)

    def drop(self, guide: Guide) -> None:
        """Release what `add` prepared, unless another sample uses it."""
        for condition in (guide.condition, guide.unconditional):
            if condition is not None:
                self._drop(guide.timesteps, condition)

    def keep(self, branch: int, samples: int) -> None:
        """Allocate the deep features of a branch. samples: S, the number of samples in x."""
        if branch not in self.deep:
            shape = 2 * samples + 1, *self.network.deep_shape(branch, self._sides)
            features = torch.zeros(shape, dtype=self.dtype, device=self.device)
            if features.ndim == 4:
                features = features.contiguous(memory_format=torch.channels_last)
            self.deep[branch] = features

    def move(self, sample: int, to: int) -> None:
        """Move a sample's deep features to another index."""
        for features in self.deep.values():
            features[2 * to : 2 * to + 2] = features[2 * sample : 2 * sample + 2]

    def batch(self, turns: Sequence[Turn], samples: int) -> Batch:
        """Pack the rows of an evaluation into blocks.

        turns: one per sample that takes part. samples: S, the number of samples in x.
        """
        groups: dict[_Group, list[Turn]] = {}
        for turn in turns:
            branch = turn.branch if turn.shallow else None
            groups.setdefault(_Group(self._size(turn), branch, turn.controls), []).append(turn)
        keeps = {turn.branch for turn in turns if turn.branch is not None and not turn.shallow}
        whole = Part(None, tuple(sorted(keeps)))
        cond, uncond, packed = [-1] * samples, [-1] * samples, list[tuple[list[_Row], Part]]()
        start = 0
        for (size, branch, controls), members in sorted(groups.items(), key=_whole_first):
            rows = list[_Row]()
            for turn in members:
                own = _rows_of(turn)
                uncond[turn.sample] = start + len(rows) if turn.guided else -1
                cond[turn.sample] = start + len(rows) + len(own) - 1
                rows += own
            blocks = filled(rows, size or self._rounded(len(rows), alone=len(groups) == 1))
            padding = sum(map(len, blocks)) - len(rows)
            if padding and branch is None:
                blocks[-1][-padding:] = [rows[-1]._replace(deep=-1)] * padding
            part = whole if branch is None else Part(branch, ())
            if controls:
                part = Part(None, (), controls=controls)
            packed += [(block, self._shared(block, part, len(groups))) for block in blocks]
            start += len(rows) + padding
        return self._batch(cond, uncond, packed, unread=2 * samples)

    def _shared(self, block: Sequence[_Row], part: Part, groups: int) -> Part:
        """The part with `pairs`, if all rows of a block are in pairs of one input and embedding.

        On a CPU only where a guided sample is a block of its own, so that it always shares. On a
        GPU only in the one block of a batch, whose vectors are aligned whatever their length.
        """
        if part.shallow is not None or part.keeps or part.controls:
            return part
        if not self.network.shares_prefix:
            return part
        if self.blocks is not None and (self.blocks.guided, self.blocks.single) != (2, 1):
            return part
        if (self.blocks is None and groups > 1) or len(block) % 2:
            return part
        pairs = zip(block[::2], block[1::2], strict=True)
        same = all(a.sample == b.sample and a.embedding == b.embedding for a, b in pairs)
        return part._replace(pairs=same)

    def _rounded(self, rows: int, *, alone: bool) -> int:
        """Rows in a block of any size. alone: there is no other block, which would have to begin
        at an even row for its vectors to be aligned (`_vectors`)."""
        size = self._round(rows)
        return size if alone else size + size % 2

    def _size(self, turn: Turn) -> int:
        """Rows per block for a sample's rows; 0: one block of any size."""
        if self.blocks is None:
            return 0
        return self.blocks.guided if turn.guided else self.blocks.single

    def __call__(
        self,
        x: Tensor,
        batch: Batch,
        extra: Tensor | None = None,
        controls: Controls | None = None,
    ) -> Tensor:
        """Evaluate the network for the samples of a batch.

        x: (S, C, *spatial). extra: (S, C', *spatial), input channels appended to x. controls: of
        the samples that use ControlNets.

        Returns (batch.rows, out_channels, *spatial) in the network's dtype.
        """
        extra = None if extra is None else extra.to(x)
        parts = [self._run(x, block, extra, controls) for block in batch.blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(
        self, x: Tensor, block: _Block, extra: Tensor | None, controls: Controls | None
    ) -> Tensor:
        """The outputs of a block; the deep features that it keeps are written to `deep`."""
        (branch, keeps, _, used), network = block.part, self.network
        x, emb = self._inputs(x, block, extra)
        if used:
            assert controls is not None, "turns that use ControlNets, without their pictures"
            assert block.context is not None, "only networks with context have ControlNets"
            hints = [gather(controls.hints[net], block.samples, self.dtype) for net in used]
            scales = controls.scales[block.samples]
            return network.body_controlled(x, emb, block.context, used, hints, scales)
        if branch is not None:
            deep = gather(self.deep[branch], block.deep)
            return network.shallow(x, emb, block.context, branch, deep)
        if block.part.pairs:
            assert block.context is not None, "only networks with context share a prefix"
            return network.body_of_pairs(x, emb, block.context)
        if not keeps:
            return network.body(x, emb, block.context)
        out, found = network.body_keeping(x, emb, block.context, keeps)
        for kept, features in zip(keeps, found, strict=True):
            self.deep[kept].index_copy_(0, block.deep, features)
        return out

    def _inputs(self, x: Tensor, block: _Block, extra: Tensor | None) -> tuple[Tensor, Tensor]:
        """The network's inputs for a block, and their embeddings."""
        table = self.embeddings.rows
        recorded = torch.is_grad_enabled() and x.requires_grad
        if recorded or x.dtype not in WIDE or table.dtype != self.dtype:
            whole = x if extra is None else torch.cat([x, extra], dim=1)
            return gather(whole, block.samples, self.dtype), table[block.embeddings]
        return gather_rows(x, block.samples, table, block.embeddings, extra=extra)

    def _add(self, key: bytes, timesteps: Tensor, condition: Condition) -> int:
        def embed() -> Tensor:
            t = timesteps.to(self.device, torch.float32)
            config = self.network.config
            rows = (config.num_classes or 0) + config.null_class
            y = condition.labels(len(t), rows, self.device)
            added = condition.added
            added = None if added is None else added.to(self.device).expand(len(t), -1)
            return self.network.embed(t, y, added)

        context = self._contexts.get(condition)
        if context is None and condition.context is not None:
            tokens = condition.context.to(self.device, self.dtype)
            mask = condition.mask
            masks = [] if mask is None else [mask.to(self.device)]
            context = self.network.project_context(tokens, *masks)
        start = self.embeddings.add((key, condition.key), embed)
        if context is not None:
            self._contexts[condition] = context
        self._users[condition] = self._users.get(condition, 0) + 1
        return start

    def _drop(self, timesteps: bytes, condition: Condition) -> None:
        self.embeddings.drop((timesteps, condition.key))
        self._users[condition] -= 1
        if not self._users[condition]:
            del self._users[condition]
            self._contexts.pop(condition, None)

    def _batch(
        self,
        cond: list[int],
        uncond: list[int],
        packed: list[tuple[list[_Row], Part]],
        unread: int,
    ) -> Batch:
        inputs = [block[:: 1 + part.pairs] for block, part in packed]
        flat = [row for block in inputs for row in block]
        samples, embeddings, deep = self._vectors(
            [row.sample for row in flat],
            [row.embedding for row in flat],
            [unread if row.deep < 0 else row.deep for row in flat],
        )
        cond_places, uncond_places = self._vectors(cond, uncond)
        known, self._gathered = self._gathered, {}
        contexts = [
            self._context(tuple(row.condition for row in block), known) for block, _ in packed
        ]
        sizes = [len(block) for block in inputs]
        vectors = (vector.split(sizes) for vector in (samples, embeddings, deep))
        pieces = zip(*vectors, contexts, (part for _, part in packed), strict=True)
        return Batch(
            cond=cond_places,
            uncond=uncond_places if max(uncond) >= 0 else None,
            rows=sum(len(block) for block, _ in packed),
            embeddings=embeddings,
            blocks=[_Block(*piece) for piece in pieces],
        )

    def _vectors(self, *numbers: Sequence[int]) -> Tensor:
        """Equally long int64 vectors on the device, in one copy. Each begins at a multiple of 16
        bytes, as plans need it (`fastdiff.kernels.plans`)."""
        length = len(numbers[0])
        padded = [[*vector, *[0] * (length % 2)] for vector in numbers]
        return torch.tensor(padded, dtype=torch.int64, device=self.device)[:, :length]

    def _context(
        self, conditions: tuple[Condition, ...], known: dict[tuple[Condition, ...], Context]
    ) -> Context | None:
        """The projected context of a block's rows, gathered once and kept while the block stays."""
        if conditions[0].context is None:
            return None
        if conditions not in self._gathered:
            self._gathered[conditions] = known.get(conditions) or map_context(
                lambda *same: torch.cat(same), *(self._contexts[c] for c in conditions)
            )
        return self._gathered[conditions]


def _rows_of(turn: Turn) -> list[_Row]:
    """The rows of a turn: the unconditional one, if it is guided, and the conditional one."""
    sample, guide, rows = turn.sample, turn.guide, list[_Row]()
    deep = [-1, -1] if turn.branch is None else [2 * sample, 2 * sample + 1]
    if turn.guided:
        assert guide.unconditional is not None, "a guided row without unconditional"
        at = guide.first_unconditional + turn.row
        rows.append(_Row(sample, at, guide.unconditional, deep[0]))
    return [*rows, _Row(sample, guide.first + turn.row, guide.condition, deep[1])]


def _whole_first(group: tuple[_Group, list[Turn]]) -> tuple[int, tuple[int, ...]]:
    """Order of the groups of a batch: the same parts in the same order make the same graph."""
    _, branch, controls = group[0]
    return -1 if branch is None else branch, controls
