"""Kernel launches, bytes and FLOPs of one evaluation of a network, counted without a GPU.

    python -m fastdiff.bench.counts launches
    python -m fastdiff.bench.counts launches --docs

The network runs on the meta device, where tensors have shapes but no data. A dispatch mode sees
every PyTorch operator and every op of `fastdiff.kernels`, and counts what it launches on a GPU:

    views, reshapes without a copy, allocations     none
    convolution                                     1, and 1 more for a bias, which PyTorch adds to
                                                    cuDNN's result in a kernel of its own
    linear layer, matrix product                    1; cuBLAS adds the bias in its epilogue
    scaled_dot_product_attention                    1: the flash or the memory-efficient kernel
    group_norm                                      3: moments, scale and shift per channel, result
    layer_norm, elementwise, cat, copy, ...         1, see `LAUNCHES`
    ops of fastdiff.kernels                         what the Triton backend launches, read off its
                                                    plan for an H200

A launch moves each tensor that it reads or writes once. Where a kernel reads a tensor twice
(group_norm's moments and result), both times count, although the second read may hit the L2 cache.
FLOPs are those of matrix products and convolutions, 2 per multiply-add. Not counted, because no
shape tells: kernels that cuDNN adds to convert NCHW tensors, and split-K reductions of cuBLAS.

An operator that is not listed raises an error.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff import kernels
from fastdiff.bench import inductor
from fastdiff.bench.plain import plain_ops
from fastdiff.bench.predict import H200
from fastdiff.bench.shapes import CONTEXT_TOKENS, GPU_JOBS, Job
from fastdiff.diffusion.samplers import build_table
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.extras import import_extra
from fastdiff.kernels import shapes_only
from fastdiff.kernels.cat_linear import composed as cat_linear
from fastdiff.kernels.linear_add import composed as linear_add
from fastdiff.kernels.triton import Launch, recording_launches
from fastdiff.models.network import Network, network_family
from fastdiff.models.presets import UNETS
from fastdiff.runtime.conditions import Condition
from fastdiff.runtime.engine import Engine, Request
from fastdiff.runtime.graphs import Replay, StepGraphs

KINDS = (
    *("convolution", "convolution bias", "linear", "attention", "norm"),
    *("GEGLU", "addition", "concatenation", inductor.FUSED, "other"),
)
"""The groups of launches in the tables; Inductor's own kernels are "fused"."""

LAUNCHES: dict[str, tuple[str, int]] = {
    "convolution": ("convolution", 1),  # and a bias, see `Counting._convolution`
    "linear": ("linear", 1),  # inside an op; elsewhere it arrives as one of the following
    "addmm": ("linear", 1),
    "addmm_": ("linear", 1),
    "mm": ("linear", 1),
    "bmm": ("linear", 1),
    "baddbmm": ("linear", 1),
    "sdpa": ("attention", 1),
    "native_group_norm": ("norm", 3),
    "native_layer_norm": ("norm", 1),
    "add": ("addition", 1),
    "add_": ("addition", 1),
    "addcmul": ("addition", 1),
    "cat": ("concatenation", 1),
    **dict.fromkeys(
        (
            *("arange", "full", "zeros", "zeros_like", "fill_", "clone", "copy_", "_to_copy"),
            *("mul", "div", "sub", "exp", "cos", "sin", "silu", "gelu", "sigmoid", "pow", "sqrt"),
            *("mean", "embedding", "index", "index_select", "upsample_nearest2d", "avg_pool2d"),
        ),
        ("other", 1),
    ),
    "constant_pad_nd": ("other", 2),  # fills the result, then copies the input into it
    "empty": ("other", 0),
    "empty_strided": ("other", 0),
    "empty_like": ("other", 0),
    "new_empty": ("other", 0),
    "_unsafe_view": ("other", 0),
}
"""PyTorch's operator -> the group it belongs to and its launches. Views are recognised by their
schema."""

