"""Evaluation with pass/fail limits: samples measured against real images no model has seen."""

from __future__ import annotations

from fastdiff.evaluation.bits import (
    BitsPerDimension,
    bits_per_dimension,
    digits_bits,
    write_bits,
)
from fastdiff.evaluation.classifier import (
    Judge,
    Reference,
    digits_reference,
    mnist_reference,
    reference_of,
)
from fastdiff.evaluation.evaluate import Evaluation, Results, Scores, evaluate, evaluate_images
from fastdiff.evaluation.inception import (
    InceptionScores,
    inception_scores,
    load_inception,
)
from fastdiff.evaluation.report import write_report

__all__ = [
    "BitsPerDimension",
    "Evaluation",
    "InceptionScores",
    "Judge",
    "Reference",
    "Results",
    "Scores",
    "bits_per_dimension",
    "digits_bits",
    "digits_reference",
    "evaluate",
    "evaluate_images",
    "inception_scores",
    "load_inception",
    "mnist_reference",
    "reference_of",
    "write_bits",
    "write_report",
]
