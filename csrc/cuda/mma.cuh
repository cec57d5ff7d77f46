// Instructions for the matrix unit of sm_80 and later: cp.async, ldmatrix and mma.sync, in the terms
// of the PTX ISA ("Warp-level matrix instructions"). Under FASTDIFF_EMULATE_CUDA they are emulated by
// tests/cuda_host/matrix.h.
//
// Fragments. Lane 4 g + t of a warp (g < 8, t < 4) holds pairs of neighboring elements of a tile of
// halves, two per register, the first in the low bits:
//   A (16 x 16)  a[0] = (row g, columns 2t, 2t+1), a[1] = row g + 8; a[2] and a[3] are the same rows
//                with columns + 8
//   B (16 x 8)   b[0] = (rows 2t, 2t+1 of column g), b[1] = rows + 8
//   C (16 x 8)   fp32: c[0], c[1] = (row g, columns 2t, 2t+1), c[2], c[3] = row g + 8
// Products over 8 instead of 16 use only the first half of the registers of A and B.

#pragma once

#include <type_traits>

#include "common.cuh"

#ifdef FASTDIFF_EMULATE_CUDA
#include "matrix.h"
#endif

namespace fastdiff {

// ---------------------------------------------------------------------------------------------
// Copies from global to shared memory, bypassing the registers

/// Starts copying 16 bytes, or writing 16 zero bytes if `real` is false (`from` is not read then, but
/// must still be aligned). Both addresses must be multiples of 16.
__device__ __forceinline__ void copy_16(void* to, const void* from, bool real) {
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::copy_async(to, from, 16, real ? 16 : 0);
#else
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from),
               "r"(real ? 16 : 0)
               : "memory");
#endif
}

/// Closes a group, which contains this thread's copies since the previous group.
__device__ __forceinline__ void commit_copies() {
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits until all but the `Left` most recent groups of this thread have arrived. Other threads see
/// the data after a barrier.
template <int Left>
__device__ __forceinline__ void wait_for_copies() {
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::wait_for_copies(Left);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
#endif
}

// ---------------------------------------------------------------------------------------------
// Fragments

/// Loads Count (2 or 4) matrices of 8 x 8 halves from shared memory. Lane i passes the address of row
/// i % 8 of matrix i / 8, 16 bytes at a multiple of 16. Register m of lane 4 g + t receives row g,
/// columns 2t, 2t+1 of matrix m, or if Transposed, rows 2t, 2t+1 of column g.
template <bool Transposed, int Count>
__device__ __forceinline__ void load_matrices(unsigned (&to)[Count], const void* row) {
  static_assert(Count == 2 || Count == 4, "two or four matrices");
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::load_matrices(to, Count, Transposed, row);
#else
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (Count == 4 && Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else if constexpr (Count == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
  }
#endif
}

/// c += A B, 16 x 8, summed over 16 in fp32.
template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                         unsigned b1) {
#ifdef FASTDIFF_EMULATE_CUDA
  const unsigned b[2] = {b0, b1};
  emulation::multiply<T>(c, a, b, 16);
#else
  if constexpr (std::is_same_v<T, half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

/// c += A B, 16 x 8, summed over 8: A is 16 x 8, B is 8 x 8.
template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[2], unsigned b0) {
#ifdef FASTDIFF_EMULATE_CUDA
  const unsigned b[1] = {b0};
  emulation::multiply<T>(c, a, b, 8);
#else
  if constexpr (std::is_same_v<T, half>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
  }
#endif
}

/// Rounds two numbers and packs them into one register, the first in the low bits.
template <typename T>
__device__ __forceinline__ unsigned pair_of(float low, float high) {
#ifdef FASTDIFF_EMULATE_CUDA
  return static_cast<unsigned>(from_float<T>(low).bits) |
         static_cast<unsigned>(from_float<T>(high).bits) << 16;
#else
  if constexpr (std::is_same_v<T, half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  }
#endif
}

}  // namespace fastdiff
