"""`fastdiff.compile_pass`: our ops inside graphs that `torch.compile` makes anyway.

Inductor calls `torch._inductor.config.pre_grad_custom_pass` with each graph that Dynamo has
captured, before autograd is traced: there a GroupNorm whose only reader is a SiLU, and
`scaled_dot_product_attention`, are still single calls, and what takes their place brings its own
gradients. That hook is named in PyTorch's config but not promised, and there is no public one;
where it is missing `compile_pass` raises. Patterns of Inductor's own matcher come later, when both
have been decomposed.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

from fastdiff import kernels
from fastdiff.kernels import attention, choose, group_norm_silu

HOOK = "pre_grad_custom_pass"


def norm_then_silu(
    input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    """`F.silu(F.group_norm(...))`."""
    return group_norm_silu(input, num_groups, weight, bias, eps=eps)


def dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, scale: Any = None
) -> Tensor:
    """`F.scaled_dot_product_attention` of (N, H, L, D)."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attention(q, k, v, mask=attn_mask, scale=scale).transpose(1, 2)


@functools.cache
def sources() -> str:
    """A hash of what decides which graphs the pass makes: this file, the ops, their tables."""
    folder = Path(kernels.__file__).parent
    files = [Path(__file__), *(p for kind in ("py", "json") for p in folder.rglob(f"*.{kind}"))]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class CompilePass(CustomGraphPass):
    """What `compile_pass` registered.

    `replaced` counts what it has done so far in graphs that were compiled; one that comes from
    Inductor's cache was done when it was put there.
    """

    def __init__(self, before: Any) -> None:
        self.replaced: Counter[str] = Counter()
        self._before = before
        self._active = True

    def __call__(self, graph: fx.Graph) -> None:
        for earlier in _listed(self._before):
            earlier(graph)
        if not self._active:
            return
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is F.group_norm:
                self._norm(graph, node)
            elif node.op == "call_function" and node.target is F.scaled_dot_product_attention:
                self._attention(graph, node)

    def uuid(self) -> str | None:
        """Names the graphs that the pass makes, in the keys of Inductor's caches; None where an
        earlier pass does not name its own.

        Where no kernel serves an op, or the reference is forced, its reference is traced into the
        graph, so what is forced and what is missing count too.
        """
        earlier = [getattr(one, "uuid", lambda: None)() for one in _listed(self._before)]
        if None in earlier:
            return None
        missing = sorted(choose.UNAVAILABLE)
        state = (self._active, *choose.traced_choice(), missing, *map(str, earlier))
        return f"fastdiff.compile_pass {sources()} {state}"

    def remove(self) -> None:
        """Stop replacing, and put back what was registered before unless another pass came since.

        Graphs that are compiled keep what they have.
        """
        self._active = False
        if getattr(config, HOOK) is self:
            setattr(config, HOOK, self._before)

    def _norm(self, graph: fx.Graph, node: fx.Node) -> None:
        readers = list(node.users)
        if len(readers) != 1 or readers[0].op != "call_function" or readers[0].target is not F.silu:
            return
        arguments = _named(node, ("input", "num_groups", "weight", "bias", "eps"))
        self._replace(graph, readers[0], norm_then_silu, arguments)
        graph.erase_node(node)
        self.replaced["group_norm_silu"] += 1

    def _attention(self, graph: fx.Graph, node: fx.Node) -> None:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        arguments = _named(node, (*names, "enable_gqa"))
        off = (arguments.pop(name, 0) for name in ("dropout_p", "is_causal", "enable_gqa"))
        shapes = [_shape(arguments.get(name)) for name in ("query", "key", "value")]
        fits = (
            all(len(shape) == 4 for shape in shapes)
            and shapes[1] == shapes[2]
            and shapes[0][:2] == shapes[1][:2]
        )
        if any(off) or not fits:
            return
        self._replace(graph, node, dot_product_attention, arguments)
        self.replaced["attention"] += 1

    @staticmethod
    def _replace(
        graph: fx.Graph, node: fx.Node, function: Callable[..., Tensor], arguments: dict[str, Any]
    ) -> None:
        with graph.inserting_before(node):
            new = graph.call_function(function, kwargs=arguments)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _named(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _listed(passes: Any) -> list[Callable[[fx.Graph], None]]:
    if passes is None:
        return []
    return list(passes) if isinstance(passes, list | tuple) else [passes]


def compile_pass() -> CompilePass:
    """Put our ops into every graph that `torch.compile` gives to Inductor from now on.

    GroupNorm read by a SiLU alone becomes `group_norm_silu`, `scaled_dot_product_attention` without
    dropout and causal mask `attention`. For models whose modules `accelerate` does not know, or
    that must not be touched; Inductor fuses nothing into these ops, and `accelerate` fuses more
    (time embedding, residuals). Graphs compiled before keep what they have.

    Returns:
        the registered pass: `replaced` counts, `remove()` undoes.

    Raises:
        RuntimeError: this PyTorch's Inductor has no such hook.
    """
    if not hasattr(config, HOOK):
        raise RuntimeError(
            f"PyTorch {torch.__version__}'s Inductor has no {HOOK}, the hook that "
            "compile_pass needs; use fastdiff.accelerate on the model before torch.compile"
        )
    current = getattr(config, HOOK)
    if isinstance(current, CompilePass):
        return current
    registered = CompilePass(current)
    setattr(config, HOOK, registered)
    return registered
