// Launcher of the forward pass of attention on sm_90a.

#include <atomic>

#include "attention_hopper.cuh"
#include "attention_hopper.h"
#include "tensor_map.h"

namespace fastdiff {
namespace {

/// Whether the library has code for sm_90a, the only architecture whose code for this kernel is not
/// a trap: only it has the barriers, in fixed shared memory.
template <typename T>
const char* has_code(bool* has) {
#ifdef FASTDIFF_EMULATE_CUDA
  *has = true;
  return nullptr;
#else
  cudaFuncAttributes attributes{};
  const auto kernel = reinterpret_cast<const void*>(attention_hopper<T, 40>);
  const auto status = cudaFuncGetAttributes(&attributes, kernel);
  *has = attributes.sharedSizeBytes > 0;
  return message_of(status);
#endif
}

const char* is_hopper(int device, bool* is) {
  int major = 0, minor = 0;
  FASTDIFF_TRY(message_of(
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)));
  FASTDIFF_TRY(message_of(
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)));
  *is = major == 9 && minor == 0;
  return nullptr;
}

/// `is_hopper` and `has_code` of the current device. The first call on a device asks the CUDA runtime
/// and keeps the answer; errors are not kept.
template <typename T>
const char* device_serves(int device, bool* serves) {
  constexpr int kDevices = 64;
  enum Answer : signed char { kUnknown, kNo, kYes };
  static std::atomic<Answer> answers[kDevices];  // zero-initialized: kUnknown
  const bool keeps = device >= 0 && device < kDevices;
  const Answer known = keeps ? answers[device].load(std::memory_order_relaxed) : kUnknown;
  *serves = known == kYes;
  if (known != kUnknown) return nullptr;
  FASTDIFF_TRY(is_hopper(device, serves));
  if (*serves) FASTDIFF_TRY(has_code<T>(serves));
  if (keeps) answers[device].store(*serves ? kYes : kNo, std::memory_order_relaxed);
  return nullptr;
}

template <typename T, int W>
const char* start(const Attention<T>& p, int64_t samples, const Target& target) {
  using Plan = HopperPlan<W>;
  const int64_t blocks = samples * p.heads * ceil_div(p.length, kHopperQueries);
  if (blocks > 0x7fffffff) return keep_message("more than 2^31 blocks of queries");
  TensorMap q, k, v;
  FASTDIFF_TRY(encode_rows(&q, p.q, samples, p.length, p.heads, p.d, 64));
  FASTDIFF_TRY(encode_rows(&k, p.k, samples, p.keys, p.heads, p.d, Plan::kKeys));
  FASTDIFF_TRY(encode_rows(&v, p.v, samples, p.keys, p.heads, p.d, Plan::kKeys));
  return launch(attention_hopper<T, W>, dim3(unsigned(blocks)), kHopperThreads, Plan::kShared,
                target, q, k, v, p);
}

}  // namespace

template <typename T>
const char* hopper_serves(const Attention<T>& p, int64_t samples, const Target& target,
                          bool* serves) {
  *serves = p.mask.data == nullptr && p.extra_keys == 0 && samples <= 0x7fffffff &&
            rows_fit(p.q, samples, p.length, p.heads) && rows_fit(p.k, samples, p.keys, p.heads) &&
            rows_fit(p.v, samples, p.keys, p.heads);
  return *serves ? device_serves<T>(target.device, serves) : nullptr;
}

template <typename T>
const char* run_hopper(const Attention<T>& p, int64_t samples, const Target& target) {
  if (p.d <= 40) return start<T, 40>(p, samples, target);
  if (p.d <= 64) return start<T, 64>(p, samples, target);
  if (p.d <= 80) return start<T, 80>(p, samples, target);
  if (p.d <= 128) return start<T, 128>(p, samples, target);
  return start<T, 160>(p, samples, target);
}

#define FASTDIFF_INSTANCES(T)                                                                  \
  template const char* hopper_serves(const Attention<T>&, int64_t, const Target&, bool*);      \
  template const char* run_hopper(const Attention<T>&, int64_t, const Target&);
FASTDIFF_INSTANCES(half)
FASTDIFF_INSTANCES(bfloat16)
#undef FASTDIFF_INSTANCES

}  // namespace fastdiff
