// Kernels that test the instructions in csrc/cuda/mma.cuh. Positions of numbers in fragments are
// spelled out here as in the PTX ISA, independently of mma.cuh and of its emulation.

#include <cstring>

#include "launch.cuh"
#include "mma.cuh"

using namespace fastdiff;

namespace {

unsigned joined(half low, half high) { return low.bits | unsigned(high.bits) << 16; }
unsigned joined(bfloat16 low, bfloat16 high) { return low.bits | unsigned(high.bits) << 16; }

/// c (16, 8) += a (16, K) b (K, 8), row-major. PTX ISA: "Matrix Fragments for mma.m16n8k16", k8.
template <typename T, int K>
__global__ void products(const T* a, const T* b, float* c, bool half_a_warp) {
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, in_group = lane % 4;
  if (half_a_warp && lane >= 16) return;
  unsigned a_regs[K / 4], b_regs[K / 8];
  for (int i = 0; i < K / 2; i += 2) {  // a_i and a_(i+1)
    const bool upper = K == 16 ? (i >= 2 && i < 4) || i >= 6 : i >= 2;
    const int row = upper ? group + 8 : group;
    const int column = in_group * 2 + (K == 16 && i >= 4 ? 8 : 0);
    a_regs[i / 2] = joined(a[row * K + column], a[row * K + column + 1]);
  }
  for (int i = 0; i < K / 4; i += 2) {
    const int row = in_group * 2 + (i >= 2 ? 8 : 0);
    b_regs[i / 2] = joined(b[row * 8 + group], b[(row + 1) * 8 + group]);
  }
  float sums[4];
  for (int i = 0; i < 4; ++i)
    sums[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  if constexpr (K == 16) {
    multiply<T>(sums, a_regs, b_regs[0], b_regs[1]);
  } else {
    multiply<T>(sums, a_regs, b_regs[0]);
  }
  for (int i = 0; i < 4; ++i)
    c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = sums[i];
}

/// Copies 8 x 8 matrices through shared memory: register m of thread i is written to
/// (m, i / 4, i % 4 * 2), which reproduces the matrix unless Transposed.
template <bool Transposed, int Count>
__global__ void matrices(const uint16_t* from, uint16_t* to, int shift, bool barrier) {
  FASTDIFF_SHARED(uint16_t, kept, 64 * Count + 8);
  uint16_t* const aligned = kept + shift;
  const int lane = static_cast<int>(threadIdx.x);
  // row i is not written by the lane that passes its address to ldmatrix
  const int row = (lane + 1) % 32;
  if (row < 8 * Count)
    for (int i = 0; i < 8; ++i) aligned[8 * row + i] = from[8 * row + i];
  if (barrier) __syncwarp();
  unsigned regs[Count];
  load_matrices<Transposed>(regs, aligned + 8 * (lane % (8 * Count)));
  for (int m = 0; m < Count; ++m) {
    to[64 * m + lane / 4 * 8 + lane % 4 * 2] = static_cast<uint16_t>(regs[m] & 0xffff);
    to[64 * m + lane / 4 * 8 + lane % 4 * 2 + 1] = static_cast<uint16_t>(regs[m] >> 16);
  }
}

/// Two groups of copies, of which the second may be incomplete when the first is used.
__global__ void copies(const uint16_t* from, uint16_t* to, bool wait) {
  using Piece = Pack<uint16_t, 8>;
  FASTDIFF_SHARED(Piece, kept, 64);
  const int lane = static_cast<int>(threadIdx.x);
  for (int group = 0; group < 2; ++group) {
    copy_16(&kept[32 * group + lane], from + 8 * (32 * group + lane), lane != 5);
    commit_copies();
  }
  if (wait) wait_for_copies<1>();
  __syncwarp();
  store_pack<uint16_t, 8>(to + 8 * lane, kept[lane ^ 1]);
  wait_for_copies<0>();
}

}  // namespace

/// The kernel reads a and b, and writes or adds to c.
FASTDIFF_EXPORT const char* matrix_probe(const char* name, const void* a, const void* b, void* c) {
  const Target target{0, nullptr};
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  const auto run = [&](auto* kernel, auto... arguments) {
    return launch(kernel, dim3(1), 32, 0, target, arguments...);
  };
  const auto* ha = static_cast<const half*>(a);
  const auto* hb = static_cast<const half*>(b);
  const auto* ba = static_cast<const bfloat16*>(a);
  const auto* bb = static_cast<const bfloat16*>(b);
  const auto* from = static_cast<const uint16_t*>(a);
  auto* sums = static_cast<float*>(c);
  auto* to = static_cast<uint16_t*>(c);
  if (is("float16 16")) return run(products<half, 16>, ha, hb, sums, false);
  if (is("float16 8")) return run(products<half, 8>, ha, hb, sums, false);
  if (is("bfloat16 16")) return run(products<bfloat16, 16>, ba, bb, sums, false);
  if (is("bfloat16 8")) return run(products<bfloat16, 8>, ba, bb, sums, false);
  if (is("half a warp")) return run(products<half, 8>, ha, hb, sums, true);
  if (is("rows 2")) return run(matrices<false, 2>, from, to, 0, true);
  if (is("rows 4")) return run(matrices<false, 4>, from, to, 0, true);
  if (is("columns 2")) return run(matrices<true, 2>, from, to, 0, true);
  if (is("columns 4")) return run(matrices<true, 4>, from, to, 0, true);
  if (is("rows 4, no barrier")) return run(matrices<false, 4>, from, to, 0, false);
  if (is("rows 4, misaligned")) return run(matrices<false, 4>, from, to, 4, true);
  if (is("copies")) return run(copies, from, to, true);
  if (is("copies, no wait")) return run(copies, from, to, false);
  return "no such probe";
}
