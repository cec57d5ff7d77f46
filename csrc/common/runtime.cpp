// Selection of the instruction set, and the thread pool.
#include <atomic>
#include <cstring>
#include <exception>
#include <stdexcept>

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

// The pool is a C function that turns an exception into a status code, which would lose the error.
// So the first exception of any thread is stored, and rethrown by the caller of the loop.
struct Guarded {
  ParallelFunc f;
  void* context;
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  Guarded(ParallelFunc f, void* context) : f(f), context(context) {}

  static void run(int64_t begin, int64_t end, void* self) {
    auto& guarded = *static_cast<Guarded*>(self);
    try {
      guarded.f(begin, end, guarded.context);
    } catch (...) {
      if (!guarded.failed.exchange(true)) guarded.error = std::current_exception();
    }
  }
};

}  // namespace

int active_isa() { return active; }
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
  if (!pool || n <= grain) return f(0, n, context);
  Guarded guarded(f, context);
  const int32_t status = pool(0, n, grain, &Guarded::run, &guarded);
  if (guarded.error) std::rethrow_exception(guarded.error);
  if (status != 0) throw std::runtime_error("torch's thread pool failed to run a loop");
}

}  // namespace fastdiff
