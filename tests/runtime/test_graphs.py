"""Steps as graphs, on a substitute that records operations by address (`tests.support.tape`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.diffusion import sampling
from fastdiff.kernels import SAMPLER_NOISE, philox_normal, plans
from fastdiff.kernels.choose import ordinary
from fastdiff.models.network import Network
from fastdiff.runtime import denoiser, graphs
from fastdiff.runtime.denoiser import Denoiser
from fastdiff.runtime.engine import Engine, Request, Result
from fastdiff.runtime.graphs import StepGraphs, graphs_for, objection, rounded_rows
from fastdiff.runtime.prepare import prepare
from fastdiff.runtime.run import Engines, run
from tests.runtime.test_engine import SHAPE, TEXT, finish, random_requests, request, table
from tests.support.tape import HostRead, Idle, Tape, no_host_reads
from tests.support.tiny import tiny_unet


@pytest.fixture(scope="module", params=[False, True], ids=["classes", "text"])
def network(request: pytest.FixtureRequest) -> Network:
    return prepare(tiny_unet(TEXT) if request.param else tiny_unet())


def engine(network: Network, recorder: StepGraphs, slots: int = 5) -> Engine:
    tokens = 7 if network.config.context_dim else 0
    return Engine(network, shape=SHAPE, slots=slots, tokens=tokens, graphs=recorder)


def plain_engine(network: Network, slots: int = 5, shape: tuple[int, int, int] = SHAPE) -> Engine:
    """An engine without graphs that evaluates as many network rows as one with graphs."""
    tokens = 7 if network.config.context_dim else 0
    made = Engine(network, shape=shape, slots=slots, tokens=tokens)
    made._denoiser = Denoiser(network, shape[1:], rounded=rounded_rows)
    return made


def all_of(made: Engine, requests: list[Request]) -> dict[int, Result]:
    """The results of requests that join whenever a slot is free; some have previews."""
    waiting, found, places = list(enumerate(requests)), dict[int, Result](), dict[int, int]()
    while waiting or made.busy:
        while waiting and made.free:
            place, wanted = waiting.pop(0)
            places[made.submit(wanted)] = place
            if place % 5 == 0:
                made.preview(max(places))
        found |= {places[result.ticket]: result for result in made.step()}
    return found


def same(a: dict[int, Result], b: dict[int, Result]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n].x, b[n].x) for n in a)


def test_replayed_steps_have_the_bits_of_steps_that_are_run(network: Network) -> None:
    """This holds for any sampler, guidance, mask, prompt and length."""
    requests = list(random_requests(40, text=network.config.context_dim is not None))
    tape = Tape()
    recorded, plain = engine(network, StepGraphs(tape)), plain_engine(network)
    assert same(all_of(recorded, requests), all_of(plain, requests))
    assert recorded.previews.keys() == plain.previews.keys()
    for ticket, preview in recorded.previews.items():
        assert torch.equal(preview, plain.previews[ticket])
    assert tape.replays > 100
    assert len(tape.lengths) < tape.replays / 3


@pytest.mark.parametrize("recorded", [False, True])
def test_log_probs_of_every_row(recorded: bool) -> None:
    """Against the density of the noise of each request's seed, whatever shares its steps."""
    tables = {"ddpm": table(4, "ddpm"), "heun": table(3, "heun"), "sde": table(5, "dpmpp-2m-sde")}
    requests = [request(seed, rows) for seed, rows in enumerate([*tables.values()] * 2)]
    recorder = StepGraphs(Tape()) if recorded else None
    unet = prepare(tiny_unet())
    found = all_of(Engine(unet, shape=SHAPE, slots=4, graphs=recorder, log_probs=True), requests)
    for place, wanted in enumerate(requests):
        factors = wanted.table.column("S").double()
        expected = [
            torch.distributions.Normal(0.0, float(s)).log_prob(s * noise_of(wanted, row)).sum()
            if s
            else torch.zeros((), dtype=torch.float64)
            for row, s in enumerate(factors)
        ]
        assert found[place].log_probs is not None
        torch.testing.assert_close(
            found[place].log_probs.double(), torch.stack(expected), rtol=1e-5, atol=1e-4
        )
    assert next(run(unet, requests)).log_probs is None
    masked = replace(
        requests[0], mask=torch.ones(1, *SHAPE[1:]), known=requests[0].x, noise=requests[0].x
    )
    with pytest.raises(ValueError, match="a mask replaces a part of its result; omit log_probs"):
        next(run(unet, [masked], log_probs=True))


