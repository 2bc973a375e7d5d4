#include "nova/chunk_hashing.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace stellarium::nova {

void hash_chunks(std::span<const Bytes> chunks, std::span<Hash256> out) {
    std::vector<uint32_t> order(chunks.size());
    std::iota(order.begin(), order.end(), 0U);
    std::stable_sort(order.begin(), order.end(),
                     [&](uint32_t a, uint32_t b) { return chunks[a].size() < chunks[b].size(); });
    std::vector<Bytes> sorted(chunks.size());
    for (size_t i = 0; i < order.size(); ++i) {
        sorted[i] = chunks[order[i]];
    }
    std::vector<Hash256> hashes(chunks.size());
    hash_many(sorted, hashes);
    for (size_t i = 0; i < order.size(); ++i) {
        out[order[i]] = hashes[i];
    }
}

}  // namespace stellarium::nova
