"""The interface of all denoisers, and the registry of network families.

A family is one file in this folder: a frozen config dataclass and a `Network`, connected by
`@register(Config)`. Its kind is the name of the file, by which bundles refer to it and
`network_family` finds it, so there is no list to maintain.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from torch import Tensor, nn

Context: TypeAlias = "Sequence[Tensor | Context]"
"""Projected context tokens: lists of tensors, nested to any depth; every tensor is (N, ...)."""


class NetworkConfig(Protocol):
    """The properties of a denoiser's config that the runtime reads, for every architecture."""

    @property
    def in_channels(self) -> int:
        """Channels that `body` reads: those of x, plus extra ones (mask, image, low resolution)."""

    @property
    def out_channels(self) -> int:
        """Channels that `body` returns; with `learned_sigma` twice those of x."""

    @property
    def learned_sigma(self) -> bool:
        """Whether the second half of the output interpolates the log variance (IDDPM eq. 15)."""

    @property
    def num_classes(self) -> int | None:
        """Class labels 0 .. num_classes - 1; None for a model without classes."""

    @property
    def null_class(self) -> bool:
        """Whether there is a label num_classes for "no class", which guidance needs."""

    @property
    def context_dim(self) -> int | None:
        """Width of the context tokens; None for a model that reads none."""

    @property
    def added_condition_dim(self) -> int | None:
        """Width of the vector added to the time embedding; None for a model without one."""

    @property
    def size_multiple(self) -> int:
        """Every spatial side of x must be a multiple of this."""

    @property
    def num_blocks(self) -> int:
        """Lower bound of the number of blocks with weights; no file with fewer tensors can fit."""


class Network(nn.Module):
    """A denoiser, which predicts the noise or another `Prediction` that it was trained on.

    This is a base class rather than a Protocol, because its users also need an `nn.Module`
    (parameters, dtype, device, state dict), which a Protocol cannot express.
    """

    config: NetworkConfig
    """Each family annotates it with its own config class."""
    only_side: int | None = None
    """The only height and width that x may have, if positions are learned; None: any multiple of
    `config.size_multiple`."""
    row_pixels: int | None = None
    """How many pixels a row counts as in the blocks of a CPU (`fastdiff.runtime.blocks`); None:
    those of x."""
    denoises: bool = True
    """Whether `body` returns a prediction for x; False for a classifier of noisy samples."""
    num_controls: int = 0
    """Number of ControlNets that `body_controlled` can use."""

    def embed(self, t: Tensor, y: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """Combine everything that conditions the blocks into one vector per sample, (N, E).

        It does not depend on x, so the runtime computes it once for all rows of a sampler's table.

        t: (N,) timesteps, integer or real. y: (N,) int64 class labels, or floating-point weights
        (N, rows of the label embedding) of a mixture of classes. added: (N, A).
        """
        raise NotImplementedError

    def project_context(self, context: Tensor, mask: Tensor | None = None) -> Context:
        """Compute the part of `body` that depends on the context tokens, but not on x or t.

        context: (N, T, context_dim). mask: (N, T) bool, False for tokens that nothing may attend
        to. Returns nested lists of tensors whose first dimension is N.

        Raises:
            ValueError: the model has no context, or no mask.
        """
        raise ValueError("context must be None for a model without context; leave it out")

    def body(self, x: Tensor, emb: Tensor, context: Tensor | Context | None = None) -> Tensor:
        """The network after the embedding.

        x: (N, in_channels, *spatial). emb: (N, E), the result of `embed`. context: (N, T, D), or
        the result of `project_context` for it. Returns (N, out_channels, *spatial).
        """
        raise NotImplementedError

    @property
    def shares_prefix(self) -> bool:
        """Whether `body_of_pairs` computes less than `body`."""
        return False

    def body_of_pairs(self, x: Tensor, emb: Tensor, context: Tensor | Context) -> Tensor:
        """`body` for two contexts per row: what comes before the first block that reads the context
        is computed once for both, as for the two halves of classifier-free guidance.

        x: (N, in_channels, *spatial). emb: (N, E). context: of 2 N rows, two in turn for each row
        of x. Returns (2 N, out_channels, *spatial).
        """
        raise NotImplementedError

    def body_controlled(
        self,
        x: Tensor,
        emb: Tensor,
        context: Context,
        used: Sequence[int],
        hints: Sequence[Tensor],
        scales: Tensor,
    ) -> Tensor:
        """`body` with ControlNets (Zhang et al. 2023, arXiv 2302.05543).

        x, emb, context: as for `body`; context is projected. used: indices of the ControlNets,
        0 .. num_controls - 1. hints: one per index, (N, C', *spatial), the embedded picture.
        scales: (N, num_controls), fp32 or fp64, the strengths; those not used are not read.
        """
        raise NotImplementedError

    @property
    def branches(self) -> int:
        """Number of places at which `body_keeping` and `shallow` can part the network; 0: none."""
        return 0

    def deep_shape(self, branch: int, sides: Sequence[int]) -> tuple[int, ...]:
        """Shape (C, *spatial) of the deep features of a branch, for x with these sides."""
        raise NotImplementedError

    def body_keeping(
        self, x: Tensor, emb: Tensor, context: Tensor | Context | None, branches: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """`body`, and the deep features of some branches, (N, *deep_shape), for `shallow`.

        Branch 0 leaves the fewest blocks to `shallow`.
        """
        raise NotImplementedError

    def shallow(
        self, x: Tensor, emb: Tensor, context: Tensor | Context | None, branch: int, deep: Tensor
    ) -> Tensor:
        """`body` with given deep features of a branch in place of the blocks that compute them (Ma
        et al. 2023, arXiv 2312.00858). deep: (N, *deep_shape(branch, sides))."""
        raise NotImplementedError

    def together(self) -> list[list[Tensor]]:
        """Lists of parameters that `pack` moves next to each other in memory, so that one product
        serves for all of a list."""
        return []

    def pack(self) -> None:
        """Rearrange parameters in memory, in place, for inference with fewer launches on a GPU."""

    def check_input(self, x: Tensor, context: Tensor | Context | None) -> None:
        """Raise ValueError unless `body` can run on x and this context."""

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        context: Tensor | Context | None = None,
        y: Tensor | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """One evaluation of the network.

        Args:
            x: (N, in_channels, *spatial), any strides; sides multiples of `config.size_multiple`.
            t: () or (N,), integer or real timesteps.
            context: (N, T, context_dim), or the result of `project_context` for it.
            y: (N,) int64 class labels; the null class is `config.num_classes`.
            added: (N, added_condition_dim).

        Returns:
            (N, out_channels, *spatial), dtype of x.

        Raises:
            ValueError: a size does not fit, or a condition is missing or not supported.
        """
        self.check_input(x, context)
        if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x)):
            raise ValueError(
                f"t must be () or ({len(x)},), got {tuple(t.shape)}; pass one timestep per sample"
            )
        return self.body(x, self.embed(t.expand(len(x)), y, added), context)


