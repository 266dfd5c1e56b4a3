// SPDX-License-Identifier: Apache-2.0
#define LRC_ISA avx512
#include "cpu/token_dropout.inl"
