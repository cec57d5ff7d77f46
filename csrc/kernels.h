// What the CPU kernels take. A kernel is a function of one struct of pointers and sizes; it is
// compiled once per instruction set, and `run(arguments)` calls the one for this machine.
//
// All tensors of a call have one dtype but where a comment says float. Strides are in elements.
// Every kernel splits its work by the shape alone, never by the number of threads or samples in
// flight, so that a sample's bits depend on nothing but its numbers.
#pragma once

#include <cstdint>

namespace fastdiff {

enum Dtype : int32_t { F32 = 0, F16 = 1, BF16 = 2 };

// y[r, i] = x[r, i] gelu(x[r, d + i])
struct Geglu {
  Dtype dtype;
  const void* x;  // (rows, 2 d), rows x_stride apart
  void* y;        // (rows, d)
  int64_t rows, d, x_stride;
};

struct GegluBackward {
  Dtype dtype;
  const void *dy, *x;  // (rows, d), (rows, 2 d)
  void* dx;            // (rows, 2 d)
  int64_t rows, d, dy_stride, x_stride;
};

// total = x + channel_add + residual, rounded; y = activation(n^ factor + offset) with n^ the total
// normalised over the groups, factor = weight (1 + scale), offset = bias (1 + scale) + shift.
// x, residual, total, y: (n, c, space), or (n, space, c) if channels_last. Without a total there is
// nothing to add and x is normed. What may be left out is null.
struct GroupNorm {
  Dtype dtype;
  bool channels_last, silu, wide_residual;  // wide_residual: it is float
  const void *x, *residual;
  const float* channel_add;    // (n, c), or (c,) with a stride of 0
  int64_t channel_add_stride;  // from sample to sample
  void *total, *y;
  const float *weight, *bias, *scale_shift;  // (c,), (c,), (n, 2 c)
  float* stats;                // (n, groups, 3): mean, its digits below fp32, 1 / deviation
  int64_t n, c, groups, space;
  double eps;
};

// The gradients, from dy, the total (or x) and its stats. dtotal is added to dx; dchannel is the sum of
// dx over space.
struct GroupNormBackward {
  Dtype dtype;
  bool channels_last, silu;
  const void *dy, *dtotal, *x;
  void* dx;
  const float *weight, *bias, *scale_shift, *stats;
  float *dweight, *dbias, *dscale_shift, *dchannel;  // (c,), (c,), (n, 2 c), (n, c)
  int64_t n, c, groups, space;
};

// total = x + residual, rounded; y = LayerNorm of its rows. Without a total x is normed.
struct LayerNorm {
  Dtype dtype;
  bool wide_residual;                // it is float
  const void *x, *residual;          // (rows, d), rows x_stride and residual_stride apart
  void *total, *y;                   // (rows, d)
  const float *weight, *bias;        // (d,) or null
  int64_t rows, d, x_stride, residual_stride;
  double eps;
};

// The gradients, from dy and the total (or x). dtotal is added to dx; what is not wanted is null.
struct LayerNormBackward {
  Dtype dtype;
  const void *dy, *dtotal, *x;
  void* dx;
  const float* weight;
  float *dweight, *dbias;
  int64_t rows, d, dy_stride, dtotal_stride, x_stride;
  double eps;
};

// Standard normal numbers, (n, elements).
struct PhiloxNormal {
  const int64_t* seeds;  // (n,)
  float* out;
  int64_t n, elements;
  uint32_t step, stream;
};

// A row of a sampler table for each of n images, in place on x and history. An image is `runs` runs of
// `length` numbers, one after the other in x, history and denoised; in the prediction (of type dtype)
// neighbours lie `stride` apart, runs run_stride, images image_stride, the learned variance
// variance_offset behind.
struct SamplerStep {
  Dtype dtype;
  bool learned;
  float* x;                // (n, runs, length)
  const void* prediction;  // images, in any number
  float* history;          // (3, n, runs, length)
  const float* table;      // (rows, columns::COUNT)
  const int64_t* rows;     // (n,): a row of the table; -1: the image is left alone
  const int64_t* seeds;    // (n,)
  const int64_t* cond;     // (n,): images of the prediction; null: the image's own number
  const int64_t* uncond;   // (n,): the same, -1: not guided; null: none is
  float* denoised;         // (n, runs, length) or null
  bool* finite;            // (n,) or null: cleared where the prediction is not finite
  int64_t n, runs, length, image_stride, run_stride, stride, variance_offset;
  uint32_t stream;
};

// The columns of the table, as kernels/sampler_step.py names them.
namespace columns {
enum Column {
  U, V, A, B, C1, C2, C3, S, P, Q, SLOT, W, CLAMP, LOGVAR_MIN, LOGVAR_MAX, NOISE_STEP, RESCALE,
  COUNT = 20
};
}  // namespace columns

// Numbers of type dtype: heads of dense rows. Strides from sample to sample, row to row, head to head.
struct Heads {
  const void* data;
  int64_t sample, row, head;
};

// Added to the scores: float, or bytes of which 0 hides a key. Null: nothing is.
struct AttentionMask {
  const void* data;
  bool bytes;
  int64_t sample, head, query, key;  // strides
};

// out = softmax(scale q k^T + mask) v per sample and head, over the keys and then the extra keys.
struct Attention {
  Dtype dtype;
  Heads q, k, v, extra_k, extra_v;
  AttentionMask mask;
  void* out;    // (n, length, heads, d)
  float* sums;  // (2, n, heads, length) or null: the largest score of a query, the sum of exp
  int64_t n, length, heads, keys, extra_keys, d;
  int64_t threads;  // that the work is to be cut for; no bit depends on it
  double scale;
};

// The gradients, from dout, the result and its sums.
struct AttentionBackward {
  Attention forward;
  Heads dout;
  void *dq, *dk, *dv, *dextra_k, *dextra_v;  // dense, as (n, length, heads, d)
  float* dscores;  // (n, heads, length, keys + extra_keys), or null where no one asks
};

// Every struct whose kernel is compiled per instruction set.
#define FASTDIFF_KERNELS(X) \
  X(Attention)              \
  X(AttentionBackward)      \
  X(Geglu)                  \
  X(GegluBackward)          \
  X(GroupNorm)              \
  X(GroupNormBackward)      \
  X(LayerNorm)              \
  X(LayerNormBackward)      \
  X(PhiloxNormal)           \
  X(SamplerStep)

#define X(isa)                                           \
  namespace isa {                                        \
  template <class Arguments> void run(const Arguments&); \
  }
FASTDIFF_ISAS  // X(portable) X(avx2) ..., from setup.py
#undef X

#define X(Arguments) void run(const Arguments&);
FASTDIFF_KERNELS(X)
#undef X

// The instruction set in use; the first call picks the best this CPU has.
const char* isa();
// Use another one, for tests. False if it was not compiled or this CPU lacks it.
bool use_isa(const char* name);

// Threads: torch's own pool, so that there is one pool and torch.set_num_threads holds.
using ParallelFunc = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, ParallelFunc, void*);
// Without one (nullptr) everything runs on the calling thread.
void set_parallel_for(ParallelFor function);
bool has_parallel_for();
// Call f on pieces of [0, n) of at least `grain`.
void parallel_for(int64_t n, int64_t grain, ParallelFunc f, void* context);

}  // namespace fastdiff
