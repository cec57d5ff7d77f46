"""Binomial diffusion against enumeration: all bits, all paths."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastdiff.diffusion.binomial import BinomialProcess


def all_bits(count: int) -> Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=count)), dtype=torch.float64)


def chance(rate: Tensor, x: Tensor) -> Tensor:
    """Probability of bits x under independent rates; broadcasts, the last axis multiplied."""
    return torch.where(x == 1, rate, 1 - rate).prod(-1)


def exact(process: BinomialProcess, data: Tensor, weights: Tensor):
    """The true probability that each bit of x0 is 1, given x at t."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        rates = process.rate(data, t[:1].expand(len(data)))
        likely = chance(rates[None], x[:, None]) * weights  # (N, data)
        return likely @ data / likely.sum(1, keepdim=True)

    return predict


def expected_terms(process: BinomialProcess, data: Tensor, weights: Tensor, predict) -> Tensor:
    """E over data and noise of each of the process's terms: (T,), no draw."""
    x = all_bits(data.shape[1])
    terms = []
    for t in range(process.num_timesteps):
        at = torch.full((len(x),), t)
        total = torch.tensor(0.0, dtype=torch.float64)
        for x0, weight in zip(data, weights, strict=True):
            here = x0.expand_as(x)
            terms_here = process.term(here, x, predict(x, at), at)
            total += weight * (chance(process.rate(here, at), x) * terms_here).sum()
        terms.append(total)
    return torch.stack(terms)


HEARTBEAT = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.float64)


def test_the_forward_process_step_by_step() -> None:
    """abar from the product of the steps, and the last x is pure noise (section 2.4.1)."""
    process = BinomialProcess(7)
    rate = torch.tensor([1.0, 0.0], dtype=torch.float64)
    x0 = rate[:, None]
    for t in range(7):
        beta = float(process.betas[t])
        rate = rate * (1 - beta) + beta / 2
        torch.testing.assert_close(process.rate(x0, torch.tensor([t, t]))[:, 0], rate)
    assert process.betas.tolist() == pytest.approx([1 / (7 - t) for t in range(7)])
    assert rate.tolist() == [0.5, 0.5]
    ones = torch.ones(20_000, 1, dtype=torch.float64)
    drawn = process.noised(ones, torch.full((20_000,), 3), torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert float(drawn.mean()) == pytest.approx(0.5 + 0.5 * 3 / 7, abs=5 * 0.5 / 20_000**0.5)


def test_the_bound_is_the_expectation_over_all_paths() -> None:
    """E_q log2 q(x_1..x_T | x0) / p(x_0..x_T), path by path, with a reverse process that is wrong:
    the terms add up to it."""
    process, data, weights = BinomialProcess(3), HEARTBEAT, torch.tensor([0.7, 0.3]).double()
    states = all_bits(3)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return torch.sigmoid(x @ x.new_tensor([[1.0, -2, 1], [0.5, 1, -1], [0, 1, 2]]) - t[:, None])

    def step(t: int) -> Tensor:  # q(x_t | x_{t-1}): (8 before, 8 after)
        beta = float(process.betas[t])
        return chance((states * (1 - beta) + beta / 2)[:, None], states[None])

    def back(t: int) -> Tensor:  # p(x_{t-1} | x_t): (8 after, 8 before)
        at = torch.full((8,), t)
        return chance(process.reverse(states, predict(states, at), at)[:, None], states[None])

    total = 0.0
    forward, backward = [step(t) for t in range(3)], [back(t) for t in range(3)]
    for x0, weight in zip(data, weights, strict=True):
        first = int((states == x0).all(1).nonzero())
        for path in itertools.product(range(8), repeat=3):
            steps = list(itertools.pairwise((first, *path)))
            q = math.prod(float(forward[t][a, b]) for t, (a, b) in enumerate(steps))
            p = math.prod(float(backward[t][b, a]) for t, (a, b) in enumerate(steps)) / 8
            if q:
                total += float(weight) * q * math.log2(q / p)
    terms = expected_terms(process, data, weights, predict)
    assert float(terms.sum()) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_the_exact_reverse_process_of_independent_bits_is_tight(steps: int) -> None:
    """Then p(x_{t-1} | x_t) is a product of rates, so the chain is the true one, and the bound the
    entropy."""
    process, rates = BinomialProcess(steps), torch.tensor([0.9, 0.25, 0.5], dtype=torch.float64)
    data = all_bits(3)
    weights = chance(rates, data)
    entropy = -float((rates * rates.log2() + (1 - rates) * (1 - rates).log2()).sum())
    terms = expected_terms(process, data, weights, exact(process, data, weights))
    assert float(terms.sum()) == pytest.approx(entropy, rel=1e-9)


def test_bits_that_depend_on_each_other_need_many_steps() -> None:
    """Two sequences have 1 bit. A step treats its bits as independent, so the bound is above that,
    and the gap falls with the number of steps."""
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    gaps = []
    for steps in (2, 8, 32, 128):
        process = BinomialProcess(steps)
        predict = exact(process, HEARTBEAT, weights)
        gaps.append(float(expected_terms(process, HEARTBEAT, weights, predict).sum()) - 1)
    assert all(a > b > 0 for a, b in itertools.pairwise(gaps))
    assert gaps[-1] < gaps[0] / 10


def test_samples_and_drawn_bounds_with_the_exact_reverse_process() -> None:
    process = BinomialProcess(64)
    data, weights = HEARTBEAT.float(), torch.tensor([0.7, 0.3])
    predict = exact(process, data, weights)
    generator, seen = torch.Generator().manual_seed(0), []
    x = process.sample(predict, (4000, 3), generator, on_step=lambda t, x: seen.append(t))
    assert seen == list(range(63, -1, -1))
    first = (x == data[0]).all(1).float().mean()
    second = (x == data[1]).all(1).float().mean()
    assert float(first + second) > 0.95
    assert float(first) == pytest.approx(0.7, abs=0.04)
    x0 = data[torch.multinomial(weights, 4000, replacement=True, generator=generator)]
    drawn = process.bound(predict, x0, generator)
    assert drawn.shape == (4000, 64)
    wide = BinomialProcess(64)
    terms = expected_terms(
        wide, data.double(), weights.double(), exact(wide, data.double(), weights.double())
    )
    error = float(drawn.sum(1).std()) / 4000**0.5
    assert float(drawn.sum(1).mean()) == pytest.approx(float(terms.sum()), abs=5 * error)
    with pytest.raises(ValueError, match="num_timesteps must be at least 1, got 0"):
        BinomialProcess(0)
