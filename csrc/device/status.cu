// SPDX-License-Identifier: Apache-2.0
// Asks for the attributes of an empty kernel: that fails exactly where every other kernel of this build would.
#include "lrc/device.h"

#include <cuda_runtime.h>

namespace lrc {
namespace {
__global__ void empty_kernel() {}
}  // namespace

const char* device_status() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, empty_kernel);
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // the failure is reported here and must not surface in somebody else's next call
  return cudaGetErrorString(status);
}

int device_ptx_version() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, empty_kernel) == cudaSuccess) return attributes.ptxVersion;
  cudaGetLastError();
  return 0;
}

}  // namespace lrc
