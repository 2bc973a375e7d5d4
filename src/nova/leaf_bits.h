// One bit for each page of a leaf.
//
// Thread rule: values and pure functions.
#pragma once

#include <array>
#include <cstdint>

#include "nova/tree.h"

namespace stellarium::nova {

using LeafBits = std::array<uint64_t, kPagesPerLeaf / 64>;

inline bool has_bit(const LeafBits& bits, uint64_t page_in_leaf) {
    return (bits[page_in_leaf / 64] >> (page_in_leaf % 64) & 1) != 0;
}

inline void set_bit(LeafBits& bits, uint64_t page_in_leaf) {
    bits[page_in_leaf / 64] |= uint64_t{1} << (page_in_leaf % 64);
}

inline void clear_bit(LeafBits& bits, uint64_t page_in_leaf) {
    bits[page_in_leaf / 64] &= ~(uint64_t{1} << (page_in_leaf % 64));
}

}  // namespace stellarium::nova
