// SPDX-License-Identifier: Apache-2.0
#define LRC_ISA avx512_bf16
#include "cpu/token_dropout.inl"
