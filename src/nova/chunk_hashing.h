// Hashing many chunks of mixed sizes.
//
// Thread rule: pure.
#pragma once

#include <span>

#include "base/bytes.h"
#include "base/hash.h"

namespace stellarium::nova {

/// out[i] = hash(chunks[i]), with chunks of equal size brought together so that they fill the SIMD
/// lanes. out.size() must equal chunks.size().
void hash_chunks(std::span<const Bytes> chunks, std::span<Hash256> out);

}  // namespace stellarium::nova
