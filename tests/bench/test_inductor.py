"""Launches, bytes and FLOPs read off the code that torch.compile generates for an H200."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastdiff.bench import counts, inductor, launches
from fastdiff.bench.record import ROOT

KERNEL = """
@triton_heuristics.reduction(inductor_meta={'kernel_num_gb': 0.000131072})
@triton.jit
def triton_red_fused_norm_0(in_ptr0, out_ptr1, xnumel, r0_numel):
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        tmp0 = tl.load(in_ptr0 + (r0_5), r0_mask)
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        tmp1 = tl.load(in_ptr0 + (r0_5), r0_mask)
        tl.store(out_ptr1 + (r0_5), tmp1, r0_mask)

def get_args():
    arg_0 = rand_strided((2, 64, 16, 16), (16384, 1, 1024, 64), device='cuda:0', dtype=torch.bfloat16)
    arg_1 = rand_strided((2, 64, 16, 16), (16384, 1, 1024, 64), device='cuda:0', dtype=torch.bfloat16)
    return arg_0, arg_1, 16, 2048,
"""  # noqa: E501 - as Inductor writes it
CODE = f"""
triton_red_fused_norm_0 = async_compile.triton('triton_red_fused_norm_0', '''{KERNEL}''', device_str='cuda')

def call(args):
    arg0_1, arg1_1, arg2_1 = args
    with torch.cuda._DeviceGuard(0):
        buf0 = extern_kernels.convolution(arg1_1, arg0_1, stride=(1, 1), bias=None)
        assert_size_stride(buf0, (2, 64, 16, 16), (16384, 1, 1024, 64), 'convolution')
        buf1 = empty_strided_cuda((2, 64, 16, 16), (16384, 1, 1024, 64), torch.bfloat16)
        triton_red_fused_norm_0.run(buf0, buf1, 16, 2048, stream=raw_stream0)
        buf2 = empty_strided_cuda((512, 32), (32, 1), torch.bfloat16)
        extern_kernels.mm(reinterpret_tensor(buf1, (512, 64), (64, 1), 0), arg2_1, out=buf2)
        triton_red_fused_norm_0.run(buf0, buf1, 16, 2048, stream=raw_stream0)
        buf3 = torch.ops.aten._scaled_dot_product_flash_attention.default(reinterpret_tensor(buf2, (2, 2, 256, 16), (8192, 16, 32, 1), 0), reinterpret_tensor(buf2, (2, 2, 256, 16), (8192, 16, 32, 1), 0), reinterpret_tensor(buf2, (2, 2, 256, 16), (8192, 16, 32, 1), 0), scale=0.25)
        buf4 = buf3[0]
    return (buf4, )

def get_args():
    arg0_1 = rand_strided((64, 8, 3, 3), (72, 1, 24, 8), device='cuda:0', dtype=torch.bfloat16)
    arg1_1 = rand_strided((2, 8, 16, 16), (2048, 1, 128, 8), device='cuda:0', dtype=torch.bfloat16)
    arg2_1 = rand_strided((64, 32), (1, 64), device='cuda:0', dtype=torch.bfloat16)
    return [arg0_1, arg1_1, arg2_1]
"""  # noqa: E501
Y, Z = 2 * 64 * 16 * 16, 512 * 32
"""Numbers in the convolution's result and in the product's."""


def test_generated_code_is_read() -> None:
    """A kernel that reads its input in two loops moves it twice, as in launches.py."""
    found = inductor.read(CODE)
    assert found.launches == {"fused": 2, "convolution": 1, "linear": 1, "attention": 1}
    assert found.kernels == 1
    assert found.bytes_of == {
        "fused": 2 * 2 * 3 * Y,
        "convolution": 2 * (64 * 8 * 9 + 2 * 8 * 256 + Y),
        "linear": 2 * (Y + 64 * 32 + Z),
        "attention": 2 * 4 * Z,
    }
    assert found.bytes == sum(found.bytes_of.values())
    assert found.flops_of["convolution"] == 2 * Y * 8 * 9
    assert found.flops_of["linear"] == 2 * 512 * 64 * 32
    assert found.flops_of["attention"] == 4 * 2 * 2 * 256 * 256 * 16


def test_an_operator_without_a_number_of_launches_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"torch.ops.aten.sort.default has no number of launches"):
        inductor.read(CODE.replace("_scaled_dot_product_flash_attention", "sort"))


def test_the_record_has_the_products_of_its_networks() -> None:
    """FLOPs and convolutions from generated code equal those counted from operators, which another
    test compares with the page."""
    rows = [line.strip("| ").split(" | ") for line in counts.DOCS.read_text().splitlines()]
    recorded = inductor.compiled_networks()
    assert recorded
    for name, found in recorded.items():
        theirs = "diffusers" if name in launches.DIFFUSERS else "fastdiff"
        [flops] = [row[5] for row in rows if row[0].startswith(f"{name},") and row[2] == theirs]
        [convolutions] = [row[2] for row in rows if row[:2] == [name, theirs]]
        assert f"{found.flops / 1e12:.2f}" == flops
        assert f"{found.launches['convolution']}" == convolutions


COMPILE = """
import torch, torch.nn.functional as F
from torch import nn
from fastdiff.bench import inductor

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(64, 8, 1)

    def forward(self, x):
        return self.second(F.silu(self.first(x)))

def make():
    with torch.device("meta"):
        network = Net().bfloat16().to(memory_format=torch.channels_last)
        x = torch.empty(2, 8, 16, 16).bfloat16()
    return network, {"x": x.to(memory_format=torch.channels_last)}

found = inductor.read(inductor.code_of(make))
print(sorted(found.launches.items()), found.flops, found.bytes_of["fused"])
"""


@pytest.mark.slow
def test_a_small_network_is_compiled_without_a_gpu() -> None:
    """Bias and activation of the first convolution are one kernel, the last bias another."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    flops = 2 * 512 * (64 * 8 * 9 + 8 * 64)
    fused = 2 * (2 * 512 * 64 + 64) + 2 * (2 * 512 * 8 + 8)
    assert done.stdout.strip() == f"[('convolution', 2), ('fused', 2)] {flops} {fused}"
