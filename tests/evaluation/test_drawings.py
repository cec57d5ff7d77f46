"""The judge of drawings: its loss, its names, its training, and the scores of pictures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdiff.data import DataConfig, open_dataset
from fastdiff.data.dataset import to_float
from fastdiff.data.emoji import SHIPPABLE
from fastdiff.evaluation.drawings import (
    DrawingJudge,
    DrawingReference,
    DrawingScorer,
    DrawingScores,
    JudgeTraining,
    degraded,
    named,
)
from fastdiff.evaluation.drawings_report import DrawingEvaluation, score_rows, write_drawings
from fastdiff.generate.job import SampleSettings
from fastdiff.models.contrastive import Contrastive, ContrastiveConfig, contrastive_loss
from fastdiff.models.text_transformer import TextTransformerConfig
from tests.support.drawings import put_drawings

SIDE = 32
QUICK = JudgeTraining(steps=60, batch_size=14, learning_rate=1e-3)


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("resvg_py")
    return put_drawings(tmp_path, monkeypatch)


def unit(*shape: int, seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape, generator=source, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


# --- the loss -----------------------------------------------------------------------------------


def test_the_loss_is_that_of_clip() -> None:
    """As transformers computes it; the pairs belong together row by row."""
    clip = pytest.importorskip("transformers.models.clip.modeling_clip")
    images, texts = unit(6, 8, seed=1), unit(6, 8, seed=2)
    theirs = clip.image_text_contrastive_loss(14.0 * texts @ images.T)
    torch.testing.assert_close(contrastive_loss(images, texts, 14.0), theirs)
    assert contrastive_loss(images, texts.roll(1, 0), 14.0) != theirs


def test_equal_captions_share_their_probability() -> None:
    """Two pictures of one caption, at right angles to a third pair: by hand."""
    images = texts = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    e = math.e
    pair, single = -math.log(e / (2 * e + 1)), -math.log(e / (e + 2))
    loss = contrastive_loss(images, texts, 1.0, same=same)
    torch.testing.assert_close(loss, torch.tensor((2 * pair + single) / 3))


def test_padding_changes_no_caption() -> None:
    torch.manual_seed(0)
    text = TextTransformerConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    net = Contrastive(ContrastiveConfig(text=text, widths=(8, 16), dim=4)).eval()
    ids = torch.tensor([[1, 5, 6, 2, 0, 0]])
    tokens = net.text.encode(ids)[0, :4].mean(0)
    centred = net.text_centre(tokens[None])[0]
    expected = torch.nn.functional.normalize(net.text_head(centred), dim=0)
    torch.testing.assert_close(net.embed_text(ids)[0], expected)
    assert net.embed_images(torch.zeros(3, 3, 16, 16)).shape == (3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (12,)}, "multiples of norm_groups 8, got"),
        ({"dim": 0}, "dim and image_channels"),
    ],
)
def test_impossible_nets_are_refused(change: dict[str, object], message: str) -> None:
    text = TextTransformerConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=4,
    )
    with pytest.raises(ValueError, match=message):
        ContrastiveConfig(text=text, **change)  # type: ignore[arg-type]


# --- names --------------------------------------------------------------------------------------


def test_a_picture_is_named_after_the_nearest_caption() -> None:
    """Two styles of three objects; the first picture is nearest to object 2 in style 1."""
    closeness = torch.tensor(
        [[[0.1, 0.5, 0.2], [0.3, 0.0, 0.9]], [[0.8, 0.1, 0.2], [0.7, 0.75, 0.0]]]
    )
    found = named(closeness)
    assert found.objects.tolist() == [[2, 1, 0], [0, 1, 2]]
    assert found.styles.tolist() == [1, 0]


def test_the_judge_learns_and_never_sees_what_is_held_out(fetched: Path) -> None:
    reference = DrawingReference.open(SIDE)
    seen = []
    judge = DrawingJudge.trained(
        SIDE, styles=SHIPPABLE, training=QUICK, progress=lambda *at: seen.append(at)
    )
    assert seen[-1] == (60, 60)
    held_out = {words[0] for words in reference.held_out.captions}
    assert held_out
    assert not held_out & set(judge.captions.full)
    data = reference.train
    named_ = judge.name(to_float(data.images))
    texts, objects, styles = reference.asked("train", len(data))
    assert texts == [words[0] for words in data.captions]
    assert (named_.objects[:, 0] == objects).float().mean() >= 0.9, "drawings it was trained on"
    assert (named_.styles == styles).float().mean() >= 0.9

    def fail(done: int, total: int) -> None:
        raise AssertionError("trained again")

    again = DrawingJudge.trained(SIDE, styles=SHIPPABLE, training=QUICK, progress=fail)
    images = to_float(data.images[:3])
    assert torch.equal(again.embed(images), judge.embed(images)), "read from the cache"
    scorer = DrawingScorer(judge, reference)
    mine = scorer.score(to_float(data.images), objects, styles)
    assert mine.top1 >= 0.9
    assert mine.near_copies == 1
    assert mine.nearest_median < 1e-4
    wrong = scorer.score(to_float(data.images), (objects + 1) % 8, 1 - styles)
    assert max(wrong.top1, wrong.style) <= 0.1
    noise = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert scorer.score(noise, objects[:4], styles[:4]).near_copies == 0
    assert scorer.ceiling().count == len(reference.held_out) == 2


def test_captions_are_asked_in_turn(fetched: Path) -> None:
    reference = DrawingReference.open(SIDE)
    texts, objects, styles = reference.asked("held-out", 5)
    assert texts == ["a pill, fluent style", "a mango, noto style"] * 2 + ["a pill, fluent style"]
    assert [reference.held_out.classes[i] for i in objects] == ["pill", "mango"] * 2 + ["pill"]
    assert styles.tolist() == [0, 1, 0, 1, 0]
    few, _, _ = reference.asked("train", 3)
    assert len(set(few)) == 3


def test_degraded_pictures_stay_pictures(fetched: Path) -> None:
    data = open_dataset(DataConfig(source="emoji", channels=3, image_size=SIDE))
    images = to_float(data.images)
    worse = degraded(images, torch.Generator().manual_seed(0))
    assert worse.shape == images.shape
    assert worse.abs().max() <= 1
    assert not torch.equal(worse, images)
    assert (worse - images).abs().mean() < 0.2
    assert torch.equal(worse, degraded(images, torch.Generator().manual_seed(0)))


# --- the report ---------------------------------------------------------------------------------


def test_the_report_has_every_score_and_the_sheet(tmp_path: Path) -> None:
    scores = DrawingScores(
        count=3, top1=0.5, top5=0.75, style=1.0, near_copies=0.125, nearest_median=2.0
    )
    evaluation = DrawingEvaluation(
        scores={"held-out": scores, "real held-out": replace(scores, top1=0.625)},
        near_copy_limit=0.5,
        texts=("a red apple, noto style", "a key", "an anchor"),
        images=torch.zeros(3, 3, 16, 16),
        settings=SampleSettings(sampler="ddim", steps=5, guidance_scale=3.0),
        seeds=(4, 6),
        model="tiny",
        weights_hash="ab" * 32,
    )
    page = write_drawings(evaluation, tmp_path, command="fastdiff evaluate --model tiny")
    text = page.read_text()
    assert "| held-out | 3 | 50.0% | 75.0% | 100.0% | 12.5% |" in text
    assert "| real held-out | 3 | 62.5% | 75.0% | 100.0% | 12.5% |" in text
    assert "ddim, 5 steps, guidance 3, seeds 4 to 6" in text
    assert (tmp_path / "images/drawings.png").is_file()
    record = json.loads((tmp_path / "text-to-image.json").read_text())
    assert record["scores"]["held-out"]["top1"] == 0.5
    assert record["provenance"]["seeds"] == [4, 6]
    assert len({len(row) for row in score_rows(evaluation)}) == 1
