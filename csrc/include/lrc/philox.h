// SPDX-License-Identifier: Apache-2.0
// Philox-4x32 with 10 rounds (Salmon et al. 2011): a counter and a key in, four random words out. Host and device.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define LRC_HOST_DEVICE __host__ __device__
#elif !defined(LRC_HOST_DEVICE)
#define LRC_HOST_DEVICE
#endif

namespace lrc {

struct PhiloxWords {
  uint32_t word[4];
};

LRC_HOST_DEVICE inline PhiloxWords philox_4x32(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  uint32_t* const c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c[2];
    c[0] = static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key0;
    c[1] = static_cast<uint32_t>(product1);
    c[2] = static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key1;
    c[3] = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace lrc
