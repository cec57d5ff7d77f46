// Philox4x32-10, for CPUs and GPUs: Salmon et al. 2011, section 3.3. kernels/philox_normal defines
// the counter and the key.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTDIFF_DEVICE __host__ __device__
#else
#define FASTDIFF_DEVICE
#endif

namespace fastdiff {
namespace {

struct Words {
  uint32_t w[4];
};

FASTDIFF_DEVICE inline Words philox4x32(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c.w[0], p1 = uint64_t(0xCD9E8D57u) * c.w[2];
    c = {{uint32_t(p1 >> 32) ^ c.w[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w[3] ^ k1,
          uint32_t(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace
}  // namespace fastdiff
