// Launcher of the forward pass of attention: chooses the kernel and its template instance.

#include "attention.cuh"
#include "attention_hopper.h"
#include "launch.cuh"

namespace fastdiff {
namespace {

/// Blocks that fill a GPU: about four on each of its 80 to 150 multiprocessors.
constexpr int64_t kContextBlocks = 512;

template <typename T, int W, bool MASKED>
const char* run_streaming(const Attention<T>& p, int64_t heads, const Target& target) {
  constexpr int M = kRowTiles<W, MASKED>;
  const int64_t blocks = heads * ceil_div(p.length, kQueryRows<M>);
  if (blocks > 0x7fffffff) return keep_message("more than 2^31 blocks of queries");
  return launch(attention_streaming<T, W, M, MASKED>, dim3(unsigned(blocks)), kAttentionThreads,
                kStreamingShared<W, M>, target, p);
}

template <typename T, int W, int KEYS>
const char* run_context(const Attention<T>& p, int64_t heads, const Target& target) {
  const int64_t tiles = ceil_div(p.length, 16 * kAttentionWarps);
  const int64_t rounds = ceil_div(tiles * heads, kContextBlocks);
  const int64_t blocks = ceil_div(tiles, rounds);
  if (blocks * heads > 0x7fffffff) return keep_message("more than 2^31 samples and heads");
  return launch(attention_context<T, W, KEYS>, dim3(unsigned(blocks * heads)), kAttentionThreads,
                kContextShared<W, KEYS>, target, p, int(blocks));
}

template <typename T, int W>
const char* run(const Attention<T>& p, int64_t heads, int on_chip, const Target& target) {
  if (p.mask.data != nullptr) return run_streaming<T, W, true>(p, heads, target);
  const int keys = p.keys + p.extra_keys;
  if (keys <= 80 && keys <= on_chip) return run_context<T, W, 80>(p, heads, target);
  if constexpr (W <= 80) {  // wider rows do not fit into 99 KiB
    if (keys <= 160 && keys <= on_chip) return run_context<T, W, 160>(p, heads, target);
  }
  return run_streaming<T, W, false>(p, heads, target);
}

template <typename T>
const char* run(const Attention<T>& p, int64_t samples, int on_chip, int hopper_from,
                const Target& target) {
  const int64_t heads = samples * p.heads;
  if (hopper_from >= 0 && p.length >= hopper_from && p.keys + p.extra_keys > on_chip) {
    bool serves = false;
    FASTDIFF_TRY(hopper_serves(p, samples, target, &serves));
    if (serves) return run_hopper(p, samples, target);
  }
  if (p.d <= 40) return run<T, 40>(p, heads, on_chip, target);
  if (p.d <= 64) return run<T, 64>(p, heads, on_chip, target);
  if (p.d <= 80) return run<T, 80>(p, heads, on_chip, target);
  if (p.d <= 128) return run<T, 128>(p, heads, on_chip, target);
  return run<T, 160>(p, heads, on_chip, target);
}

template <typename T>
Rows<T> rows(const void* data, const int64_t* strides) {
  return {static_cast<const T*>(data), strides[0], strides[2], int(strides[1])};
}

}  // namespace
}  // namespace fastdiff

using namespace fastdiff;

/// q (N, L, H, d), k and v (N, S, H, d), extra_k and extra_v (N, T, H, d) or null: fp16 or bf16, d
/// a multiple of 8 up to 160, rows dense and 16-byte aligned. strides: three for each tensor (sample,
/// token, head; that of tokens below 2^31), then four for the mask (sample, head, query, key). mask:
/// null, fp32 or bytes. on_chip: the most keys to keep in shared memory; beyond that the streaming
/// kernel runs. hopper_from: the least number of queries for the kernel of sm_90a, -1 for never. tops:
/// null unless the mask is fp32. N, L, H and S + T must be above 0.
FASTDIFF_EXPORT const char* fastdiff_cuda_attention(
    int device, void* stream, int dtype, int64_t n, int64_t length, int64_t keys,
    int64_t extra_keys, int heads, int d, const void* q, const void* k, const void* v,
    const void* extra_k, const void* extra_v, const void* mask, int mask_is_bytes,
    const int64_t* strides, float factor, int on_chip, int hopper_from, void* out,
    float* lse, float* tops) {
  const Target target{device, stream};
  FASTDIFF_TRY(select_device(target));
  constexpr int64_t kMost = 0x7fffffff - 1024;  // tiles extend beyond the last row
  if (length > kMost || keys + extra_keys > kMost)
    return keep_message("more than 2^31 - 1024 queries or keys");
  return with_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      Attention<T> p{};
      p.q = rows<T>(q, strides);
      p.k = rows<T>(k, strides + 3);
      p.v = rows<T>(v, strides + 6);
      p.extra_k = rows<T>(extra_k, strides + 9);
      p.extra_v = rows<T>(extra_v, strides + 12);
      p.mask = {mask, mask_is_bytes != 0, strides[15], strides[16], strides[17], strides[18]};
      p.out = static_cast<T*>(out);
      p.lse = lse;
      p.tops = tops;
      p.length = int(length);
      p.keys = int(keys);
      p.extra_keys = int(extra_keys);
      p.heads = heads;
      p.d = d;
      p.factor = factor;
      return run<T>(p, n, on_chip, hopper_from, target);
    } else {
      return keep_message("attention supports fp16 and bf16");
    }
  });
}
