// attention_hopper by itself, in one instance, so that a changed copy of it compiles in seconds
// (tests/kernels/test_attention_hopper.py).

#include "attention_hopper.cuh"
#include "launch.cuh"
#include "tensor_map.h"

using namespace fastdiff;

/// q and out (N, L, H, 40), k and v (N, S, H, 40), dense fp16.
FASTDIFF_EXPORT const char* hopper_probe(const void* q, const void* k, const void* v, void* out,
                                         void* lse, int64_t samples, int64_t length, int64_t keys,
                                         int64_t heads) {
  using Plan = HopperPlan<40>;
  Attention<half> p{};
  const auto rows = [heads](const void* data, int64_t count) {
    return Rows<half>{static_cast<const half*>(data), count * heads * 40, 40, int(heads * 40)};
  };
  p.q = rows(q, length);
  p.k = rows(k, keys);
  p.v = rows(v, keys);
  p.out = static_cast<half*>(out);
  p.lse = static_cast<float*>(lse);
  p.length = int(length);
  p.keys = int(keys);
  p.heads = int(heads);
  p.d = 40;
  p.factor = 0.2f;
  TensorMap maps[3];
  FASTDIFF_TRY(encode_rows(&maps[0], p.q, samples, p.length, p.heads, p.d, 64));
  FASTDIFF_TRY(encode_rows(&maps[1], p.k, samples, p.keys, p.heads, p.d, Plan::kKeys));
  FASTDIFF_TRY(encode_rows(&maps[2], p.v, samples, p.keys, p.heads, p.d, Plan::kKeys));
  const auto blocks = samples * heads * ceil_div(length, kHopperQueries);
  return launch(attention_hopper<half, 40>, grid_of(blocks), kHopperThreads, Plan::kShared,
                Target{0, nullptr}, maps[0], maps[1], maps[2], p);
}
