// Instructions of sm_90a: barriers in shared memory (mbarrier), copies of tiles by the tensor memory
// accelerator (TMA), asynchronous products of a warpgroup (wgmma), named barriers and the division
// of registers, in the terms of the PTX ISA ("Asynchronous warpgroup level matrix instructions").
// Under FASTDIFF_EMULATE_CUDA they are emulated by tests/cuda_host/hopper.h.
//
// They exist only where FASTDIFF_HOPPER is defined: in code for sm_90a, and under the emulation. A
// kernel that uses them is compiled for other architectures too, with a trap as its body.
//
// Tiles. A tile is rows of 64 halves, 128 bytes each, at a multiple of 1024 bytes. The 16-byte pieces
// of row r are swizzled: piece c is stored at c ^ (r % 8), as TMA writes it and wgmma reads it, so
// that neither a row nor a column of an 8 x 8 matrix has two pieces in the same banks.

#pragma once

#include "mma.cuh"

#if defined(FASTDIFF_EMULATE_CUDA)
#define FASTDIFF_HOPPER
#define __grid_constant__
#include "hopper.h"
#else
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTDIFF_HOPPER
#endif
#include <cuda.h>
#endif

namespace fastdiff {

constexpr int kWarpgroup = 128;
constexpr int kTileColumns = 64;
constexpr int kTileRow = 128;  // bytes
constexpr int kTileAlignment = 1024;

#ifdef FASTDIFF_EMULATE_CUDA
using TensorMap = emulation::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

#ifdef FASTDIFF_HOPPER

__device__ __forceinline__ unsigned shared_address(const void* p) {
#ifdef FASTDIFF_EMULATE_CUDA
  return emulation::shared_address(p);
#else
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
#endif
}

/// The index of the thread's warpgroup, through a shuffle: so the compiler knows that it is the same in
/// a whole warp. It makes wgmma wait for each product on paths that it takes for divergent.
__device__ __forceinline__ int warpgroup_index() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}

// ---------------------------------------------------------------------------------------------
// Barriers in shared memory

/// A phase of the barrier ends when `arrivals` threads have arrived and all bytes that were announced
/// have been copied; then the next phase begins. Call by one thread, before `publish_barriers`.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::barrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
#endif
}

/// Makes initialized barriers visible to TMA; other threads need __syncthreads as well.
__device__ __forceinline__ void publish_barriers() {
#ifndef FASTDIFF_EMULATE_CUDA
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::barrier_arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#endif
}

/// Arrives, and announces that so many bytes will be copied in this phase.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::barrier_arrive(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}

/// Waits for the end of the phase with this parity: 0 for the first one. A wait for the phase before
/// the first, of parity 1, returns at once.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::barrier_wait(barrier, parity, EMULATION_SITE("barrier_wait"));
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

/// Starts copying a box of a tensor with four dimensions, from `at` on (the innermost first), into a
/// tile. What lies outside the tensor becomes zeros, and counts among the bytes. By one thread.
__device__ __forceinline__ void load_tile(void* tile, const TensorMap& map, int at0, int at1,
                                          int at2, int at3, uint64_t* barrier) {
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::load_tile(tile, map, {at0, at1, at2, at3}, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(tile)),
      "l"(&map), "r"(at0), "r"(at1), "r"(at2), "r"(at3), "r"(shared_address(barrier))
      : "memory");
#endif
}

// ---------------------------------------------------------------------------------------------
// Named barriers, 1 to 15 (0 is that of __syncthreads), and registers