def check_image(config: NetworkConfig, x: Tensor, context: Tensor | Context | None) -> None:
    """Check what `Network.body` is given, for networks on images.

    x: (N, in_channels, H, W).

    Raises:
        ValueError: another shape, or a context that is missing or superfluous.
    """
    if x.ndim != 4 or x.shape[1] != config.in_channels:
        raise ValueError(
            f"x must be (N, {config.in_channels}, H, W), got {tuple(x.shape)}; "
            "check that the model and the image or latent belong together"
        )
    factor = config.size_multiple
    if any(side % factor or side == 0 for side in x.shape[2:]):
        raise ValueError(
            f"H and W of x must be positive multiples of {factor}, "
            f"got {x.shape[2]} x {x.shape[3]}; resize or pad the input"
        )
    if (context is None) != (config.context_dim is None):
        expected = f"(N, T, {config.context_dim})" if config.context_dim is not None else "None"
        got = "None" if context is None else "one"
        raise ValueError(f"context must be {expected} for this model, got {got}; check context=")


def check_conditions(
    config: NetworkConfig, samples: int, y: Tensor | None, added: Tensor | None
) -> None:
    """Check the conditions that `Network.embed` is given in addition to the timesteps.

    Raises:
        ValueError: a condition is missing, not supported, or of the wrong shape.
    """
    width = config.added_condition_dim
    if y is not None and y.is_floating_point() and config.num_classes is not None:
        weights = samples, config.num_classes + config.null_class
        if y.shape != weights:
            raise ValueError(
                f"y must be weights of shape {weights}, got {tuple(y.shape)}; pass one weight per "
                "row of the label embedding"
            )
        y = y[:, 0]
    for name, value, wanted, shape, kind in (
        ("y", y, config.num_classes, (samples,), "int64 class labels"),
        ("added", added, width, (samples, width), "vectors"),
    ):
        if wanted is None and value is not None:
            raise ValueError(
                f"{name} must be None for this model, got {tuple(value.shape)}; leave it out"
            )
        if wanted is not None and (value is None or value.shape != shape):
            got = None if value is None else tuple(value.shape)
            raise ValueError(f"{name} must be {kind} of shape {shape}, got {got}; pass {name}=")


