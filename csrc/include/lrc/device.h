// SPDX-License-Identifier: Apache-2.0
// Whether the CUDA kernels of this build can run on the current device.
#pragma once

namespace lrc {

/// nullptr when they can, else CUDA's reason: a driver older than the runtime, no device, no kernel image for it.
const char* device_status();

}  // namespace lrc
