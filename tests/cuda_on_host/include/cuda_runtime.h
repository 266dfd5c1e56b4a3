// SPDX-License-Identifier: Apache-2.0
// Stands in for the header of the CUDA toolkit.
#pragma once
#include "cuda_matrix_emulation.h"
