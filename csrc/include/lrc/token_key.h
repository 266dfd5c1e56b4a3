// SPDX-License-Identifier: Apache-2.0
// The 32-bit values by which tokens are ranked: a score in the order of floats, or a random word. Host and device.
#pragma once
#include "lrc/philox.h"

namespace lrc {

/// The bits of an fp32 score -> a key of the same order; NaN is below -inf and -0 equals 0.
LRC_HOST_DEVICE inline uint32_t score_key(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 0;
  if (magnitude == 0) return 0x80000000u;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/// The word that decides about a token: key = the halves of seed, counter = (position, layer, halves of sequence id).
LRC_HOST_DEVICE inline uint32_t token_word(uint64_t seed, uint32_t position, uint32_t layer, uint64_t sequence_id) {
  const PhiloxWords counter = {
      {position, layer, static_cast<uint32_t>(sequence_id), static_cast<uint32_t>(sequence_id >> 32)}};
  return philox_4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)).word[0];
}

}  // namespace lrc