OURS = {
    "group_norm_silu": "norm",
    "add_group_norm_silu": "norm",
    "cat_group_norm_silu": "norm",
    "layer_norm": "norm",
    "add_layer_norm": "norm",
    "ada_layer_norm": "norm",
    "gate_residual": "addition",
    "attention": "attention",
    "geglu": "GEGLU",
    "cat_linear": "linear",
    "linear_add": "linear",
    "linear_geglu": "linear",
    "gather_rows": "other",
    "sampler_step": "other",
}
"""Op of `fastdiff.kernels` -> the group it belongs to."""


def _linear_then_geglu(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
    return kernels.geglu(nn.functional.linear(x, weight, bias))


BY_COUNTS: dict[str, Callable[..., Any]] = {
    "cat_linear": cat_linear.forward,
    "linear_add": linear_add.forward,
    "linear_geglu": _linear_then_geglu,
}
"""Op -> how it is composed of others, which `auto` prefers to one Triton kernel where it is counted
to be faster."""


@dataclass(kw_only=True)
class Count:
    """Kernels that an evaluation launches."""

    launches: Counter[str] = field(default_factory=Counter)
    """Group of `KINDS` -> launches."""
    bytes: int = 0
    flops: int = 0
    bytes_of: Counter[str] = field(default_factory=Counter)
    """Group -> bytes."""
    flops_of: Counter[str] = field(default_factory=Counter)
    recorded: list[Launch] = field(default_factory=list)
    """What Triton launches, in order; kernels that `norms` plans are CUDA's and not among them."""
    after_ours: int = 0
    """Launches of ours that directly follow one of ours."""

    @property
    def total(self) -> int:
        return sum(self.launches.values())


Norms = Callable[[int, int, int, int], int]
"""N, C, pixels and groups of a GroupNorm -> its launches."""


def count(call: Callable[[], Any], norms: Norms | None = None) -> Count:
    """Call a function of tensors on the meta device, and count its launches.

    norms: the launches of our GroupNorms; None: those of the Triton backend.

    Raises:
        ValueError: it uses an operator that is not in `LAUNCHES`.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.no_grad())
        counting = modes.enter_context(Counting(norms))
        modes.enter_context(Attention(counting))
        modes.enter_context(kernels.backend("auto"))
        modes.enter_context(shapes_only())
        call()
    return counting.found


class Counting(TorchDispatchMode):
    """Counts every operator that reaches PyTorch's dispatcher."""

    table: Mapping[str, tuple[str, int]] = LAUNCHES
    keeps = False
    """Whether the ops keep what their backward passes need."""

    def __init__(self, norms: Norms | None = None) -> None:
        super().__init__()
        self.found = Count()
        self._norms = norms
        self._ours_last = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # without it, PyTorch imports Dynamo
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if namespace == kernels.op.NAMESPACE:
            made = func(*args, **kwargs)
            self.ours(name, args)
        elif name == "convolution":
            made = self._convolution(*args, **kwargs)
        else:
            made = self.other(name, func, args, kwargs)
        return made

    def other(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run and count an operator of PyTorch."""
        made = func(*args, **kwargs)
        if not _is_view(func):
            self._pytorch(name, (args, kwargs), made)
        return made

    def add(
        self, kind: str, launches: int, moved: int, flops: int = 0, *, ours: bool = False
    ) -> None:
        """Add launches of one operator. ours: of this package's kernels."""
        if launches:
            self.found.after_ours += ours * (launches - 1 + self._ours_last)
            self._ours_last = ours
        self.found.launches[kind] += launches
        self.found.bytes += moved
        self.found.flops += flops
        self.found.bytes_of[kind] += moved
        self.found.flops_of[kind] += flops

    def _pytorch(self, name: str, given: Any, made: Any) -> None:
        if name not in self.table:
            raise ValueError(
                f"aten::{name} has no number of launches; add it to LAUNCHES in {__name__}"
            )
        kind, launches = self.table[name]
        if launches:
            args = given[0]
            twice = name == "native_group_norm"
            moved = moved_bytes(given, made) + (moved_bytes(args[0]) if twice else 0)
            flops = _product_flops(name, args) if kind == "linear" else 0
            self.add(kind, launches, moved, flops)

    def _convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        """cuDNN's result is channels_last if its input or its weight is."""
        made = torch.ops.aten.convolution.default(x, weight, bias, *rest)
        if any(_channels_last(t) for t in (x, weight)):
            made = made.contiguous(memory_format=torch.channels_last)
        flops = 2 * made.numel() * math.prod(weight.shape[1:])
        self.add("convolution", 1, moved_bytes((x, weight), made), flops)
        if bias is not None:
            self.add("convolution bias", 1, moved_bytes((made, bias), made))
        return made

    def ours(self, name: str, args: tuple[Any, ...]) -> None:
        op = kernels.OPS[name]
        if name in BY_COUNTS and op.unmeasured(*args) != "triton":
            with self:  # PyTorch's operators and another op
                BY_COUNTS[name](*args, self.keeps)
            return
        if self._norms is not None and name.endswith("group_norm_silu"):
            self._norm_by_plan(name, args)
            return
        # with self: what a backend leaves to PyTorch counts as PyTorch's
        with recording_launches(H200.architecture) as launched, torch.no_grad(), self:
            op.backends["triton"].forward(*args, self.keeps)
        work = op.work(*args)
        # a sample that does not fit on the chip is read for the moments and again for the result
        parts = name.endswith("group_norm_silu") and len(launched) > 1
        moved = work.bytes + (moved_bytes(args[0]) if parts else 0)
        self.add(OURS[name], len(launched), moved, work.flops, ours=True)
        self.found.recorded += launched

    def _norm_by_plan(self, name: str, args: tuple[Any, ...]) -> None:
        """Count a GroupNorm whose launches `norms` tells."""
        assert self._norms is not None
        op, (n, c, *sides) = kernels.OPS[name], args[0].shape
        if name.startswith("cat_"):
            c += args[1].shape[1]
        groups = args[list(op.types).index("num_groups")]
        launched = self._norms(n, c, math.prod(sides), groups)
        again = moved_bytes(args[0]) if launched > 1 else 0
        self.add(OURS[name], launched, op.work(*args).bytes + again, ours=True)


class Attention(TorchFunctionMode):
    """PyTorch's attention as one launch: on the meta device it would be taken apart."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self.counting = counting

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.count(*args[:3])

    def count(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: (N, H, L or S, D) on the meta device. Returns (N, H, L, D)."""
        n, heads, length, d = q.shape
        made = torch.empty((n, length, heads, v.shape[-1]), dtype=q.dtype, device="meta").transpose(
            1, 2
        )
        flops = 2 * n * heads * length * k.shape[2] * (d + v.shape[-1])
        self.counting.add(*LAUNCHES["sdpa"], moved_bytes((q, k, v), made), flops)
        return made


def _is_view(func: Any) -> bool:
    """Whether an operator returns its input with another shape, and so launches nothing."""
    aliases = [value.alias_info for value in func._schema.returns]
    return all(alias is not None and not alias.is_write for alias in aliases)


def _channels_last(x: Tensor) -> bool:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return last and not x.is_contiguous()


def moved_bytes(*given: Any) -> int:
    """Bytes of all tensors in nested arguments; dimensions that are expanded count once."""
    return sum(
        t.element_size() * math.prod(s for s, step in zip(t.shape, t.stride(), strict=True) if step)
        for t in tree_leaves(given)
        if isinstance(t, Tensor)
    )


def _product_flops(name: str, args: Sequence[Any]) -> int:
    """FLOPs of a matrix product (..., m, k) x (..., k, n)."""
    if name == "linear":
        return 2 * int(args[0].numel()) * len(args[1])
    a, b = args[-2:] if name in ("mm", "bmm") else args[1:3]
    return 2 * int(a.numel()) * int(b.shape[-1])


# What is counted

DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 1.5 U-Net": ("UNet2DConditionModel", {"cross_attention_dim": 768}),
    "SDXL U-Net": (
        "UNet2DConditionModel",
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "KL-f8 decoder": (
        "AutoencoderKL",
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "latent_channels": 4,
        },
    ),
}
"""Job -> the class in diffusers that computes the same network, and its config. diffusers has no
class for ADM."""

DTYPE = torch.bfloat16


class Body(nn.Module):
    """What the engine evaluates of a network: all but the embedding and the text's projections.

    pairs: the rows of a guided sample share what precedes the text, see `Network.body_of_pairs`.
    """

    def __init__(self, network: Any, *, pairs: bool = False) -> None:
        super().__init__()
        self.network, self.pairs = network, pairs

    def forward(self, x: Tensor, emb: Tensor, kvs: Any) -> Tensor:
        body = self.network.body_of_pairs if self.pairs else self.network.body
        y: Tensor = body(x, emb, kvs)
        return y


def native_network(job: Job) -> tuple[nn.Module, dict[str, Any]]:
    """fastdiff's network on the meta device, and its inputs. A U-Net gets the embedding and the
    keys and values of the context, which the engine computes once per request; guided by text
    alone, it gets the two rows of a sample as one."""
    module, inputs = job.build("meta", DTYPE)
    if not isinstance(module, Network):
        return module, inputs
    network = module
    with torch.no_grad(), shapes_only():
        emb = network.embed(inputs["t"], inputs.get("y"), inputs.get("added"))
        context = inputs.get("context")
        kvs = None if context is None else network.project_context(context)
    pairs = network.shares_prefix and "added" not in inputs
    rows = job.batch // 2 if pairs else job.batch
    return Body(network, pairs=pairs), {"x": inputs["x"][:rows], "emb": emb[:rows], "kvs": kvs}


def native(job: Job, norms: Norms | None = None) -> Count:
    """fastdiff's network."""
    module, inputs = native_network(job)
    return count(lambda: module(**inputs), norms)


class Decode(nn.Module):
    """The decoder of diffusers' autoencoder."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, z: Tensor) -> Tensor:
        y: Tensor = self.autoencoder.decode(z, return_dict=False)[0]
        return y


def diffusers_network(job_name: str, batch: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """diffusers' network on the meta device, and the arguments that a pipeline calls it with.

    batch: None: the job's.
    """
    kind, config = DIFFUSERS[job_name]
    job = GPU_JOBS[job_name]
    rows = batch or job.batch
    diffusers = import_extra("diffusers", extra="diffusers")
    with torch.device("meta"):
        module = getattr(diffusers, kind)(**config).to(DTYPE).eval()
        x = torch.empty(rows, 4, job.size, job.size, dtype=DTYPE)
        if kind == "AutoencoderKL":
            return Decode(module), {"z": x}
        width, t = module.config.cross_attention_dim, torch.empty(())
        context = torch.empty(rows, CONTEXT_TOKENS, width, dtype=DTYPE)
        added = {
            "time_ids": torch.empty(rows, 6, dtype=DTYPE),
            "text_embeds": torch.empty(rows, 1280, dtype=DTYPE),
        }
    return module, {
        "sample": x,
        "timestep": t,
        "encoder_hidden_states": context,
        "added_cond_kwargs": added,
        "return_dict": False,
    }


def of_diffusers(
    job_name: str, *, accelerated: bool, keep_text: bool = False, norms: Norms | None = None
) -> Count:
    """diffusers' network as a pipeline calls it; `accelerated` by `fastdiff.accelerate`.

    keep_text: with this option of `accelerate`, in a step after the first.
    """
    module, inputs = diffusers_network(job_name)
    if accelerated:
        accelerate = import_extra("fastdiff.integrations", extra="diffusers").accelerate
        of = module.autoencoder if isinstance(module, Decode) else module
        accelerate(of, keep_text=keep_text)
    with torch.device("meta"):
        if keep_text:
            count(lambda: module(**inputs), norms)
        return count(lambda: module(**inputs), norms)


def compiled_network(job_name: str) -> inductor.Compiled:
    """What torch.compile launches: diffusers' network, channels_last, or where diffusers has none,
    ours on the operators that people write.

    The process must do nothing else afterwards, see inductor.py.
    """

    def make() -> tuple[nn.Module, dict[str, Any]]:
        if job_name not in DIFFUSERS:
            return native_network(GPU_JOBS[job_name])
        module, inputs = diffusers_network(job_name)
        return module.to(memory_format=torch.channels_last).eval(), inputs  # type: ignore[call-overload]

    with plain_ops():
        return inductor.read(inductor.code_of(make, default_device=job_name in DIFFUSERS))


@cache
def counts() -> dict[tuple[str, str], Count]:
    """(job, implementation) -> its count, for one evaluation at the batch sizes of `GPU_JOBS`."""
    return dict(_counts())


def _counts() -> Iterator[tuple[tuple[str, str], Count]]:
    for name, job in GPU_JOBS.items():
        yield (name, "fastdiff"), native(job)
        if name in DIFFUSERS:
            yield (name, "diffusers, accelerated"), of_diffusers(name, accelerated=True)
            if job.network == "unet":
                kept = of_diffusers(name, accelerated=True, keep_text=True)
                yield (name, "diffusers, accelerated, keep_text"), kept
            yield (name, "diffusers"), of_diffusers(name, accelerated=False)


# A step of the engine, outside its network

STEPS: dict[str, dict[str, Any]] = {
    "guided": {},
    "guided, inpainting model (5 extra channels)": {"extra": 5},
    "guided, with rescale": {"rescale": 0.7},
    "without guidance": {"guidance_scale": 1.0},
}
"""Kinds of requests -> how they differ from a guided one."""


class _Functions:
    """In the place of a recorder of CUDA graphs: a graph is the function itself."""

    room = math.inf

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def record(self, function: Callable[[], None]) -> Replay:
        return function

    def held(self) -> int:
        return 0

    def renew(self) -> None:
        """Do nothing: there is no memory."""


def step_count(extra: int = 0, guidance_scale: float = 7.5, rescale: float = 0.0) -> Count:
    """What a step of Stable Diffusion 1.5 launches outside its U-Net, as a graph records it."""
    config = replace(UNETS["sd1"], in_channels=4 + extra)
    with torch.device("meta"):
        network: Any = network_family("unet").network(config).to(DTYPE).eval()
    size, tokens = GPU_JOBS["SD 1.5 U-Net"].size, CONTEXT_TOKENS
    context = torch.empty(1, tokens, config.context_dim or 0, device="meta")
    table = build_table(
        "ddim", NoiseSchedule(ScheduleConfig(kind="linear")), 4, prediction="eps",
        guidance_scale=guidance_scale, guidance_rescale=rescale,
    )  # fmt: skip
    request = Request(
        table=table,
        x=torch.empty(4, size, size, device="meta"),
        seed=0,
        condition=Condition(context=context),
        unconditional=Condition(context=context.clone()),
        extra=torch.empty(extra, size, size, device="meta") if extra else None,
    )
    engine = Engine(
        network, shape=(4, size, size), slots=1, tokens=tokens, graphs=StepGraphs(_Functions())
    )
    with shapes_only():
        engine.submit(request)
    network.body = lambda x, *_: x.new_empty(len(x), 4, size, size)
    network.body_of_pairs = lambda x, *_: x.new_empty(2 * len(x), 4, size, size)
    count(engine.step)  # which records the graph
    return count(engine.step)