def check_no_mask(mask: Tensor | None) -> None:
    """Raise ValueError if there is a mask, for networks that attend to all tokens."""
    if mask is not None:
        raise ValueError(
            f"mask must be None for this model, whose context has no padding, got "
            f"{tuple(mask.shape)}; leave it out"
        )


def embed_labels(table: nn.Embedding, y: Tensor) -> Tensor:
    """Look up rows of a label embedding, or mix them. y: as in `Network.embed`. Returns (N, E)."""
    if y.is_floating_point():
        mixed: Tensor = y.to(table.weight) @ table.weight
        return mixed
    rows: Tensor = table(y)
    return rows


def map_context(function: Callable[..., Tensor], *contexts: Context) -> Context:
    """Apply a function to the tensors at the same position in each context.

    >>> a, b = [[torch.zeros(1, 2)]], [[torch.ones(1, 2)]]
    >>> map_context(lambda *same: torch.cat(same), a, b)
    [[tensor([[0., 0.],
            [1., 1.]])]]
    """
    return [
        function(*same) if isinstance(same[0], Tensor) else map_context(function, *same)
        for same in zip(*contexts, strict=True)
    ]


class Family(NamedTuple):
    """An architecture: its config class and its network class."""

    config: type[Any]
    network: type[Network]


NETWORKS: dict[str, Family] = {}
"""Kind -> family, for the families imported so far; `network_family` imports the others."""

SomeNetwork = TypeVar("SomeNetwork", bound=type[Network])


def register(config: type[Any]) -> Callable[[SomeNetwork], SomeNetwork]:
    """Class decorator: register a network under the name of its file."""

    def add(network: SomeNetwork) -> SomeNetwork:
        kind = network.__module__.rpartition(".")[2]
        assert kind not in NETWORKS, f"{kind} is registered twice; use one file per family"
        NETWORKS[kind] = Family(config, network)
        return network

    return add


def network_family(kind: str) -> Family:
    """The family of a kind such as "unet"; its file is imported if necessary.

    Raises:
        ValueError: there is no such family.
    """
    # The kind comes from an untrusted file, so only modules of this folder may be imported.
    if kind not in NETWORKS and re.fullmatch(r"[a-z][a-z0-9_]*", kind):
        module = f"{__package__}.{kind}"
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    if kind not in NETWORKS:
        for found in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
            importlib.import_module(f"{__package__}.{found.name}")
        raise ValueError(
            f"unknown kind of denoiser {kind!r:.60}; expected one of {', '.join(sorted(NETWORKS))}"
        )
    return NETWORKS[kind]


def kind_of(config: NetworkConfig) -> str:
    """The kind of the family that a config belongs to.

    Raises:
        ValueError: no registered family uses this class of config.
    """
    for kind, family in NETWORKS.items():
        if type(config) is family.config:
            return kind
    raise ValueError(
        f"no registered network uses the config class {type(config).__name__}; decorate the "
        "network with fastdiff.models.network.register"
    )


def check_patches(config: Any, require: Callable[[bool, str], None]) -> None:
    """Checks shared by the configs of transformers on patches.

    require: called as require(condition, message); raises ValueError if the condition is false.
    """
    for name in ("in_channels", "out_channels", "width", "depth", "num_heads", "patch_size"):
        value = getattr(config, name)
        require(value > 0, f"{name} must be positive, got {value}")
    require(
        config.width % config.num_heads == 0,
        f"num_heads must divide width, got {config.num_heads} and {config.width}",
    )
    require(
        config.sample_size > 0 and config.sample_size % config.patch_size == 0,
        f"sample_size must be a multiple of patch_size, got {config.sample_size} and "
        f"{config.patch_size}",
    )
    require(
        0 < config.mlp_ratio < float("inf") and config.hidden > 0,
        f"mlp_ratio must be positive, got {config.mlp_ratio}",
    )
    require(
        config.num_classes is None or config.num_classes > 0,
        f"num_classes must be None or positive, got {config.num_classes}",
    )
    require(
        not config.null_class or config.num_classes is not None,
        "null_class needs num_classes, got None",
    )
    require(
        not config.learned_sigma or config.out_channels % 2 == 0,
        f"out_channels must be even with learned_sigma, got {config.out_channels}",
    )
    require(0 <= config.dropout < 1, f"dropout must be in [0, 1), got {config.dropout}")
