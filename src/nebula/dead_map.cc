#include "nebula/dead_map.h"

#include <algorithm>
#include <cassert>
#include <cstddef>

#include <fmt/format.h>

namespace stellarium::nebula {
namespace {

constexpr std::string_view kWhat = "dead map";

void append_places(std::vector<std::byte>& out, const std::vector<EntryPlace>& places) {
    for (const EntryPlace place : places) {
        DeadMapPlace stored{};
        stored.page = static_cast<uint16_t>(place >> 16);
        stored.offset = static_cast<uint16_t>(place & 0xFFFF);
        append_bytes(out, bytes_of(stored));
    }
}

/// Takes structs off the front of the file, and says where something is wrong.
class Reader {
  public:
    explicit Reader(Bytes file) : file_(file) {}

    size_t offset() const { return offset_; }
    bool at_end() const { return offset_ == file_.size(); }
    template <typename T>
    bool has(uint64_t count) const {
        return count <= (file_.size() - offset_) / sizeof(T);
    }
    template <typename T>
    T take() {
        const T value = load<T>(file_.subspan(offset_));
        offset_ += sizeof(T);
        return value;
    }
    std::unexpected<Error> corrupt(size_t offset, std::string_view what) const {
        return fail(ErrorCode::kCorrupt, fmt::format("{} at offset {}: {}", kWhat, offset, what));
    }

