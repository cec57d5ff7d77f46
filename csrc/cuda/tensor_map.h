// Descriptions of tensors for TMA, made on the host. The driver encodes them; it is asked through the
// runtime, so the library does not link to it.

#pragma once

#include "hopper.cuh"
#include "launch.cuh"

namespace fastdiff {

/// A tensor of halves (N, rows, H, d), d dense, in boxes of `box_rows` rows of one head.
template <typename T>
const char* encode_rows(TensorMap* map, const Rows<T>& rows, int64_t samples, int count, int heads,
                        int d, int box_rows) {
  // TMA checks the stride of a dimension of one element too, though it never uses it
  const auto bytes = [d](int64_t stride, int64_t size) {
    return size > 1 ? stride * int64_t(sizeof(T)) : int64_t(ceil_div(d, 8) * 16);
  };
  const int64_t strides[3] = {bytes(rows.head, heads), bytes(rows.token, count),
                              bytes(rows.sample, samples)};
#ifdef FASTDIFF_EMULATE_CUDA
  *map = {reinterpret_cast<const unsigned char*>(rows.data),
          {d, heads, count, samples},
          {strides[0], strides[1], strides[2]},
          {kTileColumns, 1, box_rows, 1}};
  return nullptr;
#else
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    const auto status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                         cudaEnableDefault, &found);
#else
    const auto status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    const bool usable = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (encode == nullptr)
    return keep_message("the driver has no cuTensorMapEncodeTiled; update it to CUDA 12.0 or later");
  const cuuint64_t sizes[4] = {cuuint64_t(d), cuuint64_t(heads), cuuint64_t(count),
                               cuuint64_t(samples)};
  const cuuint64_t steps[3] = {cuuint64_t(strides[0]), cuuint64_t(strides[1]),
                               cuuint64_t(strides[2])};
  const cuuint32_t box[4] = {kTileColumns, 1, cuuint32_t(box_rows), 1}, ones[4] = {1, 1, 1, 1};
  constexpr auto kType = std::is_same_v<T, half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult status = encode(
      map, kType, 4, const_cast<T*>(rows.data), sizes, steps, box, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status == CUDA_SUCCESS) return nullptr;
  return keep_message("cuTensorMapEncodeTiled refused a tensor of attention");
#endif
}

/// Whether strides are such that TMA supports: multiples of 16 bytes, positive, below 2^40.
template <typename T>
bool rows_fit(const Rows<T>& rows, int64_t samples, int count, int heads) {
  const auto fits = [](int64_t stride, int64_t size) {
    const int64_t bytes = stride * int64_t(sizeof(T));
    return size == 1 || (bytes > 0 && bytes % 16 == 0 && bytes < int64_t{1} << 40);
  };
  return aligned16(rows.data) && fits(rows.head, heads) && fits(rows.token, count) &&
         fits(rows.sample, samples);
}

}  // namespace fastdiff
