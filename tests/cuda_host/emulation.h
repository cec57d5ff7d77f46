// Runs CUDA device code on the CPU: the part of the CUDA language that csrc/cuda uses.
//
// A thread of a block is a fiber. It runs until it waits (at a barrier or a warp collective) or
// ends, and then the next one runs. The order is forward, reverse or shuffled, so that code without
// a required barrier reads memory before it is written in at least one of the orders. Shared memory
// is new heap memory of exactly the requested size, filled with NaN; AddressSanitizer guards the
// bytes around it. The threads of all blocks in a cluster run interleaved in one order; other
// blocks run one after another. Faults end the launch with a message: see `Fault`.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

/// A fault of the kernel or of its launch, such as a divergent barrier, an exceeded limit, or
/// access to the shared memory of a block that has ended.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The place in the source where a thread waits.
struct Site {
  const char* what;
  const char* file;
  int line;
};

constexpr int kWarp = 32;
constexpr size_t kSlot = 64;  // most bytes that a lane can pass to a warp collective

struct Slots {
  alignas(16) unsigned char bytes[kWarp][kSlot];
};

/// The built-in variables of the running thread.
struct View {
  dim3 thread, block, block_size, grid;
  int rank, ranks;  // the block's place in its cluster
};
extern View view;

/// Runs every thread of every block, in clusters of `cluster` blocks along x; throws Fault.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body,
         unsigned cluster = 1);
/// The most blocks per cluster on the emulated device, and the number it has room for.
int cluster_limit();
int cluster_room();

void sync_threads(Site site);
/// The two halves of a cluster barrier. The site is the caller's place in the source.
void cluster_arrive(const char* file = __builtin_FILE(), int line = __builtin_LINE());
void cluster_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE());
/// The address in block `rank` of the cluster that corresponds to this block's shared `address`.
void* map_shared(const void* address, int rank);
/// Passes `size` bytes of this lane to its warp, and returns the bytes of all 32 lanes.
const Slots& exchange(unsigned mask, const void* data, size_t size, Site site);
/// Shared memory of the block, the same for all its threads; `key` identifies a declaration.
void* shared_memory(const void* key, size_t bytes);
void* dynamic_shared_memory();
[[noreturn]] void fail(const std::string& message);

/// cp.async: depending on the order, the copy is made when it is issued or when it is waited for.
void copy_async(void* target, const void* source, int bytes, int valid);
void commit_copies();
void wait_for_copies(int groups_left);

// For instructions with state of their own (hopper.cpp)

/// Whether something asynchronous happens now, or as late as it may.
bool asynchronous_now();
/// Waits until `wake` is called with the same address, within the block.
void wait_on(const void* what, Site site);
void wake(const void* what);
/// Lets other threads run, as anywhere in a kernel.
void pause();
/// State of the running block or thread, empty at its beginning.
std::shared_ptr<void>& block_storage();
std::shared_ptr<void>& thread_storage();
size_t dynamic_shared_bytes();
/// Called at the end of every thread, and of the last one of a block.
void thread_ends();
void block_ends();

inline int lane() {
  const View& v = view;
  return static_cast<int>(v.thread.x + v.block_size.x * (v.thread.y + v.block_size.y * v.thread.z)) %
         kWarp;
}

/// As an instruction with .ftz sees a number: subnormals are zeros.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= kSlot, "too large for a shuffle");
  const Slots& slots = exchange(mask, &value, sizeof(T), site);
  T result;
  std::memcpy(&result, slots.bytes[source & (kWarp - 1)], sizeof(T));
  return result;
}

inline unsigned ballot(unsigned mask, bool predicate, Site site) {
  const Slots& slots = exchange(mask, &predicate, sizeof predicate, site);
  unsigned result = 0;
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1 && slots.bytes[i][0]) result |= 1u << i;
  return result;
}

}  // namespace emulation

inline const dim3& threadIdx = emulation::view.thread;
inline const dim3& blockIdx = emulation::view.block;
inline const dim3& blockDim = emulation::view.block_size;
inline const dim3& gridDim = emulation::view.grid;

#define EMULATION_SITE(what) (emulation::Site{what, __FILE__, __LINE__})
#define __syncthreads() emulation::sync_threads(EMULATION_SITE("__syncthreads"))
#define __syncwarp() ((void)emulation::ballot(~0u, true, EMULATION_SITE("__syncwarp")))
#define __shfl_sync(mask, value, from) \
  emulation::shuffle(mask, value, from, EMULATION_SITE("__shfl_sync"))
#define __shfl_xor_sync(mask, value, bits) \
  emulation::shuffle(mask, value, emulation::lane() ^ (bits), EMULATION_SITE("__shfl_xor_sync"))
#define __ballot_sync(mask, predicate) \
  emulation::ballot(mask, predicate, EMULATION_SITE("__ballot_sync"))

// CUDA math functions that glibc does not have or has under another name

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Half precision: two bytes of storage, converted as on a GPU (to nearest, ties to even)

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, 2);
  return static_cast<float>(value);
}
inline __half __float2half_rn(float x) {
  const _Float16 value = static_cast<_Float16>(x);
  __half result;
  std::memcpy(&result.bits, &value, 2);
  return result;
}
inline float __bfloat162float(__nv_bfloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits = __float_as_uint(x);
  if (std::isnan(x)) return {0x7fff};
  bits += 0x7fff + (bits >> 16 & 1);
  return {static_cast<uint16_t>(bits >> 16)};
}
