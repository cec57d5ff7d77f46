"""The evaluation of a network in blocks: its results, its blocks, its gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from fastdiff.models.network import Network
from fastdiff.models.unet import UNet
from fastdiff.runtime.blocks import RowBlocks, block_size, in_blocks, row_blocks
from fastdiff.runtime.conditions import Condition, class_conditions
from fastdiff.runtime.denoiser import Denoiser, Turn
from fastdiff.runtime.graphs import rounded_rows
from fastdiff.runtime.prepare import prepare
from tests.support.parity import assert_gradient_parity
from tests.support.tiny import UNET, randomize, tiny_unet

CPU = torch.device("cpu")
TIMES = torch.tensor([981.0, 500.5, 0.0])
TEXT = replace(UNET, context_dim=24, num_classes=None, null_class=False, added_condition_dim=5)


@dataclass(frozen=True)
class PointsConfig:
    in_channels: int = 2
    out_channels: int = 2
    learned_sigma: bool = False
    num_classes: int | None = None
    null_class: bool = False
    context_dim: int | None = None
    added_condition_dim: int | None = None
    size_multiple: int = 1
    num_blocks: int = 1


class Points(Network):
    """A minimal network, for points in the plane and so without spatial sides."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PointsConfig()
        self.time, self.hidden, self.out = nn.Linear(1, 16), nn.Linear(2, 16), nn.Linear(16, 2)

    def embed(self, t: Tensor, y: None = None, added: None = None) -> Tensor:
        return self.time(t[:, None].to(self.time.weight.dtype) / 1000)

    def body(self, x: Tensor, emb: Tensor, context: None = None) -> Tensor:
        return self.out(torch.tanh(self.hidden(x) + emb))


