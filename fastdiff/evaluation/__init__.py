"""Evaluation with pass/fail limits: samples measured against real images no model has seen."""

from __future__ import annotations

from fastdiff.evaluation.classifier import Judge, Reference, digits_reference
from fastdiff.evaluation.evaluate import Evaluation, Results, Scores, evaluate, evaluate_images
from fastdiff.evaluation.report import write_report

__all__ = [
    "Evaluation",
    "Judge",
    "Reference",
    "Results",
    "Scores",
    "digits_reference",
    "evaluate",
    "evaluate_images",
    "write_report",
]
