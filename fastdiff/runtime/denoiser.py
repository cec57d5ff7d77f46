"""A network with its conditions, as the sampling loop calls it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.models.network import Context, Network, map_context
from fastdiff.runtime.blocks import in_blocks
from fastdiff.runtime.conditions import Condition


class Denoiser:
    """A network with its conditions: the ``predict(x, row)`` that the sampling loop calls.

    Computed once, here: the embeddings of all (timestep, condition) pairs, and each condition's
    keys and values in every cross-attention. A step looks them up.
    """

    def __init__(
        self,
        unet: Network,
        timesteps: Tensor | Sequence[float],
        conditions: Sequence[Condition],
        unconditional: Sequence[Condition] | None = None,
        *,
        guided: Sequence[bool] | None = None,
        extra: Tensor | None = None,
        block: int | None = None,
    ) -> None:
        """
        timesteps: (rows,), the t of each row.
        conditions: one per sample, all with as many tokens.
        unconditional: one per sample, for guidance; None if no row is guided.
        guided: for each row, whether it is; None: all are where there is `unconditional`.
        extra: (N, C, H, W), channels that the network reads behind those of x, as for inpainting.
        block: samples per evaluation; see :func:`block_size`.
        """
        assert unconditional is None or len(unconditional) == len(conditions)
        self.unet, self.block, self.extra = unet, block, extra
        weight = next(unet.parameters())
        self.dtype, device = weight.dtype, weight.device
        kinds = list(dict.fromkeys([*conditions, *(unconditional or ())]))
        assert len({kind.tokens for kind in kinds}) == 1, "samples differ in their tokens"
        self.guided = [unconditional is not None] * len(timesteps) if guided is None else guided
        assert unconditional is not None or not any(self.guided), "guided without unconditional"
        different = list(dict.fromkeys(_floats(timesteps)))
        self.place = [different.index(t) for t in _floats(timesteps)]  # row -> embedding
        self.kinds = [kinds.index(condition) for condition in conditions]
        self.null = [kinds.index(condition) for condition in unconditional or ()]
        self.samples = torch.arange(len(conditions))
        self._chosen: dict[tuple[int, ...], tuple[Tensor, Context]] = {}
        with torch.inference_mode():
            t = torch.tensor(different, dtype=torch.float32, device=device)
            # One call per condition, so that each has the same shape in any batch.
            vectors: dict[tuple[int | None, int], Tensor] = {}
            for kind in kinds:
                if kind.key not in vectors:
                    y = None if kind.label is None else torch.full_like(t, kind.label).long()
                    added = kind.added
                    added = None if added is None else added.to(device).expand(len(t), -1)
                    vectors[kind.key] = unet.embed(t, y, added)
            kinds_of_rows = [vectors[kind.key] for kind in kinds]
            self.embeddings = torch.stack(kinds_of_rows, dim=1)  # (timesteps, conditions, E)
            self.kvs = [
                unet.project_context(kind.context.to(device, self.dtype))
                for kind in kinds
                if kind.context is not None
            ]

    @torch.inference_mode()
    def __call__(self, x: Tensor, row: int) -> Tensor:
        """x: (N, C, H, W). Returns in its dtype (N, ...), if the row is guided (2N, ...) = [uncond;
        cond]."""
        assert len(x) == len(self.kinds), f"{len(self.kinds)} conditions for {len(x)} samples"
        guided, emb = self.guided[row], self.embeddings[self.place[row]]

        def evaluate(piece: Tensor, samples: Sequence[int]) -> Tensor:
            chosen = [self.kinds[sample] for sample in samples]
            if guided:
                piece = torch.cat([piece, piece])
                chosen = [self.null[sample] for sample in samples] + chosen
            index, kvs = self._choose(tuple(chosen))
            return self.unet.body(piece, emb[index], kvs)

        inputs = x if self.extra is None else torch.cat([x, self.extra.to(x)], dim=1)
        inputs = inputs.to(self.dtype)
        if self.block is None:
            piece = inputs.contiguous(memory_format=torch.channels_last)
            return evaluate(piece, range(len(x))).to(x.dtype)
        return in_blocks(
            lambda piece, samples: evaluate(piece, samples.tolist()),
            self.block,
            inputs,
            self.samples,
        ).to(x.dtype)

    def _choose(self, chosen: tuple[int, ...]) -> tuple[Tensor, Context]:
        """The conditions of a piece as an index, and their keys and values, gathered once."""
        if chosen not in self._chosen:
            index = torch.tensor(chosen, device=self.embeddings.device)
            kvs = [self.kvs[kind] for kind in chosen] if self.kvs else []
            gathered = map_context(lambda *same: torch.cat(same), *kvs)
            self._chosen[chosen] = (index, gathered)
        return self._chosen[chosen]


def _floats(timesteps: Tensor | Sequence[float]) -> list[float]:
    return timesteps.tolist() if isinstance(timesteps, Tensor) else [float(t) for t in timesteps]
