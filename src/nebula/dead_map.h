// The dead map: which parts of segments garbage collection has given up, and which entries are
// known to be damaged. docs/formats/dead-map.md describes the file; format_test.cc compares it
// with these structs.
//
// A range is named here, and the map by the superblock, before anything of it is punched. So a scan
// never takes zeros for damage, and nothing is deduplicated against bytes that are gone.
//
// Thread rule: values and pure functions.
// Ownership: results own what they hold.
// Errors: kCorrupt and kUnsupported say what is wrong and at which offset; callers add the file.
//
//     STELLARIUM_ASSIGN(const DeadMap map, decode_dead_map(bytes, store_id, generation));
//     if (const auto it = map.segments.find(7); it != map.segments.end()) { ... }
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "nebula/format.h"
#include "nebula/types.h"

namespace stellarium::nebula {

inline constexpr uint64_t kDeadMapMagic = 0x00444544'524C5453;  // "STLRDED\0"

/// "dead-3.map", in the store's directory.
std::string dead_map_file_name(uint32_t generation);

/// Pages [page, page + pages) of a segment.
struct PageRun {
    uint32_t page = 0;
    uint32_t pages = 0;
    uint32_t end() const { return page + pages; }
    friend bool operator==(const PageRun&, const PageRun&) = default;
};

/// Where an entry stands in its segment: page and offset in it, ordered like them. No two entries
/// stand at the same place, except that a pack stands where nothing else does.
using EntryPlace = uint32_t;
inline EntryPlace place_of(const Entry& entry) {
    return uint32_t{entry.page.get()} << 16 | entry.offset.get();
}

struct DeadSegment {
    /// Nothing of it is needed; the file is about to be unlinked. The rest is empty then.
    bool whole = false;
    std::vector<PageRun> runs;        ///< Ascending, neither overlapping nor adjacent.
    std::vector<EntryPlace> members;  ///< Dead members of packs that are not dead; ascending.
    std::vector<EntryPlace> damaged;  ///< Entries that failed their check; ascending.

    bool empty() const { return !whole && runs.empty() && members.empty() && damaged.empty(); }
    friend bool operator==(const DeadSegment&, const DeadSegment&) = default;
};

struct DeadMap {
    uint32_t generation = 0;
    std::map<uint32_t, DeadSegment> segments;  ///< None of them is empty.
};

std::vector<std::byte> encode_dead_map(const StoreId& store_id, const DeadMap& map);
Result<DeadMap> decode_dead_map(Bytes file, const StoreId& store_id, uint32_t generation);

/// The end of the run that covers `page`; `page` itself when none does.
uint32_t skip_dead(std::span<const PageRun> runs, uint32_t page);

// ---- Format -----------------------------------------------------------------------------------

struct DeadMapHeader {
    U64Le magic;
    U64Le checksum;  ///< Of the file's bytes from 16 on.
    U16Le read_version;
    U16Le write_version;
    U32Le page_bytes;
    U64Le features_refuse;
    U64Le features_read_only;
    U64Le features_ignore;
    StoreId store_id;
    U32Le generation;  ///< As in the file's name.
    U32Le segments;
    U64Le file_bytes;
    std::array<uint8_t, 48> reserved;
};
static_assert(sizeof(DeadMapHeader) == 128 && alignof(DeadMapHeader) == 1);

/// Followed by `runs` DeadMapRun, `members` DeadMapPlace and `damaged` DeadMapPlace.
struct DeadMapSegment {
    static constexpr uint32_t kWhole = 1;  ///< In flags.

    U32Le segment;
    U32Le flags;
    U32Le runs;
    U32Le members;
    U32Le damaged;
    U32Le reserved;
};
static_assert(sizeof(DeadMapSegment) == 24 && alignof(DeadMapSegment) == 1);

struct DeadMapRun {
    U16Le page;
    U16Le pages;
};
static_assert(sizeof(DeadMapRun) == 4 && alignof(DeadMapRun) == 1);

struct DeadMapPlace {
    U16Le page;
    U16Le offset;
};
static_assert(sizeof(DeadMapPlace) == 4 && alignof(DeadMapPlace) == 1);

}  // namespace stellarium::nebula
