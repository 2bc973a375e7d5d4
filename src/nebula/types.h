// The units and addresses that every part of the content store shares.
//
// Thread rule: everything here is a value or a constant.
#pragma once

#include <cassert>
#include <compare>
#include <cstddef>
#include <cstdint>

#include "base/bytes.h"
#include "base/hash.h"

namespace stellarium::nebula {

using stellarium::ChunkId;

/// The map unit: what a guest page, a hole and a partial reference are counted in.
inline constexpr size_t kPageBytes = 4096;
/// The dedup unit is at most this long: 64 KiB.
inline constexpr uint32_t kMaxChunkPages = 16;
inline constexpr size_t kMaxChunkBytes = kMaxChunkPages * kPageBytes;
/// A leaf of a volume's tree covers 2 MiB, a huge page. Chunks never cross a leaf's border.
inline constexpr uint32_t kLeafPages = 512;
/// A segment file holds at most 64 MiB, its header included.
inline constexpr uint32_t kSegmentPages = 16384;
static_assert(kLeafPages % kMaxChunkPages == 0 && kSegmentPages % kLeafPages == 0);

/// An object's content and the bytes stored beside it are at most this long together, so that any
/// object fits into a pack of 64 KiB with the pack's own tables.
inline constexpr size_t kMaxObjectBytes = kMaxChunkBytes - 256;
/// All records of one append together, their 8-byte headers included.
inline constexpr size_t kMaxRecordBytes = size_t{4} << 20;
/// What the layer above may keep in the superblock.
inline constexpr size_t kMaxCheckpointPayload = 1024;

/// Where a chunk begins on disk: segment (26 bits) and page within it (14 bits), 40 bits in all.
///
/// Segment numbers start at 1, so the value 0 is no address and means "nowhere". The value of all
/// ones is reserved. Ordered by segment, then page.
class PageAddress {
  public:
    static constexpr int kPageBits = 14;
    static constexpr int kBits = 40;
    static constexpr uint64_t kReserved = (uint64_t{1} << kBits) - 1;
    static constexpr uint32_t kMaxSegment = (uint32_t{1} << (kBits - kPageBits)) - 2;

    constexpr PageAddress() = default;
    /// From the stored 40-bit form.
    explicit constexpr PageAddress(uint64_t value) : value_(value) { assert(value < kReserved); }

    static constexpr PageAddress make(uint32_t segment, uint32_t page) {
        assert(segment <= kMaxSegment && page < kSegmentPages);
        return PageAddress(uint64_t{segment} << kPageBits | page);
    }

    constexpr uint32_t segment() const { return static_cast<uint32_t>(value_ >> kPageBits); }
    constexpr uint32_t page() const { return static_cast<uint32_t>(value_) & (kSegmentPages - 1); }
    constexpr uint64_t offset_bytes() const { return uint64_t{page()} * kPageBytes; }
    constexpr uint64_t value() const { return value_; }
    /// False for the default, "nowhere".
    constexpr explicit operator bool() const { return value_ != 0; }

    friend constexpr auto operator<=>(PageAddress, PageAddress) = default;

  private:
    uint64_t value_ = 0;
};
static_assert(kSegmentPages == uint32_t{1} << PageAddress::kPageBits);

}  // namespace stellarium::nebula
