"""``kernels benchmark``: the ops at the shapes of Stable Diffusion 1.5's U-Net, bf16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class DiffusionOps(Benchmark):
    seed: int = 0

    def setup_group_norm_silu(self) -> None:
        self.x = torch.randn(2, 320, 64, 64, device=self.device, dtype=torch.bfloat16)
        self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.weight = torch.ones(320, device=self.device, dtype=torch.bfloat16)
        self.bias = torch.zeros_like(self.weight)

    def benchmark_group_norm_silu(self) -> None:
        self.out = self.kernel.group_norm_silu(self.x, 32, self.weight, self.bias)

    def verify_group_norm_silu(self) -> torch.Tensor:
        return F.silu(F.group_norm(self.x, 32, self.weight, self.bias))

    def setup_geglu(self) -> None:
        self.x = torch.randn(2, 4096, 2560, device=self.device, dtype=torch.bfloat16)

    def benchmark_geglu(self) -> None:
        self.out = self.kernel.geglu(self.x)

    def verify_geglu(self) -> torch.Tensor:
        value, gate = self.x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    def setup_attention(self) -> None:
        shape = (2, 4096, 8, 40)
        self.q, self.k, self.v = (
            torch.randn(shape, device=self.device, dtype=torch.bfloat16) for _ in range(3)
        )

    def benchmark_attention(self) -> None:
        self.out = self.kernel.attention(self.q, self.k, self.v)

    def verify_attention(self) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
