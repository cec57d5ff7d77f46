// What the module was built with; setup.py puts it on the command line of build_info.cpp.
#pragma once

namespace fastdiff {
struct BuildInfo {
  const char *version, *digest, *compiler, *cuda_architectures;
  const char* without_cuda;  // why there are no CUDA kernels, or ""
  const char* sanitizers;
};
extern const BuildInfo build_info;
}  // namespace fastdiff
