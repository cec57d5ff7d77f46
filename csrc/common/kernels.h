// A CPU kernel is a function of one struct of pointers and sizes (cpu/<op>.h). It is compiled once
// per instruction set, and `run(arguments)` calls the version for this machine.
//
// All tensors of a call have the same dtype except where a comment says float. Strides are in
// elements. Every kernel splits its work by the shape alone, never by the number of threads or of
// samples in flight, so that a sample's result depends only on its own values, bit for bit.
#pragma once

#include <cstdint>

namespace fastdiff {

enum Dtype : int32_t { F32 = 0, F16 = 1, BF16 = 2 };

#define X(isa)                                           \
  namespace isa {                                        \
  template <class Arguments> void run(const Arguments&); \
  }
FASTDIFF_ISAS  // X(portable) X(avx2) ..., from setup.py
#undef X

// The index in FASTDIFF_ISAS of the instruction set in use.
int active_isa();

template <class Arguments> void run(const Arguments& a) {
  static constexpr void (*table[])(const Arguments&) = {
#define X(isa) &isa::run<Arguments>,
      FASTDIFF_ISAS
#undef X
  };
  table[active_isa()](a);
}

// The instruction set in use; by default the best that this CPU supports.
const char* isa();
// Switch to another one, for tests. False if it was not compiled or this CPU lacks it.
bool use_isa(const char* name);

// Threads come from torch's own pool, so that there is only one and torch.set_num_threads applies.
using ParallelFunc = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, ParallelFunc, void*);
// If it is nullptr, everything runs on the calling thread.
void set_parallel_for(ParallelFor function);
bool has_parallel_for();
// Call f on pieces of [0, n), each of at least `grain`.
void parallel_for(int64_t n, int64_t grain, ParallelFunc f, void* context);

}  // namespace fastdiff
