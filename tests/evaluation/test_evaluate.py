"""The evaluation can fail: each way to be a bad model shows in its own number."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn", reason="the evaluation needs fastdiff[train]")
pytest.importorskip("torchmetrics", reason="the evaluation needs fastdiff[train]")

from fastdiff.configs import from_dict, to_dict
from fastdiff.evaluation import Evaluation, Judge, Reference, Results, digits_reference
from fastdiff.evaluation.distances import frechet_distance, nearest_training, precision_recall
from fastdiff.evaluation.evaluate import _subset, evaluate, evaluate_images
from fastdiff.evaluation.inception import InceptionScores, inception_scores
from fastdiff.evaluation.report import write_report
from fastdiff.generate.job import SampleSettings
from tests.support.tiny import UNET, tiny_model, tiny_unet


class Means(nn.Module):
    """A stand-in for Inception: the means of an image's eight bands of rows."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0].double().unflatten(1, (8, -1)).mean((2, 3))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return digits_reference(32)


@pytest.fixture(scope="module")
def judge(reference: Reference) -> Judge:
    return Judge(reference)


def measure(
    reference: Reference, judge: Judge, images: torch.Tensor, labels: torch.Tensor
) -> Results:
    return evaluate_images(images, labels, reference, judge=judge)[0]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_judge_is_good_on_images_it_has_not_seen(reference: Reference, judge: Judge) -> None:
    assert judge.accuracy(reference.held_out_images, reference.held_out_labels) >= 0.96
    features = judge.features(reference.train_images)
    # Well-conditioned: the Fréchet distance multiplies covariances and takes a root.
    assert np.linalg.cond(np.cov(features.T)) < 1e5


def test_held_out_images_pass_and_are_the_floor(reference: Reference, judge: Judge) -> None:
    results = measure(reference, judge, reference.held_out_images, reference.held_out_labels)
    assert results.samples == results.held_out
    assert results.frechet_ratio == 1
    assert results.failures() == ()
    assert 0.03 <= results.samples.near_copies <= 0.05
    assert min(results.samples.precision, results.samples.recall) > 0.6


@pytest.mark.parametrize("blemish", [0.0, 0.1], ids=["exact", "with a little noise"])
def test_training_images_are_seen_to_be_copies(
    reference: Reference, judge: Judge, blemish: float
) -> None:
    images = (reference.train_images + blemish * noise(1437, 1, 32, 32)).clamp(-1, 1)
    results = measure(reference, judge, images, reference.train_labels)
    assert results.samples.near_copies > 0.99
    assert len(results.failures()) == 1
    assert "near-copies" in results.failures()[0]


def test_noise_is_terrible(reference: Reference, judge: Judge) -> None:
    results = measure(reference, judge, noise(360, 1, 32, 32).clamp(-1, 1), torch.arange(360) % 10)
    assert results.samples.accuracy < 0.25
    assert results.frechet_equal_ratio > 50
    assert results.samples.precision < 0.05
    assert len(results.failures()) >= 2


def test_shuffled_labels_cost_accuracy_alone(reference: Reference, judge: Judge) -> None:
    order = torch.randperm(360, generator=torch.Generator().manual_seed(0))
    labels = reference.held_out_labels[order]
    results = measure(reference, judge, reference.held_out_images, labels)
    assert results.samples.accuracy < 0.2
    assert [failure.split()[0] for failure in results.failures()] == ["class"]


def test_one_image_repeated_has_no_recall(reference: Reference, judge: Judge) -> None:
    images = reference.held_out_images[:1].repeat(360, 1, 1, 1)
    results = measure(reference, judge, images, reference.held_out_labels[:1].repeat(360))
    assert results.samples.recall < 0.01
    assert results.frechet_equal_ratio > 50


