// SPDX-License-Identifier: Apache-2.0
// Whether the CUDA kernels of this build can run on the current device, and as code for which one.
#pragma once

namespace lrc {

/// nullptr when they can, else CUDA's reason: a driver older than the runtime, no device, no kernel image for it.
const char* device_status();

/// The compute capability for which the code that runs on the current device was compiled, 90 for 9.0; 0 where none
/// runs. What the driver compiles from older PTX does no more than that PTX, whatever the device could do.
int device_ptx_version();

}  // namespace lrc
