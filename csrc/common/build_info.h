// Build information of the module; setup.py passes it on the command line of build_info.cpp.
#pragma once

namespace fastdiff {
struct BuildInfo {
  const char *version, *digest, *compiler, *cuda_architectures;
  const char* without_cuda;  // why the CUDA kernels are missing, or ""
  const char* sanitizers;
};
extern const BuildInfo build_info;
}  // namespace fastdiff
