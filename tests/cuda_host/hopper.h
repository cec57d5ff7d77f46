// mbarriers, TMA, wgmma and named barriers on the CPU, for csrc/cuda/hopper.cuh.
//
// Whatever is asynchronous on a GPU happens as early or as late as it may, depending on the order of
// the threads. A copy by TMA is made when it is issued, or when the first thread waits for its barrier
// in vain. A product is made when it is issued, or when its group is waited for: so a kernel that
// reads a result too early, or lets go of a tile too early, is wrong in some order.
//
// Addresses and descriptors are decoded bit by bit as on a GPU: the address of shared memory is the
// distance from the beginning of the block's dynamic memory, and bits 4 to 6 of an address are
// exchanged with their sum, without carry, with bits 7 to 9 (the swizzle of 128 bytes).

#pragma once

#include <array>
#include <functional>
#include <vector>

#include "emulation.h"
#include "matrix.h"

namespace emulation {

/// What cuTensorMapEncodeTiled would encode: a tensor of halves with four dimensions, innermost first.
struct alignas(64) TensorMap {
  const unsigned char* data;
  int64_t sizes[4];
  int64_t strides[3];  // in bytes, of dimensions 1 to 3
  int box[4];
};

unsigned shared_address(const void* p);
/// The bytes at an address of shared memory.
unsigned char* shared_bytes(unsigned address, int count);

void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int bytes);
void barrier_wait(uint64_t* barrier, int parity, Site site);
void load_tile(void* tile, const TensorMap& map, std::array<int, 4> at, uint64_t* barrier);
void named_barrier(int id, int threads, bool waits, Site site);

void products_begin();
void products_commit();
void products_wait(int groups_left);
/// Runs a product of the open group now or when the group is waited for.
void product(std::function<void()> make);

/// An operand of wgmma in shared memory, as its descriptor says.
struct Operand {
  unsigned start, leading, stride;
  const unsigned char* memory;
  size_t size;

  explicit Operand(uint64_t descriptor);

  template <typename T>
  float at(unsigned offset) const {
    const unsigned flat = start + offset, address = flat ^ (flat >> 7 & 7) << 4;
    if (address + 2 > size) fail("wgmma beyond the shared memory");
    T x;
    std::memcpy(&x, memory + address, 2);
    return float_of(x);
  }
  /// Row r, column k < 16 of a tile by rows.
  template <typename T>
  float by_rows(int r, int k) const {
    return at<T>(r / 8 * stride + r % 8 * 128 + 2 * k);
  }
  /// Value k < 16, column c of tiles by columns.
  template <typename T>
  float by_columns(int k, int c) const {
    return at<T>(c / 64 * leading + k / 8 * stride + k % 8 * 128 + c % 64 * 2);
  }
};

/// The lane's place in its warpgroup.
inline int warpgroup_row() { return static_cast<int>(view.thread.x) % 128 / 32 * 16 + lane() / 4; }

/// c = rows B, or += if `add`: rows g and g + 8 of A, for this lane's columns of B.
template <int TILES, typename Entry>
void accumulate(float (&c)[TILES][4], const std::array<std::array<float, 16>, 2>& rows, bool add,
                const Entry& entry) {
  const int t = lane() % 4;
  for (int j = 0; j < TILES; ++j)
    for (int i = 0; i < 2; ++i) {
      float sums[2] = {add ? c[j][i] : 0.0f, add ? c[j][i + 2] : 0.0f};
      for (int k = 0; k < 16; ++k) {
        const float b = entry(k, 8 * j + 2 * t + i);
        sums[0] += rows[0][k] * b;
        sums[1] += rows[1][k] * b;
      }
      c[j][i] = sums[0];
      c[j][i + 2] = sums[1];
    }
}

template <typename T, int TILES>
void multiply_tiles(float (&c)[TILES][4], uint64_t a, uint64_t b, bool add) {
  exchange(~0u, &a, sizeof a, EMULATION_SITE("wgmma"));  // whole warps
  product([&c, x = Operand(a), y = Operand(b), add, row = warpgroup_row()] {
    std::array<std::array<float, 16>, 2> rows;
    for (int k = 0; k < 16; ++k)
      for (int r = 0; r < 2; ++r) rows[r][k] = x.by_rows<T>(row + 8 * r, k);
    accumulate(c, rows, add, [&](int k, int column) { return y.by_rows<T>(column, k); });
  });
}

template <typename T, int TILES>
void multiply_registers(float (&c)[TILES][4], const unsigned (&a)[4], uint64_t b, bool add) {
  const Slots& all = exchange(~0u, a, sizeof a, EMULATION_SITE("wgmma"));
  std::array<unsigned, 4> own;
  std::memcpy(own.data(), a, sizeof a);
  std::array<std::array<float, 16>, 2> rows;  // g and g + 8 of A
  for (int k = 0; k < 16; ++k)
    for (int r = 0; r < 2; ++r) {
      T x;
      std::memcpy(&x, all.bytes[lane() / 4 * 4 + k % 8 / 2] + 4 * (k / 8 * 2 + r) + k % 2 * 2, 2);
      rows[r][k] = float_of(x);
    }
  product([&c, &a, own, rows, y = Operand(b), add] {
    if (std::memcmp(own.data(), a, sizeof own) != 0)
      fail("wgmma: registers of A were changed before the product was waited for");
    accumulate(c, rows, add, [&](int k, int column) { return y.by_columns<T>(k, column); });
  });
}

}  // namespace emulation
