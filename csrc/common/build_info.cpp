#include "build_info.h"

#if defined(__clang__)
#define COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define COMPILER "g++ " __VERSION__
#else
#define COMPILER "unknown"
#endif

namespace fastdiff {
extern const BuildInfo build_info = {FASTDIFF_VERSION, FASTDIFF_DIGEST, COMPILER,
                                     FASTDIFF_CUDA_ARCHS, FASTDIFF_WITHOUT_CUDA, FASTDIFF_SANITIZERS};
}  // namespace fastdiff
