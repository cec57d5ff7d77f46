"""`fastdiff.compile_pass`: our ops inside the graphs of `torch.compile`.

Inductor calls `torch._inductor.config.pre_grad_custom_pass` with each graph that Dynamo has
captured, before autograd is traced. At that point GroupNorm, SiLU and
`scaled_dot_product_attention` are still single calls, and the ops that replace them bring their own
gradients. (Inductor's own pattern matcher runs too late, after both have been decomposed.) The hook
is part of PyTorch's config but not a stable API, and there is no public one; if it is missing,
`compile_pass` raises.
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
    """`F.scaled_dot_product_attention` on (N, H, L, D)."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attention(q, k, v, mask=attn_mask, scale=scale).transpose(1, 2)


@functools.cache
def sources() -> str:
    """Hash of everything that determines the resulting graphs: this file, the ops, their tables."""
    folder = Path(kernels.__file__).parent
    files = [Path(__file__), *(p for kind in ("py", "json") for p in folder.rglob(f"*.{kind}"))]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class CompilePass(CustomGraphPass):
    """The graph pass that `compile_pass` registers.

    `replaced` counts the replacements in all graphs compiled so far. A graph that comes from
    Inductor's cache is not counted again.
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
        """Identify the pass in the keys of Inductor's caches; None if an earlier pass has no uuid.

        If no kernel can run an op, or the reference backend is forced, the reference is traced into
        the graph. So the forced backend and the unavailable ones are part of the identity.
        """
        earlier = [getattr(one, "uuid", lambda: None)() for one in _listed(self._before)]
        if None in earlier:
            return None
        missing = sorted(choose.UNAVAILABLE)
        state = (self._active, *choose.traced_choice(), missing, *map(str, earlier))
        return f"fastdiff.compile_pass {sources()} {state}"

    def remove(self) -> None:
        """Stop replacing ops, and restore the previous pass unless another was registered since.

        Graphs that are already compiled do not change.
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
    """Put our ops into every graph that `torch.compile` passes to Inductor from now on.

    A GroupNorm whose output is only read by a SiLU becomes `group_norm_silu`, and
    `scaled_dot_product_attention` without dropout or causal mask becomes `attention`. Use it for
    models whose modules `accelerate` does not know or must not change. `accelerate` fuses more
    (time embedding, residuals), and Inductor fuses nothing into these ops. Graphs compiled earlier
    do not change.

    Returns:
        The registered pass: `replaced` counts its replacements, `remove()` undoes the registration.

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
