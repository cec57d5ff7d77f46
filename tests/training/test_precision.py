"""Devices and precisions that a machine does not have."""

from __future__ import annotations

import pytest
import torch

from fastdiff.training.precision import check_precision, resolve_device


def test_precisions_a_device_cannot_do_are_errors() -> None:
    with pytest.raises(ValueError, match="'fp16' needs a CUDA device, got 'cpu'"):
        check_precision("fp16", torch.device("cpu"))
    check_precision("bf16", torch.device("cpu"))
    with pytest.raises(ValueError, match="is not available"):
        resolve_device("cuda:77")