  private:
    Bytes file_;
    size_t offset_ = 0;
};

Result<std::vector<EntryPlace>> take_places(Reader& reader, uint32_t count) {
    std::vector<EntryPlace> places;
    places.reserve(count);
    for (uint32_t i = 0; i < count; ++i) {
        const size_t offset = reader.offset();
        const auto stored = reader.take<DeadMapPlace>();
        const EntryPlace place = uint32_t{stored.page.get()} << 16 | stored.offset.get();
        if (stored.page.get() == 0 || stored.page.get() >= kSegmentPages ||
            stored.offset.get() >= kPageBytes || (i > 0 && place <= places.back())) {
            return reader.corrupt(offset, "an entry's place is impossible or out of order");
        }
        places.push_back(place);
    }
    return places;
}

Result<DeadSegment> take_segment(Reader& reader, const DeadMapSegment& row, size_t row_offset) {
    DeadSegment out;
    out.whole = row.flags == DeadMapSegment::kWhole;
    if (row.flags > DeadMapSegment::kWhole || row.reserved != 0) {
        return reader.corrupt(row_offset, "unknown flags, or reserved bytes that are not zero");
    }
    const uint64_t parts = uint64_t{row.runs} + row.members + row.damaged;
    if (out.whole != (parts == 0)) {
        return reader.corrupt(row_offset, "a segment is either dead as a whole, or in parts");
    }
    static_assert(sizeof(DeadMapRun) == sizeof(DeadMapPlace));
    if (!reader.has<DeadMapRun>(parts)) {
        return reader.corrupt(row_offset, fmt::format("{} parts reach past the end", parts));
    }
    out.runs.reserve(row.runs);
    for (uint32_t i = 0; i < row.runs; ++i) {
        const size_t offset = reader.offset();
        const auto stored = reader.take<DeadMapRun>();
        const PageRun run{.page = stored.page, .pages = stored.pages};
        if (run.page == 0 || run.pages == 0 || run.end() > kSegmentPages ||
            (i > 0 && run.page <= out.runs.back().end())) {
            return reader.corrupt(offset, "a run of pages is impossible or out of order");
        }
        out.runs.push_back(run);
    }
    STELLARIUM_ASSIGN(out.members, take_places(reader, row.members));
    STELLARIUM_ASSIGN(out.damaged, take_places(reader, row.damaged));
    return out;
}

}  // namespace

std::string dead_map_file_name(uint32_t generation) {
    return fmt::format("dead-{}.map", generation);
}

uint32_t skip_dead(std::span<const PageRun> runs, uint32_t page) {
    const auto after =
        std::ranges::partition_point(runs, [page](const PageRun& run) { return run.page <= page; });
    return after == runs.begin() ? page : std::max(page, (after - 1)->end());
}

std::vector<std::byte> encode_dead_map(const StoreId& store_id, const DeadMap& map) {
    std::vector<std::byte> out(sizeof(DeadMapHeader));
    for (const auto& [number, segment] : map.segments) {
        assert(!segment.empty());
        DeadMapSegment row{};
        row.segment = number;
        if (segment.whole) {
            row.flags = DeadMapSegment::kWhole;
            append_bytes(out, bytes_of(row));
            continue;
        }
        row.runs = static_cast<uint32_t>(segment.runs.size());
        row.members = static_cast<uint32_t>(segment.members.size());
        row.damaged = static_cast<uint32_t>(segment.damaged.size());
        append_bytes(out, bytes_of(row));
        for (const PageRun& run : segment.runs) {
            DeadMapRun stored{};
            stored.page = static_cast<uint16_t>(run.page);
            stored.pages = static_cast<uint16_t>(run.pages);
            append_bytes(out, bytes_of(stored));
        }
        append_places(out, segment.members);
        append_places(out, segment.damaged);
    }
    DeadMapHeader header{};
    header.magic = kDeadMapMagic;
    header.read_version = kFormatReadVersion;
    header.write_version = kFormatWriteVersion;
    header.page_bytes = kPageBytes;
    header.store_id = store_id;
    header.generation = map.generation;
    header.segments = static_cast<uint32_t>(map.segments.size());
    header.file_bytes = out.size();
    std::memcpy(out.data(), &header, sizeof(header));
    header.checksum = checksum64(Bytes(out).subspan(kSealBytes));
    std::memcpy(out.data(), &header, kSealBytes);
    return out;
}

Result<DeadMap> decode_dead_map(Bytes file, const StoreId& store_id, uint32_t generation) {
    Reader reader(file);
    if (!reader.has<DeadMapHeader>(1)) {
        return reader.corrupt(0, fmt::format("{} bytes are less than its header of {}: truncated",
                                             file.size(), sizeof(DeadMapHeader)));
    }
    const auto header = reader.take<DeadMapHeader>();
    if (header.magic != kDeadMapMagic) {
        return reader.corrupt(0, "not its magic number: not of this format, or overwritten");
    }
    if (const uint64_t sum = checksum64(file.subspan(kSealBytes)); sum != header.checksum) {
        return reader.corrupt(
            offsetof(DeadMapHeader, checksum),
            fmt::format("the checksum is {:#018x}, but the bytes behind it have {:#018x}: damaged "
                        "or truncated",
                        header.checksum.get(), sum));
    }
    // Whoever may not write it must not read it either: the map decides what may be written.
    STELLARIUM_ASSIGN(const std::string why_not_writable,
                      check_versions(header.read_version, header.write_version,
                                     header.features_refuse, header.features_read_only));
    if (!why_not_writable.empty()) {
        return fail(ErrorCode::kUnsupported, fmt::format("{}: {}", kWhat, why_not_writable));
    }
    if (header.store_id != store_id || header.generation != generation) {
        return reader.corrupt(
            offsetof(DeadMapHeader, store_id),
            fmt::format("belongs to store {} as number {}, not to {} as number {}",
                        to_hex(header.store_id), header.generation.get(), to_hex(store_id),
                        generation));
    }
    if (header.page_bytes != kPageBytes || header.file_bytes != file.size() ||
        !all_zero(std::as_bytes(std::span(header.reserved)))) {
        return reader.corrupt(offsetof(DeadMapHeader, generation),
                              "page size, length or reserved bytes are wrong");
    }
    DeadMap map{.generation = generation, .segments = {}};
    uint32_t last = 0;
    for (uint32_t i = 0; i < header.segments; ++i) {
        const size_t offset = reader.offset();
        if (!reader.has<DeadMapSegment>(1)) {
            return reader.corrupt(offset,
                                  fmt::format("{} segments do not fit", header.segments.get()));
        }
        const auto row = reader.take<DeadMapSegment>();
        if (row.segment <= last || row.segment > PageAddress::kMaxSegment) {
            return reader.corrupt(offset, "a segment is impossible or out of order");
        }
        last = row.segment;
        STELLARIUM_ASSIGN(map.segments[last], take_segment(reader, row, offset));
    }
    if (!reader.at_end()) {
        return reader.corrupt(reader.offset(), "bytes behind the last segment");
    }
    return map;
}

}  // namespace stellarium::nebula
