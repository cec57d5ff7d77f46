"""The noisy classifier equals the published structure on the same weights, in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastdiff.models.classifier import Classifier, ClassifierConfig
from fastdiff.models.network import kind_of, network_family
from fastdiff.models.presets import CLASSIFIERS
from tests.checkpoint.layouts import openai_classifier
from tests.models.published_classifier import PublishedClassifier
from tests.support.tiny import randomize

PARAMETERS = {
    "adm-imagenet64": 65_438_568,
    "adm-imagenet128": 42_568_040,
    "adm-imagenet256": 54_096_360,
    "adm-imagenet512": 54_448_360,
    "tiny": 379_050,
}
SMALL = ClassifierConfig(  # two blocks per level, attention with one head and with two
    in_channels=3,
    num_classes=7,
    model_channels=32,
    channel_mult=(1, 1, 2),
    num_res_blocks=2,
    attention_depth=(0, 1, 1),
    sample_size=16,
    head_dim=32,
    norm_groups=16,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {},
    "adaptive": {"pool": "adaptive"},
    "spatial": {"pool": "spatial"},
    "spatial_v2": {"pool": "spatial_v2"},
    "convolutions": {"pool": "adaptive", "resblock_updown": False, "scale_shift_norm": False},
    "narrow": {"time_channels": 64},  # as at 512x512
}


def small(name: str) -> tuple[Classifier, PublishedClassifier]:
    """Ours and the published structure, with the same random weights."""
    torch.manual_seed(0)
    ours = Classifier(replace(SMALL, **VARIANTS[name])).eval()
    randomize(ours, 0).double()
    peer = PublishedClassifier(ours.config).double().eval()
    peer.load_state_dict(openai_classifier(ours.state_dict(), ours.config.pool))
    return ours, peer


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        model = Classifier(CLASSIFIERS[name])
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_it_equals_the_published_structure(name: str) -> None:
    ours, peer = small(name)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    t = torch.tensor([0, 421, 999])
    expected = peer(x, t)
    assert expected.std() > 0.1, "the logits must depend on x for a comparison to mean anything"
    torch.testing.assert_close(ours(x, t), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["attention", "spatial_v2"])
def test_its_gradient_equals_that_of_the_published_structure(name: str) -> None:
    ours, peer = small(name)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    t, y = torch.tensor([5, 700]), torch.tensor([6, 0])
    gradients = [
        torch.autograd.grad(network(x, t).log_softmax(1).gather(1, y[:, None]).sum(), x)[0]
        for network in (ours, peer)
    ]
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_samples_are_classified_at_their_own_timesteps() -> None:
    ours, _ = small("attention")
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    both = ours(x, torch.tensor([3, 900]))
    torch.testing.assert_close(both[1:], ours(x[1:], torch.tensor([900])), rtol=1e-12, atol=1e-12)
    assert (both[1:] - ours(x[1:], torch.tensor([3]))).abs().max() > 1e-3


def test_checkpointing_leaves_gradients_as_they_are() -> None:
    ours, _ = small("spatial")
    x, t = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.tensor([5, 700])
    gradients = []
    for ours.gradient_checkpointing in (False, True):
        ours.zero_grad()
        ours(x, t).square().sum().backward()
        gradients.append(ours.input_blocks[0][0].weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_it_is_a_family_that_does_not_denoise() -> None:
    assert kind_of(SMALL) == "classifier"
    assert network_family("classifier") == (ClassifierConfig, Classifier)
    assert not Classifier.denoises


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": None}, "sample_size must be set for the pool 'attention'"),
        ({"sample_size": 10}, "sample_size must be a multiple of 4, got 10"),
        ({"pool": "max"}, "pool must be one of .*, got 'max'"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"num_heads": 2}, "^ClassifierConfig: give one of num_heads and head_dim"),
        ({"pool": "spatial_v2", "norm_groups": 3, "model_channels": 96}, "must divide 2048"),
    ],
)
def test_bad_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_bad_inputs_are_refused() -> None:
    ours, _ = small("attention")
    x, t = torch.randn(1, 3, 16, 16, dtype=torch.float64), torch.tensor([1])
    with pytest.raises(ValueError, match="x must be 16 x 16 for this classifier"):
        ours(torch.zeros(1, 3, 16, 20, dtype=torch.float64), t)
    with pytest.raises(ValueError, match="a classifier takes no condition"):
        ours(x, t, y=torch.tensor([1]))
    with pytest.raises(ValueError, match="context must be None"):
        ours(x, t, context=x)
