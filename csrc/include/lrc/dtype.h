// SPDX-License-Identifier: Apache-2.0
// The element types that cross the C++ API as a number.
#pragma once

namespace lrc {
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
}  // namespace lrc
