"""Launches as CUDA's runtime reports them, on a GPU or else in the emulation
(cuda_host/cuda_api.h)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from benchmarks.device.dry import dry_jobs
from benchmarks.resources import cuda_device
from fastdiff import kernels
from fastdiff.bench.watch import watched
from fastdiff.kernels.choose import UNAVAILABLE
from fastdiff.kernels.cuda import library
from fastdiff.kernels.group_norm_silu import cuda as group_norm_cuda
from tests import cuda_host
from tests.kernels import cases
from tests.kernels.routes import cuda_kernels


@pytest.fixture
def runtime() -> Iterator[str]:
    """The device on which the CUDA kernels run here."""
    emulated = not torch.cuda.is_available()
    with cuda_host.emulated() if emulated else nullcontext():
        yield "cpu" if emulated else "cuda"


@cases.needs_cuda
def test_a_watch_sees_the_launches_of_its_block(runtime: str) -> None:
    x = torch.randn(3, 5, 2 * 64, device=runtime)
    with watched() as seen, kernels.backend("cuda"):
        y = kernels.geglu(x)
        assert seen == []
    (launch,) = seen
    assert "geglu_forward" in launch.kernel
    assert (launch.blocks, launch.threads, launch.cluster) == (1, 256, 1)
    assert (launch.shared, launch.fixed_shared, launch.clusters) == (0, 0, 0)
    assert launch.occupancy == launch.resident * 256 / launch.most_threads
    if runtime == "cpu":  # cuda_api.h's device
        assert (launch.registers, launch.stack, launch.binary) == (40, 8, 90)
        assert (launch.resident, launch.multiprocessors) == (65536 // (40 * 256), 132)
        assert launch.most_threads == 2048
    else:
        assert 8 <= launch.registers <= 255
        assert launch.multiprocessors == torch.cuda.get_device_properties(0).multi_processor_count
    with kernels.backend("reference"):
        torch.testing.assert_close(y, kernels.geglu(x))  # it ran
    with kernels.backend("cuda"):
        kernels.geglu(x)
    with watched() as seen:
        pass
    assert seen == []  # not watched


@cases.needs_cuda
def test_a_watch_can_keep_kernels_from_starting(runtime: str) -> None:
    x = torch.randn(2, 64, 16, 16, device=runtime).contiguous(memory_format=torch.channels_last)
    with watched(start=False) as seen, pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_norm_cuda, "CLUSTER", 16)
        patch.setattr(torch, "empty_like", torch.zeros_like)
        with kernels.backend("cuda"):
            y = kernels.group_norm_silu(x.requires_grad_(), 8)
            y.sum().backward()
    assert not y.any()
    forward, backward, parameters = seen
    assert "norm_on_chip_columns" in forward.kernel
    assert "norm_backward_on_chip" in backward.kernel
    assert "norm_parameter_gradients" in parameters.kernel
    assert (forward.cluster, backward.cluster, parameters.cluster) == (16, 16, 1)
    assert min(forward.clusters, backward.clusters) >= 1
    assert min(forward.shared, backward.shared) > 0
    with kernels.backend("cuda"):
        assert kernels.group_norm_silu(x, 8).any()  # afterwards kernels start again


@pytest.mark.slow
@cases.needs_cuda
def test_the_launches_of_networks_are_listed(runtime: str) -> None:
    jobs = dry_jobs()
    rows = cuda_device.collect(jobs, runtime)
    names = {row.name.partition("<")[0] for row in rows}
    assert names >= {"norm_on_chip_columns", "norm_backward_on_chip", "sampler_step_row"}
    assert names <= cuda_kernels()
    assert all(row.launch.occupancy > 0 for row in rows)
    assert any(row.name == "philox_normals" for row in rows)
    text = cuda_device.table(rows).splitlines()
    assert len(text) == len(rows) + 1
    assert text[0].split()[:3] == ["kernel", "threads", "cluster"]
    (philox,) = (line.split() for line in text if line.startswith("philox_normals"))
    assert philox[1:3] == ["256", "1"]
    listed = cuda_device.as_json(rows)
    assert json.loads(json.dumps(listed))[0]["launch"]["registers"] == rows[0].launch.registers


def test_without_a_gpu_the_command_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_device.main([]) == 2
    assert re.fullmatch(
        r"benchmarks.resources.cuda_device: "
        r"(torch finds no usable GPU|torch is built without CUDA); "
        r"without a GPU, use python -m benchmarks.resources.cuda\n",
        capsys.readouterr().err,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setitem(UNAVAILABLE, "cuda", "nvcc was not found; set CUDA_HOME")
    assert cuda_device.main(["--json"]) == 2
    assert "benchmarks.resources.cuda_device: nvcc was not found" in capsys.readouterr().err
