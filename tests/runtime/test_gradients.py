"""Guidance by gradients in the engine: as in the loop, and with the same bits as alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.diffusion.gradients import Pull, Similarity, by_gradients, loss_pull
from fastdiff.diffusion.samplers import SamplerTable, build_table
from fastdiff.diffusion.sampling import sample
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.models.classifier import Classifier, ClassifierConfig
from fastdiff.models.contrastive import Contrastive, ContrastiveConfig
from fastdiff.models.text_transformer import TextTransformerConfig
from fastdiff.models.unet import UNet
from fastdiff.runtime.conditions import Condition
from fastdiff.runtime.denoiser import Denoiser, Turn
from fastdiff.runtime.engine import Engine, Request
from fastdiff.runtime.prepare import prepare
from fastdiff.runtime.run import run
from tests.support.tiny import UNET, randomize, tiny_unet

SHAPE = (3, 4, 4)
SCHEDULE = NoiseSchedule(ScheduleConfig())
CLASSES = [Condition(label=label) for label in range(5)]  # 4 is the null class
CONFIG = ClassifierConfig(
    in_channels=3,
    num_classes=4,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_depth=(0, 1),
    sample_size=4,
    head_dim=32,
    norm_groups=8,
)


@pytest.fixture(scope="module")
def unet() -> UNet:
    """So wide that oneDNN's convolutions depend on the batch size."""
    return prepare(tiny_unet(replace(UNET, model_channels=32, head_dim=32)))


def new_classifier(seed: int) -> Classifier:
    network = Classifier(CONFIG)
    randomize(network, seed)
    return prepare(network)


@pytest.fixture(scope="module")
def classifiers() -> list[Classifier]:
    return [new_classifier(3), new_classifier(4)]


@pytest.fixture(scope="module")
def captions() -> list[Similarity]:
    """Three captions under one contrastive net of noised pictures."""
    text = TextTransformerConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    net = Contrastive(ContrastiveConfig(text=text, widths=(16, 32), dim=8, noised=True))
    randomize(net, 5)
    net = prepare(net)
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0], [1, 9, 8, 2]])
    return [Similarity(net.embed_images, net.scale * row) for row in net.embed_text(ids)]


def darkness(x0: Tensor) -> Tensor:
    return x0.square().mean(dim=(1, 2, 3))


def left_half(x0: Tensor) -> Tensor:
    return (x0[..., :2] - 0.5).abs().sum(dim=(1, 2, 3))


def table(name: str = "ddim", steps: int = 4, **options: Any) -> SamplerTable:
    return build_table(name, SCHEDULE, steps, **{"guidance_scale": 2.0, **options})


def request(seed: int, rows: SamplerTable, pulls: tuple[Pull, ...], **more: Any) -> Request:
    generator = torch.Generator().manual_seed(seed)
    return Request(
        table=rows,
        x=torch.randn(SHAPE, generator=generator),
        seed=seed,
        condition=CLASSES[seed % 4],
        unconditional=CLASSES[4],
        pulls=pulls,
        tag=seed,
        **more,
    )


def mixed(classifiers: list[Classifier], count: int) -> Iterator[Request]:
    """Requests with any sampler and number of steps; with two classifiers at any scale and class,
    losses on x and on x0, several at once, or none."""
    rng = random.Random(count)
    tables = [
        table("ddim", 3),
        table("ddpm", 5, guidance_scale=1.0),
        table("ddpm", 4, clamp=1.0, guidance_rescale=0.5),
        table("dpmpp-2m-sde", 4, guidance_interval=(0, 2)),
        table("heun", 2, guidance_scale=1.0),
    ]
    for seed in range(count):
        choices = [
            Pull(
                objective=rng.choice(classifiers).log_prob,
                scale=rng.uniform(0.5, 3),
                label=rng.randrange(4),
            ),
            loss_pull(darkness, rng.uniform(1, 20)),
            loss_pull(left_half, rng.uniform(0.1, 1), on="x"),
        ]
        pulls = tuple(rng.sample(choices, rng.choice((0, 1, 1, 2, 3))))
        more: dict[str, Any] = {}
        if rng.random() < 0.2:
            drawn = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(100 + seed))
            more = {"mask": (drawn[0, :1] > 0).float(), "known": drawn[1], "noise": drawn[2]}
        yield request(seed, rng.choice(tables), pulls, **more)


