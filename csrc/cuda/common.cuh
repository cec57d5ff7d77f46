// Shared by the CUDA kernels of all ops: conversions between storage and registers, and sums over
// warps and blocks. No torch headers, so a kernel file compiles in seconds.
//
// Under FASTDIFF_EMULATE_CUDA the same source compiles with g++ and runs on the CPU
// (tests/cuda_host/emulation.h).

#pragma once

#include <cstddef>
#include <cstdint>

#ifdef FASTDIFF_EMULATE_CUDA
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// Shared memory: a fixed-size array `type name[count]`, and the block's dynamic part, 16-byte aligned
#ifdef FASTDIFF_EMULATE_CUDA
#define FASTDIFF_SHARED(type, name, count)  \
  static const char name##_declaration = 0; \
  type* name = static_cast<type*>(          \
      emulation::shared_memory(&name##_declaration, sizeof(type) * (count)))
#define FASTDIFF_DYNAMIC_SHARED(name) \
  unsigned char* name = static_cast<unsigned char*>(emulation::dynamic_shared_memory())
#else
#define FASTDIFF_SHARED(type, name, count) __shared__ type name[count]
#define FASTDIFF_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#define FASTDIFF_EXPORT extern "C" __attribute__((visibility("default")))

namespace fastdiff {

using half = __half;
using bfloat16 = __nv_bfloat16;

// ---------------------------------------------------------------------------------------------
// Numbers

/// Codes of element types; must match kernels/cuda.
enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ half from_float<half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/// V neighboring elements, moved by one instruction (16 bytes if V = 16 / sizeof(T)).
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T data[V];
};

/// Elements in the widest pack of a type.
template <typename T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

#ifndef FASTDIFF_EMULATE_CUDA
/// The machine word with that many bytes.
template <int Bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};
#endif

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_pack(const T* from) {
#ifdef FASTDIFF_EMULATE_CUDA
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Pack<T, V>)) emulation::fail("misaligned load");
#endif
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

/// Loads a pack of a tensor that the kernel does not write; such loads may move ahead of stores.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_input(const T* from) {
#ifdef FASTDIFF_EMULATE_CUDA
  return load_pack<T, V>(from);
#else
  using Word = typename WordOf<sizeof(Pack<T, V>)>::type;
  const Word word = __ldg(reinterpret_cast<const Word*>(from));
  return *reinterpret_cast<const Pack<T, V>*>(&word);
#endif
}

/// `load_input` where it is the last use: the pack need not stay in the L2, which then keeps what has not
/// been read yet.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_last(const T* from) {
#ifdef FASTDIFF_EMULATE_CUDA
  return load_pack<T, V>(from);
#else
  using Word = typename WordOf<sizeof(Pack<T, V>)>::type;
  const Word word = __ldcs(reinterpret_cast<const Word*>(from));
  return *reinterpret_cast<const Pack<T, V>*>(&word);
#endif
}

template <typename T, int V>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, V>& pack) {
#ifdef FASTDIFF_EMULATE_CUDA
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Pack<T, V>)) emulation::fail("misaligned store");
#endif
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

template <typename T, int V>
__device__ __forceinline__ void unpack(const Pack<T, V>& pack, float (&out)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] = to_float(pack.data[v]);
}

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> pack_of(const float (&in)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.data[v] = from_float<T>(in[v]);
  return pack;
}

/// A parameter tensor of any floating dtype (weights and biases: few elements, read once per block).
struct Parameter {
  const void* data;  // null if the parameter is absent
  int dtype;

  __device__ __forceinline__ float at(int64_t i, float otherwise) const {
    if (data == nullptr) return otherwise;
    switch (dtype) {
      case kFloat16:
        return to_float(static_cast<const half*>(data)[i]);
      case kBFloat16:
        return to_float(static_cast<const bfloat16*>(data)[i]);
      case kFloat64:
        return static_cast<float>(static_cast<const double*>(data)[i]);
      default:
        return static_cast<const float*>(data)[i];
    }
  }
};

// ---------------------------------------------------------------------------------------------
// Warps and blocks. Every thread of the warp (block) must call these.

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}

/// Count, mean and sum of squared deviations of some numbers.
struct Moments {
  float count = 0, mean = 0, m2 = 0;

  /// Merges both (Chan, Golub, LeVeque 1979, eq. 2.1), without a difference of large sums.
  __device__ __forceinline__ void merge(const Moments& other) {
    const float total = count + other.count;
    if (total == 0) return;
    const float delta = other.mean - mean, share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
};

/// Merges the moments of all lanes, with the same result in every lane: a butterfly in which each pair
/// merges in lane order.
__device__ __forceinline__ Moments warp_merge(Moments mine) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int bits = 1; bits < kWarpSize; bits *= 2) {
    Moments other;
    other.count = __shfl_xor_sync(kAllLanes, mine.count, bits);
    other.mean = __shfl_xor_sync(kAllLanes, mine.mean, bits);
    other.m2 = __shfl_xor_sync(kAllLanes, mine.m2, bits);
    // member by member: selecting between two structs would put both into memory
    const bool second = (lane & bits) != 0;
    Moments low, high;
    low.count = second ? other.count : mine.count;
    low.mean = second ? other.mean : mine.mean;
    low.m2 = second ? other.m2 : mine.m2;
    high.count = second ? mine.count : other.count;
    high.mean = second ? mine.mean : other.mean;
    high.m2 = second ? mine.m2 : other.m2;
    low.merge(high);
    mine = low;
  }
  return mine;
}

/// Merges the moments of all threads, with the same result in every thread. `scratch`: 3 numbers per
/// warp, free again after the call.
__device__ __forceinline__ Moments block_merge(Moments mine, float* scratch) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  mine = warp_merge(mine);
  if (threadIdx.x % kWarpSize == 0) {
    scratch[3 * warp] = mine.count;
    scratch[3 * warp + 1] = mine.mean;
    scratch[3 * warp + 2] = mine.m2;
  }
  __syncthreads();
  Moments all;
  for (int w = 0; w < warps; ++w) {
    Moments part;
    part.count = scratch[3 * w];
    part.mean = scratch[3 * w + 1];
    part.m2 = scratch[3 * w + 2];
    all.merge(part);
  }
  __syncthreads();
  return all;
}

// ---------------------------------------------------------------------------------------------
// Functions

/// 2^x and 1 / x in one instruction each, with results and inputs below 2^-126 as 0: within 2^-22 and
/// 2^-23 of the value. Without ftz the compiler adds two instructions to each.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef FASTDIFF_EMULATE_CUDA
  return emulation::flushed(std::exp2(emulation::flushed(x)));
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ float fast_reciprocal(float x) {
#ifdef FASTDIFF_EMULATE_CUDA
  return emulation::flushed(1.0f / emulation::flushed(x));
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

/// 1 / (1 + exp(-x)). Half precision takes the fast exponential and reciprocal: within 2^-18 of the
/// value for |x| <= 20, where an fp16 has 2^-11.
template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 2)
    return fast_reciprocal(1.0f + fast_exp2(x * -1.4426950408889634f));
  return 1.0f / (1.0f + expf(-x));
}

}  // namespace fastdiff