/// Waits until `threads` threads have called this or `named_arrive`. Whole warps.
__device__ __forceinline__ void named_sync(int id, int threads) {
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::named_barrier(id, threads, true, EMULATION_SITE("named_sync"));
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::named_barrier(id, threads, false, EMULATION_SITE("named_arrive"));
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

/// Gives registers back, or takes free ones; each warpgroup of the block calls one of them once.
template <int Registers>
__device__ __forceinline__ void release_registers() {
#ifndef FASTDIFF_EMULATE_CUDA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}
template <int Registers>
__device__ __forceinline__ void acquire_registers() {
#ifndef FASTDIFF_EMULATE_CUDA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

// ---------------------------------------------------------------------------------------------
// Products

/// Describes a tile, or a part of it, as an operand of wgmma: bits 0-13 the address, 16-29 the leading
/// and 32-45 the stride offset, all in units of 16 bytes, 62-63 the swizzle of 128 bytes.
///
/// By rows ("K-major", A or B): a row of the tile is a row of the operand, 16 of whose columns one
/// product uses; those from 16 * k on begin 32 * k bytes after the tile. Groups of 8 rows are 1024
/// bytes apart; `leading` is not used.
/// By columns ("MN-major", B): a row of the tile is a value of k with 64 columns of B; `leading` is the
/// distance in bytes between tiles of 64 columns, groups of 8 values of k are 1024 bytes apart.
__device__ __forceinline__ uint64_t describe_tile(const void* tile, int leading = 16) {
  const uint64_t address = (shared_address(tile) & 0x3ffff) >> 4;
  return address | uint64_t(leading >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t{1} << 62;
}

/// The descriptor of what lies `bytes` behind, in the same tile or in a later one.
__device__ __forceinline__ uint64_t moved(uint64_t descriptor, int bytes) {
  return descriptor + uint64_t(bytes >> 4);  // shared memory ends before the 14 bits do
}

/// Orders the registers' earlier use before the products that follow.
__device__ __forceinline__ void products_begin() {
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::products_begin();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

/// Closes a group of products.
__device__ __forceinline__ void products_commit() {
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::products_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

/// Waits until all but the `Left` most recent groups of this warp have finished: until then their
/// registers must not be touched, nor their tiles overwritten.
template <int Left>
__device__ __forceinline__ void products_wait() {
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::products_wait(Left);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
#endif
}

#ifndef FASTDIFF_EMULATE_CUDA

// Registers of C, four for every 8 columns, as text and as operands
#define FASTDIFF_T4(a, b, c, d) "%" #a ", %" #b ", %" #c ", %" #d
#define FASTDIFF_TEXT_40                                                          \
  FASTDIFF_T4(0, 1, 2, 3) ", " FASTDIFF_T4(4, 5, 6, 7) ", " FASTDIFF_T4(8, 9, 10, 11) ", " \
  FASTDIFF_T4(12, 13, 14, 15) ", " FASTDIFF_T4(16, 17, 18, 19)
#define FASTDIFF_TEXT_64                                                          \
  FASTDIFF_TEXT_40 ", " FASTDIFF_T4(20, 21, 22, 23) ", " FASTDIFF_T4(24, 25, 26, 27) ", " \
  FASTDIFF_T4(28, 29, 30, 31)
#define FASTDIFF_TEXT_80 \
  FASTDIFF_TEXT_64 ", " FASTDIFF_T4(32, 33, 34, 35) ", " FASTDIFF_T4(36, 37, 38, 39)
#define FASTDIFF_TEXT_128                                                          \
  FASTDIFF_TEXT_80 ", " FASTDIFF_T4(40, 41, 42, 43) ", " FASTDIFF_T4(44, 45, 46, 47) ", " \
  FASTDIFF_T4(48, 49, 50, 51) ", " FASTDIFF_T4(52, 53, 54, 55) ", "               \
  FASTDIFF_T4(56, 57, 58, 59) ", " FASTDIFF_T4(60, 61, 62, 63)
#define FASTDIFF_TEXT_160                                                          \
  FASTDIFF_TEXT_128 ", " FASTDIFF_T4(64, 65, 66, 67) ", " FASTDIFF_T4(68, 69, 70, 71) ", " \
  FASTDIFF_T4(72, 73, 74, 75) ", " FASTDIFF_T4(76, 77, 78, 79)
#define FASTDIFF_C4(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define FASTDIFF_C_40 FASTDIFF_C4(0), FASTDIFF_C4(1), FASTDIFF_C4(2), FASTDIFF_C4(3), FASTDIFF_C4(4)
#define FASTDIFF_C_64 FASTDIFF_C_40, FASTDIFF_C4(5), FASTDIFF_C4(6), FASTDIFF_C4(7)
#define FASTDIFF_C_80 FASTDIFF_C_64, FASTDIFF_C4(8), FASTDIFF_C4(9)
#define FASTDIFF_C_128                                                                \
  FASTDIFF_C_80, FASTDIFF_C4(10), FASTDIFF_C4(11), FASTDIFF_C4(12), FASTDIFF_C4(13), \
      FASTDIFF_C4(14), FASTDIFF_C4(15)
#define FASTDIFF_C_160 \
  FASTDIFF_C_128, FASTDIFF_C4(16), FASTDIFF_C4(17), FASTDIFF_C4(18), FASTDIFF_C4(19)

// x, y, z, u, v, w: the numbers of the operands after those of C
#define FASTDIFF_PRODUCT(N, TYPE, x, y, z)                                                   \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #z ", 0;\n"                        \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
               " {" FASTDIFF_TEXT_##N "}, %" #x ", %" #y ", keep, 1, 1, 0, 0;\n}"            \
               : FASTDIFF_C_##N                                                              \
               : "l"(a), "l"(b), "r"(int(add)))
#define FASTDIFF_PRODUCT_OF_REGISTERS(N, TYPE, x, y, z, u, v, w)                             \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #w ", 0;\n"                        \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE               \
               " {" FASTDIFF_TEXT_##N "}, {%" #x ", %" #y ", %" #z ", %" #u "}, %" #v        \
               ", keep, 1, 1, 1;\n}"                                                         \
               : FASTDIFF_C_##N                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)))

#endif

/// c (64, 8 * TILES) = A B, or += if `add`, over k = 16 and by a warpgroup; A and B are tiles by rows,
/// B's rows are the columns of c. Warp w of the warpgroup has rows 16 w to 16 w + 15 of c, laid out as
/// C of mma.cuh. Asynchronous: `products_begin` before, `products_commit` and `products_wait` after.
template <typename T, int TILES>
__device__ __forceinline__ void multiply_tiles(float (&c)[TILES][4], uint64_t a, uint64_t b,
                                               bool add) {
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::multiply_tiles<T>(c, a, b, add);
#else
  static_assert(TILES == 8 || TILES == 10 || TILES == 16, "a count that has an instance");
  constexpr bool kHalf = std::is_same_v<T, half>;
  if constexpr (TILES == 8 && kHalf) FASTDIFF_PRODUCT(64, "f16", 32, 33, 34);
  if constexpr (TILES == 8 && !kHalf) FASTDIFF_PRODUCT(64, "bf16", 32, 33, 34);
  if constexpr (TILES == 10 && kHalf) FASTDIFF_PRODUCT(80, "f16", 40, 41, 42);
  if constexpr (TILES == 10 && !kHalf) FASTDIFF_PRODUCT(80, "bf16", 40, 41, 42);
  if constexpr (TILES == 16 && kHalf) FASTDIFF_PRODUCT(128, "f16", 64, 65, 66);
  if constexpr (TILES == 16 && !kHalf) FASTDIFF_PRODUCT(128, "bf16", 64, 65, 66);
#endif
}

/// As `multiply_tiles`, with A in registers (as A of mma.cuh, rows 16 w to 16 w + 15 in warp w) and B
/// in tiles by columns.
template <typename T, int TILES>
__device__ __forceinline__ void multiply_registers(float (&c)[TILES][4], const unsigned (&a)[4],
                                                   uint64_t b, bool add) {
#ifdef FASTDIFF_EMULATE_CUDA
  emulation::multiply_registers<T>(c, a, b, add);
#else
  static_assert(TILES == 5 || TILES == 8 || TILES == 10 || TILES == 16 || TILES == 20,
                "a count that has an instance");
  constexpr bool kHalf = std::is_same_v<T, half>;
  if constexpr (TILES == 5 && kHalf)
    FASTDIFF_PRODUCT_OF_REGISTERS(40, "f16", 20, 21, 22, 23, 24, 25);
  if constexpr (TILES == 5 && !kHalf)
    FASTDIFF_PRODUCT_OF_REGISTERS(40, "bf16", 20, 21, 22, 23, 24, 25);
  if constexpr (TILES == 8 && kHalf)
    FASTDIFF_PRODUCT_OF_REGISTERS(64, "f16", 32, 33, 34, 35, 36, 37);
  if constexpr (TILES == 8 && !kHalf)
    FASTDIFF_PRODUCT_OF_REGISTERS(64, "bf16", 32, 33, 34, 35, 36, 37);
  if constexpr (TILES == 10 && kHalf)
    FASTDIFF_PRODUCT_OF_REGISTERS(80, "f16", 40, 41, 42, 43, 44, 45);
  if constexpr (TILES == 10 && !kHalf)
    FASTDIFF_PRODUCT_OF_REGISTERS(80, "bf16", 40, 41, 42, 43, 44, 45);
  if constexpr (TILES == 16 && kHalf)
    FASTDIFF_PRODUCT_OF_REGISTERS(128, "f16", 64, 65, 66, 67, 68, 69);
  if constexpr (TILES == 16 && !kHalf)
    FASTDIFF_PRODUCT_OF_REGISTERS(128, "bf16", 64, 65, 66, 67, 68, 69);
  if constexpr (TILES == 20 && kHalf)
    FASTDIFF_PRODUCT_OF_REGISTERS(160, "f16", 80, 81, 82, 83, 84, 85);
  if constexpr (TILES == 20 && !kHalf)
    FASTDIFF_PRODUCT_OF_REGISTERS(160, "bf16", 80, 81, 82, 83, 84, 85);
#endif
}

#endif  // FASTDIFF_HOPPER

}  // namespace fastdiff
