// Which instruction set and which threads.
#include <cstring>

#include "kernels.h"

namespace fastdiff {
namespace {

const char* const names[] = {
#define X(isa) #isa,
    FASTDIFF_ISAS
#undef X
};
constexpr int count = sizeof(names) / sizeof(names[0]);

bool cpu_has(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (std::strcmp(name, "avx2") == 0) return avx2;
  if (std::strcmp(name, "avx512") == 0)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return std::strcmp(name, "portable") == 0;
}

int best() {
  int found = 0;
  for (int i = 0; i < count; ++i)
    if (cpu_has(names[i])) found = i;
  return found;
}

int active = best();
ParallelFor pool = nullptr;

template <class Arguments> void dispatch(const Arguments& a) {
  static constexpr void (*table[])(const Arguments&) = {
#define X(isa) &isa::run<Arguments>,
      FASTDIFF_ISAS
#undef X
  };
  table[active](a);
}

}  // namespace

#define X(Arguments) \
  void run(const Arguments& a) { dispatch(a); }
FASTDIFF_KERNELS(X)
#undef X

const char* isa() { return names[active]; }

bool use_isa(const char* name) {
  for (int i = 0; i < count; ++i)
    if (std::strcmp(names[i], name) == 0 && cpu_has(name)) {
      active = i;
      return true;
    }
  return false;
}

void set_parallel_for(ParallelFor function) { pool = function; }
bool has_parallel_for() { return pool != nullptr; }

void parallel_for(int64_t n, int64_t grain, ParallelFunc f, void* context) {
  if (n <= 0) return;
  if (!pool || n <= grain)
    f(0, n, context);
  else
    pool(0, n, grain, f, context);
}

}  // namespace fastdiff
