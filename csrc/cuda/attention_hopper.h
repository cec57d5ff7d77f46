// Host side of the kernel in attention_hopper.cuh.

#pragma once

#include "attention.cuh"
#include "launch.cuh"

namespace fastdiff {

/// Whether the kernel can run this call: on a GPU of compute capability 9.0, with code for sm_90a in
/// the library, without mask and extra keys, and with strides that TMA supports.
template <typename T>
const char* hopper_serves(const Attention<T>& p, int64_t samples, const Target& target,
                          bool* serves);

/// Runs a call for which `hopper_serves` is true.
template <typename T>
const char* run_hopper(const Attention<T>& p, int64_t samples, const Target& target);

}  // namespace fastdiff
