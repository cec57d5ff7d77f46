"""The ops that networks are made of, as their benchmarks declare them."""

from __future__ import annotations

from benchmarks import (
    bench_add_group_norm_silu,
    bench_attention,
    bench_geglu,
    bench_group_norm_silu,
    bench_layer_norm,
)

NETWORK_OPS = (
    bench_group_norm_silu.SUBJECT,
    bench_add_group_norm_silu.SUBJECT,
    bench_attention.SUBJECT,
    bench_geglu.SUBJECT,
    bench_layer_norm.SUBJECT,
    bench_layer_norm.ADD_SUBJECT,
)