def images(count: int, channels: int = 3, side: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def conditions_of(network: UNet, count: int) -> tuple[list[Condition], list[Condition]]:
    if network.config.context_dim is None:
        conditions, unconditional = class_conditions(
            network.config, [(None, 0, 1, 2, 3)[index % 5] for index in range(count)], guided=True
        )
        assert unconditional is not None
        return conditions, unconditional
    generator = torch.Generator().manual_seed(3)
    width = network.config.added_condition_dim
    made = [
        Condition(
            context=torch.randn(1, 7, 24, generator=generator),
            added=None if width is None else torch.randn(1, width, generator=generator),
        )
        for _ in range(4)
    ]
    return [made[1 + index % 3] for index in range(count)], [made[0]] * count


def plainly(network: UNet, x: Tensor, t: float, conditions: Sequence[Condition]) -> Tensor:
    """Call the network directly, without any of the code under test."""
    dtype, labels = next(network.parameters()).dtype, [c.label for c in conditions]
    contexts = [c.context for c in conditions if c.context is not None]
    added = [c.added for c in conditions if c.added is not None]
    return network(
        x.to(dtype),
        torch.full((len(x),), t, dtype=torch.float64),
        y=None if None in labels else torch.tensor(labels),
        context=torch.cat(contexts).to(dtype) if contexts else None,
        added=torch.cat(added).to(dtype) if added else None,
    )


def evaluate(
    network: UNet, x: Tensor, row: int, guided: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The conditional predictions, and the unconditional ones for guided samples."""
    denoiser = Denoiser(network, x.shape[2:])
    turns = [
        Turn(place, denoiser.add(TIMES, condition, other), row, guides)
        for place, (condition, other, guides) in enumerate(
            zip(*conditions_of(network, len(x)), guided, strict=True)
        )
    ]
    batch = denoiser.batch(turns, len(x))
    out = denoiser(x, batch)
    assert len(out) == batch.rows
    places = [-1] * len(x) if batch.uncond is None else batch.uncond.tolist()
    assert [place >= 0 for place in places] == list(guided)
    return out[batch.cond], [out[place] if place >= 0 else None for place in places]


@pytest.mark.parametrize("config", [UNET, TEXT], ids=["classes", "context"])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 13, 21])
def test_the_denoiser_agrees_with_the_network(config, count: int) -> None:
    """Blocks, padding, and precomputed embeddings and contexts give the result of UNet.forward."""
    unet, x = prepare(tiny_unet(config), dtype=torch.float64), images(count).double()
    conditions, unconditional = conditions_of(unet, count)
    for row, t in enumerate(TIMES.tolist()):
        wanted = plainly(unet, x, t, conditions), plainly(unet, x, t, unconditional)
        assert (wanted[0] - wanted[1]).flatten(1).abs().amax(1).max() > 1e-3 or count == 1
        for guided in ([False] * count, [True] * count, [i % 3 == 0 for i in range(count)]):
            cond, uncond = evaluate(unet, x, row, guided)
            torch.testing.assert_close(cond, wanted[0], rtol=1e-9, atol=1e-9)
            for place, found in enumerate(uncond):
                if found is not None:
                    torch.testing.assert_close(found, wanted[1][place], rtol=1e-9, atol=1e-9)


PLAIN_TEXT = replace(TEXT, added_condition_dim=None)
"""Text that is not in the embedding, so both rows of a guided sample begin alike."""


@pytest.mark.parametrize("rounded", [None, rounded_rows], ids=["blocks", "graphs"])
@pytest.mark.parametrize("config", [PLAIN_TEXT, TEXT], ids=["shares", "added vector"])
def test_guided_rows_share_what_precedes_the_context(config, rounded) -> None:
    """The first residual block sees one row per guided sample, and all predictions are right.

    At 24 x 24 a guided sample is a block of its own on a CPU.
    """
    unet, x = prepare(tiny_unet(config), dtype=torch.float64), images(3, side=24).double()
    conditions, unconditional = conditions_of(unet, 3)
    seen: list[int] = []
    unet.res_blocks()[0].norm1.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for guided in ([True] * 3, [True, False, True], [False] * 3):
        denoiser = Denoiser(unet, x.shape[2:], rounded=rounded)
        turns = [
            Turn(place, denoiser.add(TIMES, condition, other), 1, guides)
            for place, (condition, other, guides) in enumerate(
                zip(conditions, unconditional, guided, strict=True)
            )
        ]
        seen.clear()
        batch = denoiser.batch(turns, 3)
        out = denoiser(x, batch)
        assert len(out) == batch.rows
        wanted = [plainly(unet, x, TIMES[1].item(), own) for own in (conditions, unconditional)]
        torch.testing.assert_close(out[batch.cond], wanted[0], rtol=1e-9, atol=1e-9)
        if batch.uncond is not None:
            for place in (place for place in range(3) if guided[place]):
                found = out[batch.uncond[place]]
                torch.testing.assert_close(found, wanted[1][place], rtol=1e-9, atol=1e-9)
        rows, whole = 3 + sum(guided), all(guided)
        shares = config is PLAIN_TEXT and (any(guided) if rounded is None else whole)
        expected = 3 if shares else rows
        assert sum(seen[: len(batch.blocks)]) == expected, (guided, seen)


def test_shared_rows_keep_their_bits() -> None:
    """On a CPU a guided sample has the same bits alone and beside others, guided or not."""
    unet, x = prepare(tiny_unet(PLAIN_TEXT)), images(5, side=24)
    alone, _ = evaluate(unet, x[:1], 1, [True])
    for guided in ([True] * 5, [True, False, False, True, False]):
        cond, _ = evaluate(unet, x, 1, guided)
        assert torch.equal(cond[0], alone[0])


def test_without_blocks_bits_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that tests of bits can fail: without blocks, a batch differs from each sample alone.

    The network is wider than the tiny one, since oneDNN treats the smallest convolutions alike.
    """
    unet, x = prepare(tiny_unet(replace(UNET, model_channels=64, head_dim=64))), images(7)

    def run(count: int) -> Tensor:
        with torch.no_grad():
            return evaluate(unet, x[:count], 1, [False] * count)[0]

    in_a_block = run(7)
    assert torch.equal(run(1)[0], in_a_block[0])
    monkeypatch.setattr("fastdiff.runtime.denoiser.row_blocks", lambda *_: None)
    as_it_comes = run(7)
    torch.testing.assert_close(as_it_comes, in_a_block, rtol=1e-4, atol=1e-4)
    if torch.equal(run(1)[0], as_it_comes[0]):
        pytest.skip("this machine's convolutions do not depend on the batch at this size")


@pytest.mark.parametrize(
    ("sides", "rows"),
    [
        ((8, 8), RowBlocks(16, 16)),
        ((4, 4), RowBlocks(16, 16)),
        ((16, 16), RowBlocks(4, 4)),
        ((17, 17), RowBlocks(2, 1)),
        ((64, 64), RowBlocks(2, 1)),
        ((), RowBlocks(16, 16)),
        ((128,), RowBlocks(8, 8)),
        ((8, 8, 8), RowBlocks(2, 1)),
    ],
    ids=str,
)
def test_blocks_depend_on_the_size_alone(sides: tuple[int, ...], rows: RowBlocks) -> None:
    assert row_blocks(sides, CPU) == rows
    assert row_blocks(sides, torch.device("cuda")) is None
    if len(sides) == 2:
        assert block_size(*sides, CPU) == max(rows.guided // 2, 1)
        assert block_size(*sides, torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("side", "guided", "blocks"),
    [
        (8, [True] * 64, [16] * 8),  # 128 rows, without padding
        (8, [True] * 3 + [False] * 9, [16]),  # 15 rows, guided and unguided together
        (8, [False] * 17, [16, 16]),
        (8, [False], [16]),
        (24, [False], [1]),  # a single large image needs only one row
        (24, [False, True, False], [1, 2, 1]),
    ],
)
def test_which_blocks_are_evaluated(side: int, guided: list[bool], blocks: list[int]) -> None:
    unet, seen = tiny_unet(), []
    body = unet.body

    def counted(x: Tensor, *others: Tensor) -> Tensor:
        assert x.is_contiguous(memory_format=torch.channels_last)
        seen.append(len(x))
        return body(x, *others)

    unet.body = counted
    with torch.no_grad():
        evaluate(unet, images(len(guided), side=side), 0, guided)
    assert sorted(seen) == sorted(blocks)


def test_embeddings_and_contexts_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each (timesteps, condition) takes one call of the table's length, and is freed after use."""
    unet = prepare(tiny_unet(TEXT))
    calls: list[tuple[str, int]] = []
    for name in ("embed", "project_context"):
        method = getattr(UNet, name)

        def counted(self, first, *others, name=name, method=method):
            calls.append((name, len(first)))
            return method(self, first, *others)

        monkeypatch.setattr(UNet, name, counted)
    denoiser = Denoiser(unet, (8, 8))
    conditions, unconditional = conditions_of(unet, 6)  # three different ones, and a shared one
    guides = [denoiser.add(TIMES, *pair) for pair in zip(conditions, unconditional, strict=True)]
    assert sorted(calls) == [("embed", 3)] * 4 + [("project_context", 1)] * 4
    denoiser.add(TIMES[:2], conditions[0])
    assert calls[8:] == [("embed", 2)]
    for guide in guides[1:]:
        denoiser.drop(guide)
    guides.append(denoiser.add(TIMES, conditions[0], unconditional[0]))
    assert len(calls) == 9
    denoiser.drop(guides[0])
    denoiser.drop(guides[-1])
    denoiser.add(TIMES, conditions[0])
    assert calls[9:] == [("embed", 3)]  # its context is still in use
    capacity = len(denoiser.embeddings.rows)
    for _ in range(20):
        denoiser.drop(denoiser.add(TIMES, conditions[1], unconditional[1]))
    assert len(denoiser.embeddings.rows) == capacity


def test_a_condition_that_fails_leaves_nothing_behind() -> None:
    denoiser = Denoiser(prepare(tiny_unet()), (8, 8))
    with pytest.raises(ValueError, match="y must be int64 class labels"):
        denoiser.add(TIMES, Condition(label=1), Condition())
    assert (TIMES.double().numpy().tobytes(), Condition(label=1).key) not in denoiser.embeddings


@pytest.mark.parametrize("config", [UNET, TEXT], ids=["classes", "context"])
@pytest.mark.parametrize("count", [3, 11])
def test_gradients_with_respect_to_x(config, count: int) -> None:
    """The gradient of a weighted sum of predictions, as in CLIP guidance, agrees with that of the
    network called directly, in fp64."""
    network = tiny_unet(config)
    conditions, _ = conditions_of(network, count)
    weights, guided = images(count, seed=5), [i % 2 == 0 for i in range(count)]
    prepared, exact = prepare(copy.deepcopy(network)), copy.deepcopy(network).double()
    with torch.no_grad():
        evaluate(prepared, images(count), 1, guided)  # so that weights are packed

    def gradient(function: Callable[[Tensor], Tensor], seed: int, dtype: torch.dtype) -> Tensor:
        leaf = images(count, seed=seed).to(dtype).requires_grad_()
        (weights * function(leaf)).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    def plain(module: UNet) -> Callable[[Tensor], Tensor]:
        return lambda x: plainly(module, x, float(TIMES[1]), conditions)

    assert_gradient_parity(
        lambda seed: gradient(lambda x: evaluate(prepared, x, 1, guided)[0], seed, torch.float32),
        lambda seed: gradient(plain(exact), seed, torch.float64),
        lambda seed: gradient(plain(network), seed, torch.float32),
        draws=4,
    )
    x = images(count).double()
    slopes = gradient(lambda x: evaluate(exact, x, 1, guided)[0], 1, torch.float64)
    direction, step = images(count, seed=6).double(), 1e-6
    with torch.no_grad():
        low, high = (
            (weights * evaluate(exact, x + s * step * direction, 1, guided)[0]).sum()
            for s in (-1, 1)
        )
    slope = (high - low) / (2 * step)
    torch.testing.assert_close(slope, (direction * slopes).sum(), rtol=1e-6, atol=1e-6)


def test_gradients_of_guided_samples_and_extra_channels() -> None:
    unet = prepare(tiny_unet(replace(UNET, in_channels=5)), dtype=torch.float64)
    x, extra = images(2).double().requires_grad_(), images(2, 2, seed=4).double()
    conditions, unconditional = conditions_of(unet, 2)
    denoiser = Denoiser(unet, (8, 8))
    turns = [
        Turn(i, denoiser.add(TIMES, conditions[i], unconditional[i]), 2, True) for i in range(2)
    ]
    batch = denoiser.batch(turns, 2)
    out = denoiser(x, batch, extra)
    assert batch.uncond is not None
    (3 * out[batch.cond] - 2 * out[batch.uncond]).square().sum().backward()
    leaf = x.detach().clone().requires_grad_()
    joined = torch.cat([leaf, extra], dim=1)
    both = [plainly(unet, joined, 0.0, kind) for kind in (conditions, unconditional)]
    (3 * both[0] - 2 * both[1]).square().sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad, rtol=1e-9, atol=1e-9)


def test_networks_without_spatial_sides() -> None:
    network = randomize(Points(), 1).double()
    denoiser, x = Denoiser(network, ()), torch.randn(5, 2, dtype=torch.float64)
    guide = denoiser.add(TIMES, Condition())
    batch = denoiser.batch([Turn(i, guide, 1, False) for i in range(5)], 5)
    out = denoiser(x, batch)[batch.cond]
    torch.testing.assert_close(out, network.body(x, network.embed(TIMES[1].expand(5))))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_in_blocks_pads_and_crops(count: int) -> None:
    x, seen = torch.arange(float(count)).reshape(count, 1, 1, 1), []

    def doubled(piece: Tensor) -> Tensor:
        seen.append(len(piece))
        return 2 * piece.flatten(1)

    assert in_blocks(doubled, 3, x).flatten().tolist() == [2 * v for v in range(count)]
    assert seen == [3] * -(-count // 3)
    assert in_blocks(doubled, None, x).flatten().tolist() == [2 * v for v in range(count)]
    assert seen[-1] == count