def test_every_request_has_the_same_bits_as_alone(
    unet: UNet, classifiers: list[Classifier]
) -> None:
    """Whatever guides its neighbours, and whichever slots they are in."""
    requests = list(mixed(classifiers, 24))
    assert {bool(wanted.pulls) for wanted in requests} == {True, False}
    together = {result.request.tag: result.x for result in run(unet, requests, slots=7)}
    assert len({x.numpy().tobytes() for x in together.values()}) == len(requests)
    for wanted in requests:
        (alone,) = run(unet, [wanted], slots=3)
        assert torch.equal(alone.x, together[wanted.tag]), wanted.tag


def test_captions_of_one_batch_do_not_mix(
    unet: UNet, classifiers: list[Classifier], captions: list[Similarity]
) -> None:
    """Requests with different captions at any scale, beside a classifier or unguided neighbours,
    have the bits that they have alone."""
    rng, requests = random.Random(7), []
    tables = [table("ddim", 3), table("ddpm", 4, guidance_scale=1.0), table("heun", 2)]
    for seed in range(15):
        pulls: tuple[Pull, ...] = ()
        if seed % 5:
            pulls = (Pull(objective=rng.choice(captions), scale=rng.uniform(1, 4)),)
        if seed % 5 == 4:
            pulls += (Pull(objective=classifiers[0].log_prob, scale=1.0, label=1),)
        requests.append(request(seed, rng.choice(tables), pulls))
    together = {result.request.tag: result.x for result in run(unet, requests, slots=6)}
    for wanted in requests:
        (alone,) = run(unet, [wanted], slots=3)
        assert torch.equal(alone.x, together[wanted.tag]), wanted.tag
        (plain,) = run(unet, [replace(wanted, pulls=())], slots=3)
        assert torch.equal(alone.x, plain.x) == (not wanted.pulls)


def test_a_request_that_moves_keeps_its_bits(unet: UNet, classifiers: list[Classifier]) -> None:
    pulls = (Pull(objective=classifiers[0].log_prob, scale=2.0, label=1), loss_pull(darkness, 9.0))
    wanted = request(5, table("dpmpp-2m", 5), pulls)
    (expected,) = run(unet, [wanted])
    engine = Engine(unet, shape=SHAPE, slots=4, gradients="x0")
    others = [engine.submit(request(seed, table(), pulls)) for seed in (1, 2)]
    ticket = engine.submit(wanted)
    engine.step()
    engine.cancel(others[0])
    engine.move(ticket, 3)
    left = {}
    while engine.busy:
        left |= {result.ticket: result for result in engine.step()}
    assert torch.equal(left[ticket].x, expected.x)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun"])
def test_the_engine_equals_the_loop(name: str, unet: UNet, classifiers: list[Classifier]) -> None:
    """Each request at its own scale and class, by a classifier and a loss through the denoiser;
    in fp64, because small differences grow in a network with random weights."""
    unet, classifiers = copy.deepcopy((unet, classifiers))
    for network in (unet, *classifiers):
        prepare(network, dtype=torch.float64)
    rows = table(name, clamp=1.5)
    pulls = [
        (
            Pull(objective=classifiers[0].log_prob, scale=1.0 + label, label=label),
            loss_pull(darkness, 5.0 * label),
        )
        for label in range(4)
    ]
    requests = [request(seed, rows, own) for seed, own in enumerate(pulls)]
    found = torch.stack([result.x for result in _in_order(run(unet, requests, slots=4))])

    denoiser = Denoiser(unet, SHAPE[1:])
    guides = [denoiser.add(rows.timesteps, CLASSES[label], CLASSES[4]) for label in range(4)]

    def predict(x: Tensor, row: int) -> Tensor:
        turns = [Turn(i, guide, row, True) for i, guide in enumerate(guides)]
        batch = denoiser.batch(turns, 4)
        assert batch.uncond is not None
        return denoiser(x, batch)[torch.cat([batch.uncond, batch.cond])]

    start = torch.stack([wanted.x for wanted in requests]).double()
    expected = sample(predict, rows, start, range(4), guidance=[by_gradients(pulls)])
    plain = sample(predict, rows, start, range(4))
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def _in_order(results: Any) -> list[Any]:
    return sorted(results, key=lambda result: result.request.tag)


