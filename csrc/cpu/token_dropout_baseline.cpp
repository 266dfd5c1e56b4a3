// SPDX-License-Identifier: Apache-2.0
#define LRC_ISA baseline
#include "cpu/token_dropout.inl"