def test_a_missing_class_shows_in_distance_and_recall(reference: Reference, judge: Judge) -> None:
    """Mode collapse: 5 and 8 never drawn, all the rest real and unseen or barely blurred."""
    keep = (reference.held_out_labels != 5) & (reference.held_out_labels != 8)
    images, labels = reference.held_out_images[keep], reference.held_out_labels[keep]
    images = torch.cat([images, images])
    results = measure(reference, judge, images, torch.cat([labels, labels]))
    assert results.frechet_equal_ratio > 3
    assert results.samples.recall < 0.9 * results.held_out.recall
    assert results.samples.class_accuracy[5] is None


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    """Diagonal Gaussians: |mu|² + sum (s_a - s_b)²."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200_000, 3)) * [1.0, 2.0, 0.5]
    b = rng.normal(size=(200_000, 3)) * [1.5, 2.0, 0.1] + [0.0, 1.0, -2.0]
    assert math.isclose(frechet_distance(a, b), 5 + 0.25 + 0.16, rel_tol=0.02)
    assert frechet_distance(a, a) < 1e-9


def test_precision_and_recall_of_points_on_a_line() -> None:
    """k = 1: balls reach to the next neighbour. Worked out by hand."""
    real = np.array([[0.0], [1.0], [2.0], [10.0]])  # radii 1, 1, 1, 8
    generated = np.array([[2.5], [-3.0], [2.4], [-3.5]])  # radii 0.1, 0.5, 0.1, 0.5
    # 2.5 and 2.4 lie within 1 of 2; -3 and -3.5 lie outside all. No real point is within 0.5.
    assert precision_recall(real, generated, k=1) == (0.5, 0.0)
    assert precision_recall(generated, real, k=1) == (0.0, 0.5)


def test_nearest_neighbours_by_hand() -> None:
    training = np.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
    near = nearest_training(np.array([[3.0, 4.0], [0.0, 1.0]]), training, crowd=3)
    assert near.index.tolist() == [1, 0]
    np.testing.assert_allclose(near.distance, [0.0, 1.0], atol=1e-12)
    second = [1.0, math.hypot(3, 3), math.hypot(6, 7)]
    np.testing.assert_allclose(near.ratio, [0.0, 3 / sum(second)], atol=1e-12)


def test_images_that_do_not_fit_are_refused(reference: Reference, judge: Judge) -> None:
    labels = torch.zeros(360, dtype=torch.int64)
    bad = reference.held_out_images.clone()
    bad[3, 0, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        measure(reference, judge, bad, labels)
    with pytest.raises(ValueError, match=r"shape \(1, 32, 32\), .*, got \(1, 8, 8\)"):
        measure(reference, judge, torch.zeros(360, 1, 8, 8), labels)
    with pytest.raises(ValueError, match=r"at least 360 images, .* got 5"):
        measure(reference, judge, bad[:5], labels[:5])


def test_the_report_says_what_was_measured(
    reference: Reference, judge: Judge, tmp_path: Path
) -> None:
    images, labels = reference.held_out_images, reference.held_out_labels
    results, neighbours = evaluate_images(images, labels, reference, judge=judge)
    evaluation = Evaluation(
        results=results,
        images=images,
        labels=labels,
        seeds=tuple(range(360)),
        neighbours=neighbours,
        reference=reference,
        settings=SampleSettings(sampler="dpmpp-2m", steps=50, guidance_scale=1.5),
        weights_hash="f" * 64,
        model="held-out",
    )
    text = write_report(evaluation, tmp_path, command="fastdiff evaluate").read_text()
    assert "`fastdiff evaluate`" in text
    assert "All limits are met." in text
    assert f"| class accuracy | {results.samples.accuracy:.1%} |" in text
    for picture in ("evaluation-samples.png", "evaluation-neighbours.png"):
        assert f"(images/{picture})" in text
        assert (tmp_path / "images" / picture).stat().st_size > 10_000
    assert ", guidance 1.5, seeds 0 to 359." in " ".join(text.split())
    assert "Inception" not in text
    scores = inception_scores(images[:90], images[90:180], Means())
    measured = replace(evaluation, inception={"samples": scores, "held_out": scores})
    text = write_report(measured, tmp_path / "more", command="fastdiff evaluate").read_text()
    assert f"| FID | {scores.fid:.3f} | {scores.fid:.3f} |" in text
    data = json.loads((tmp_path / "more/results.json").read_text())
    assert from_dict(InceptionScores, data["inception"]["held_out"]) == scores
    weak = replace(evaluation, settings=replace(evaluation.settings, guidance_scale=0.0))
    text = write_report(weak, tmp_path / "weak", command="fastdiff evaluate").read_text()
    assert ", no guidance, seeds 0 to 359." in " ".join(text.split())
    data = json.loads((tmp_path / "results.json").read_text())
    assert from_dict(Results, data["results"]) == results
    assert to_dict(results) == data["results"]


def test_a_random_model_is_sampled_and_fails(reference: Reference) -> None:
    """The whole of `evaluate`: labels and seeds go round, and a model that knows nothing fails."""
    unet = replace(UNET, num_classes=10)
    names = reference.class_names
    model = tiny_model(image_size=32, denoiser=tiny_unet(unet), class_names=names)
    quick = SampleSettings(steps=1, guidance_scale=1.0)
    evaluation = evaluate(model, count=360, settings=quick, first_seed=5, inception=Means())
    assert evaluation.inception is not None
    mine, real = evaluation.inception["samples"], evaluation.inception["held_out"]
    assert (mine.count, mine.real_count, mine.feature_dim) == (360, 360, 8)
    assert mine.fid > 10 * real.fid
    assert real.recall > 0.5 > mine.recall
    assert evaluation.labels.tolist() == [index % 10 for index in range(360)]
    assert evaluation.seeds == tuple(range(5, 365))
    assert evaluation.results.samples.accuracy < 0.5
    assert len(evaluation.results.failures()) >= 2
    with pytest.raises(ValueError, match="at least 360 samples"):
        evaluate(model, count=10)
    with pytest.raises(ValueError, match=r"expected a model of the 10 classes .* got 4"):
        evaluate(tiny_model(), reference=reference)


def test_subsets_keep_the_share_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [500, 300, 200])
    rng = np.random.default_rng(0)
    first, second = (_subset(rng, labels, 100) for _ in range(2))
    assert np.bincount(labels[first]).tolist() == [50, 30, 20]
    assert len(set(first)) == 100
    assert set(first) != set(second)


def test_a_subset_of_training_images_is_no_farther_than_held_out_ones(
    reference: Reference, judge: Judge
) -> None:
    results = measure(reference, judge, reference.train_images, reference.train_labels)
    assert results.samples.frechet_equal < results.held_out.frechet_equal
