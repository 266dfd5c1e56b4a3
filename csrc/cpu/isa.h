// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels run with: the best one of this machine unless a test forces another.
#pragma once

namespace lrc::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

Isa active_isa();
const char* isa_name(Isa isa);
bool isa_supported(Isa isa);

// Throws std::invalid_argument for an unknown name or an instruction set that this machine or build lacks.
void set_isa(const char* name);

}  // namespace lrc::cpu