def test_stronger_guidance_raises_the_probability_of_its_class(
    unet: UNet, classifiers: list[Classifier]
) -> None:
    def log_prob(scale: float) -> float:
        pull = Pull(objective=classifiers[0].log_prob, scale=scale, label=2)
        requests = [request(seed, table("ddim", 10), (pull,)) for seed in range(6)]
        x = torch.stack([result.x for result in run(unet, requests)])
        t, y = torch.zeros(6), torch.full((6,), 2)
        return float(classifiers[0].log_prob(x, t, y).mean())

    assert log_prob(0.0) < log_prob(0.3) < log_prob(1.0)


def test_guidance_with_a_mask_keeps_the_known_part(
    unet: UNet, classifiers: list[Classifier]
) -> None:
    mask = torch.zeros(1, 4, 4)
    mask[..., :2] = 1
    known = torch.full(SHAPE, 0.3)
    pull = Pull(objective=classifiers[0].log_prob, scale=3.0, label=0)
    more = {"mask": mask, "known": known, "noise": torch.randn(SHAPE)}
    (result,) = run(unet, [request(0, table(), (pull,), **more)])
    assert torch.equal(result.x[..., 2:], known[..., 2:])
    assert (result.x[..., :2] - 0.3).abs().max() > 0.1


def test_a_gradient_that_is_not_finite_fails_only_its_request(unet: UNet) -> None:
    def broken(x0: Tensor) -> Tensor:
        return torch.sqrt(x0 * 0).sum(dim=(1, 2, 3)) * torch.nan

    engine = Engine(unet, shape=SHAPE, slots=2, gradients="x0")
    bad = engine.submit(request(0, table(), (loss_pull(broken),)))
    good = engine.submit(request(1, table(), (loss_pull(darkness),)))
    results = {}
    while engine.busy:
        results |= {result.ticket: result for result in engine.step()}
    assert "NaN or infinity" in str(results[bad].error)
    assert results[good].error is None


def test_what_does_not_fit_is_refused(unet: UNet, classifiers: list[Classifier]) -> None:
    pull = Pull(objective=classifiers[0].log_prob, scale=1.0, label=0)
    engine = Engine(unet, shape=SHAPE, slots=2, gradients="x0")
    classes = Engine(unet, shape=SHAPE, slots=2, gradients="x")
    plain = Engine(unet, shape=SHAPE, slots=2)
    for wrong, pulls, got in ((plain, (pull,), "x"), (engine, (pull,), "x"), (classes, (), "none")):
        with pytest.raises(ValueError, match=f"requests with gradients .*, got '{got}'"):
            wrong.submit(request(0, table(), pulls))
    with pytest.raises(ValueError, match="must be differentiable in the sample"):
        engine.submit(request(0, table(), (loss_pull(lambda x: darkness(x.detach())),)))
    with pytest.raises(ValueError, match="one number per sample"):
        engine.submit(request(0, table(), (loss_pull(lambda x: x.mean()),)))
    for label in (-1, 4):
        with pytest.raises(ValueError, match=f"must be a class from 0 to 3, got {label}"):
            Pull(objective=classifiers[0].log_prob, scale=1.0, label=label)
    assert engine.busy == classes.busy == 0
