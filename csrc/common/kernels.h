// A CPU kernel is a function of one struct of pointers and sizes (cpu/<op>.h). It is compiled once
// per instruction set, and `run(arguments)` calls the one for this machine.
//
// All tensors of a call have one dtype but where a comment says float. Strides are in elements.
// Every kernel splits its work by the shape alone, never by the number of threads or samples in
// flight, so that a sample's bits depend on nothing but its numbers.
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

// The place of the instruction set in use among FASTDIFF_ISAS.
int active_isa();

template <class Arguments> void run(const Arguments& a) {
  static constexpr void (*table[])(const Arguments&) = {
#define X(isa) &isa::run<Arguments>,
      FASTDIFF_ISAS
#undef X
  };
  table[active_isa()](a);
}

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