def noise_of(wanted: Request, row: int) -> Tensor:
    seed = torch.tensor([wanted.seed])
    return philox_normal(seed, SHAPE, step=row, stream=SAMPLER_NOISE)[0].double()


@pytest.mark.parametrize("slots", [1, 4, 5, 17])
@pytest.mark.parametrize("recorded", [False, True])
def test_steps_can_be_planned(slots: int, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans need tensors that begin at a multiple of 16 bytes."""
    found: list[tuple[str, bool]] = []

    def watched(op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if ordinary():  # and not while the substitute records
                signature = plans.signature("cuda", (*args, *kwargs.values()), False)
                found.append((op.__name__, signature is not None))
            return op(*args, **kwargs)

        return call

    monkeypatch.setattr(sampling, "sampler_step", watched(sampling.sampler_step))
    monkeypatch.setattr(denoiser, "gather_rows", watched(denoiser.gather_rows))
    unet = prepare(tiny_unet())
    made = engine(unet, StepGraphs(Tape()), slots) if recorded else plain_engine(unet, slots)
    for seed in range(slots):  # the first without guidance: odd numbers of rows too
        made.submit(request(seed, table(2 + seed % 2, scale=2.0 if seed else 1.0)))
    finish(made)
    assert {op for op, _ in found} == {"sampler_step", "gather_rows"}
    assert all(planned for _, planned in found), found


def test_the_results_are_the_loops(network: Network) -> None:
    """They agree up to rounding, since the loop evaluates blocks of another size."""
    requests = list(random_requests(6, text=network.config.context_dim is not None))
    found = all_of(engine(network, StepGraphs(Tape())), requests)
    for place, wanted in enumerate(requests):
        (alone,) = run(network, [wanted])
        torch.testing.assert_close(found[place].x, alone.x, rtol=1e-4, atol=1e-4)


def test_other_requests_of_the_same_shape_are_served_by_the_same_graph() -> None:
    tape = Tape()
    made = engine(prepare(tiny_unet()), StepGraphs(tape), slots=2)
    made.submit(request(1, table(4, "ddim", 2.0), label=1))
    finish(made)
    assert len(tape.lengths) == 1
    for seed, (sampler, steps, scale) in enumerate(
        [("heun", 9, 3.5), ("dpmpp-2m-sde", 6, 1.5), ("plms", 12, 7.0)]
    ):
        made.submit(request(seed + 50, table(steps, sampler, scale), label=seed))
        finish(made)
    assert len(tape.lengths) == 1


def test_a_step_in_the_middle_issues_nothing_but_the_replay() -> None:
    """There are no launches, allocations or host reads outside the graph."""
    tape = Tape()
    made = engine(prepare(tiny_unet()), StepGraphs(tape))
    for seed in range(3):
        made.submit(request(seed, table(8, "dpmpp-2m-sde")))
    made.step()
    with no_host_reads(), Idle(tape) as idle:
        made.step()
        made.step()
    assert idle.calls == []


def test_weights_changed_in_place_take_effect_and_moved_ones_are_recorded_again() -> None:
    tape, unet = Tape(), prepare(tiny_unet())
    made = engine(unet, StepGraphs(tape))

    def sampled() -> Tensor:
        made.submit(request(3))
        (result,) = finish(made).values()
        return result.x

    first = sampled()
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.5)
    second = sampled()
    assert len(tape.lengths) == 1
    assert not torch.equal(first, second)
    unet.conv_out.weight = nn.Parameter(unet.conv_out.weight.detach() * 2, requires_grad=False)
    third = sampled()
    assert len(tape.lengths) == 2
    assert torch.equal(third, first)


def test_a_step_is_recorded_again_after_a_buffer_grew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.runtime.engine.ROWS", 8)
    tape, unet = Tape(), prepare(tiny_unet())
    made, plain = engine(unet, StepGraphs(tape), slots=2), plain_engine(unet, slots=2)
    requests = [request(seed, table(steps)) for seed, steps in enumerate((3, 4, 20, 50, 5))]
    assert same(all_of(made, requests), all_of(plain, requests))


def test_few_graphs_are_kept() -> None:
    tape = Tape()
    kept = StepGraphs(tape, limit=2)
    x = torch.zeros(2)
    for key in ("a", "b", "a", "c", "a", "b"):
        kept.run(key, lambda: x.add_(1), reads=[x], state=[x])
    assert kept.recorded == 4  # a, b, c, and b again, since it was least recently used
    assert x.tolist() == [6.0, 6.0]


def test_graphs_that_need_too_much_memory_make_room() -> None:
    """Their memory is shared, so all others go; a graph that is too large alone stays."""
    tape = Tape(room=40)
    kept = StepGraphs(tape)
    x, large = torch.zeros(4), torch.zeros(100)
    for key in ("a", "b", "a", "b", "c", "c", "a"):  # 16 bytes each: two fit
        kept.run(key, lambda: x.add_(1), reads=[x], state=[x])
    assert (kept.recorded, tape.held()) == (4, 32)  # a, b, then c alone, and a again
    for _ in range(3):
        kept.run("large", lambda: large.add_(1), reads=[large], state=[large])
    assert kept.recorded == 5
    assert (x.tolist(), large[0].item()) == ([7.0] * 4, 3.0)
    kept.forget()
    assert tape.held() == 0


def test_failures_are_seen_when_a_request_finishes() -> None:
    unet = prepare(tiny_unet())
    made = engine(unet, StepGraphs(Tape()))
    bad = request(1)
    made.submit(replace(bad, x=bad.x * torch.nan))
    made.submit(request(2))
    found = finish(made)
    assert [result.error is None for result in found.values()] == [False, True]


def test_a_network_with_a_hook_is_not_recorded() -> None:
    unet = tiny_unet()
    assert objection(unet) is None
    handle = unet.conv_out.register_forward_hook(lambda *_: None)
    assert "conv_out has a hook" in str(objection(unet))
    handle.remove()
    assert objection(unet) is None
    assert graphs_for(unet) is None  # not on a CPU


class Curious(Network):
    """A network that reads its input on the host."""

    def __init__(self, inner: Network) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def embed(self, *args: Any) -> Tensor:
        return self.inner.embed(*args)

    def body(self, x: Tensor, emb: Tensor, context: Any = None) -> Tensor:
        return self.inner.body(x if x.mean() > -99 else -x, emb, context)


def test_a_network_that_reads_on_the_host_cannot_be_recorded() -> None:
    made = engine(Curious(prepare(tiny_unet())), StepGraphs(Tape()))
    made.submit(request(1))
    with pytest.raises(HostRead):
        made.step()


def test_engines_are_kept_for_the_next_call_and_never_shared() -> None:
    unet, tapes = prepare(tiny_unet()), list[Tape]()

    def made(_: nn.Module) -> StepGraphs:
        tapes.append(Tape())
        return StepGraphs(tapes[-1])

    engines = Engines(unet, graphs=made)

    def calls() -> Iterator[Result]:
        return run(unet, [request(seed, table(3 + seed)) for seed in range(2)], engines=engines)

    first = [result.x for result in calls()]
    again = [result.x for result in calls()]
    assert len(tapes) == 1
    assert all(map(torch.equal, first, again))
    pairs = list(zip(calls(), calls(), strict=True))  # two interleaved calls
    assert len(tapes) == 2
    assert all(torch.equal(a.x, b.x) for a, b in pairs)
    broken = calls()
    next(broken)
    broken.close()  # this empties its engine
    assert all(map(torch.equal, [result.x for result in calls()], first))


def test_padding_adds_at_most_a_quarter_of_the_rows() -> None:
    for rows in range(1, 200):
        assert rows <= rounded_rows(rows) <= rows * 5 / 4
        assert rounded_rows(rounded_rows(rows)) == rounded_rows(rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_have_the_bits_of_steps_that_are_run() -> None:
    unet = prepare(tiny_unet(), device="cuda")
    requests = list(random_requests(40, text=False))
    recorder = graphs.CudaRecorder(torch.device("cuda"))
    recorded, plain = engine(unet, StepGraphs(recorder)), plain_engine(unet)
    assert same(all_of(recorded, requests), all_of(plain, requests))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_know_their_memory_and_free_it() -> None:
    recorder = graphs.CudaRecorder(torch.device("cuda"))
    kept, x = StepGraphs(recorder), torch.zeros(1 << 22, device="cuda")
    for key in ("a", "b"):
        kept.run(key, lambda: x.copy_(torch.sin(x) + 1), reads=[x], state=[x])
    assert recorder.held() >= x.nbytes
    recorder.room = 1
    kept.run("c", lambda: x.copy_(torch.cos(x)), reads=[x], state=[x])
    assert kept.recorded == 3
    assert len(kept._graphs) == 1
    kept.forget()
    assert recorder.held() == 0
