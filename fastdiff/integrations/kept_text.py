"""The keys and values of the text, computed once per prompt: ``accelerate(pipe, keep_text=True)``.

The cross-attentions of a U-Net project the same text in every step. On a GPU, `KeptText` keeps the
result for as long as nothing that it was computed from has changed:

- the tensor with the text is the same object (a weak reference, so an address that was used again
  is not mistaken for it), and its version counter has not moved;
- the weights are the same tensors at the same addresses, which `networks.py` checks before, and
  their version counters have not moved;
- the call is on the same CUDA stream, since nothing orders the streams of two calls.

PyTorch does not count writes through ``tensor.data``, numpy or DLPack. peft merges a LoRA that way,
so the functions of diffusers that do it (`fuse_lora`, `unfuse_lora`) drop what is kept. After other
such writes pass the text as a new tensor, as pipelines do in every call. A check on the GPU cannot
replace this rule: it would have to read the weights, and reading them is what the projection costs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.network import Context, Network

LIMIT = 4
"""Maximum number of prompts kept per U-Net, the most recently used ones. For SDXL each sample of 77
tokens takes 26 MB in half precision."""


class _Kept:
    """One prompt's projection, and what it was computed from."""

    def __init__(self, text: weakref.ref[Tensor], state: Any, projected: Context) -> None:
        self.text, self.state, self.projected = text, state, projected


class KeptText:
    """The projections of the last prompts of one network."""

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}

    def forget(self) -> None:
        """Drop all projections."""
        self._kept.clear()

    def __call__(self, network: Network, text: Tensor, weights: Iterable[Tensor]) -> Context:
        """``network.project_context(text)``, or what it returned before.

        Args:
            text: (N, T, D).
            weights: all tensors that the projection reads; same objects as in the last call, unless
                `forget` was called in between.
        """
        state = _state(text, weights)
        if state is None:
            return network.project_context(text)
        kept = self._kept.pop(id(text), None)
        if kept is None or kept.text() is not text or kept.state != state:
            kept = _Kept(self._watched(text), state, network.project_context(text))
        self._kept[id(text)] = kept  # at the end, as the most recently used
        if len(self._kept) > LIMIT:
            del self._kept[next(iter(self._kept))]
        return kept.projected

    def _watched(self, text: Tensor) -> weakref.ref[Tensor]:
        """A reference to a prompt, with which its projection goes."""
        key, there = id(text), weakref.ref(self)

        def gone(reference: weakref.ref[Tensor]) -> None:
            me = there()
            if me is not None and (kept := me._kept.get(key)) and kept.text is reference:
                del me._kept[key]

        return weakref.ref(text, gone)


def _state(text: Tensor, weights: Iterable[Tensor]) -> Any:
    """What must not have changed, or None if PyTorch does not tell."""
    stream = None
    if text.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return (
                None  # whoever records has no result yet, and a replay would not compute it again
            )
        stream = torch.cuda.current_stream(text.device).cuda_stream
    versions = []
    for tensor in (text, *weights):
        if tensor.is_inference():
            return None  # inference tensors have no version counter
        versions.append(tensor._version)
    return stream, versions
