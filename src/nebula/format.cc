#include "nebula/format.h"

#include <algorithm>
#include <cassert>
#include <cstddef>

#include <fmt/format.h>

namespace stellarium::nebula {
namespace {

/// Every sealed header starts with magic and checksum; the checksum covers what follows them.

std::unexpected<Error> corrupt(std::string message) {
    return fail(ErrorCode::kCorrupt, std::move(message));
}

Result<void> check_magic(uint64_t found, uint64_t expected, std::string_view what) {
    if (found == expected) {
        return {};
    }
    if (found == 0) {
        return corrupt(fmt::format("{} at offset 0: zeros instead of the magic number", what));
    }
    return corrupt(
        fmt::format("{} at offset 0: magic number {:#018x} instead of {:#018x}: not of "
                    "this format, or overwritten",
                    what, found, expected));
}

Result<void> check_sum(Bytes covered, uint64_t stored, std::string_view what) {
    const uint64_t computed = checksum64(covered);
    if (computed == stored) {
        return {};
    }
    return corrupt(
        fmt::format("{}: checksum at offset 8 is {:#018x} but the bytes from offset 16 "
                    "on have {:#018x}: damaged or torn",
                    what, stored, computed));
}

Result<void> check_zero(Bytes bytes, size_t offset, std::string_view what) {
    if (all_zero(bytes)) {
        return {};
    }
    return corrupt(fmt::format("{}: reserved bytes from offset {} on are not zero", what, offset));
}

Result<void> check_store(const StoreId& found, const StoreId& expected, std::string_view what) {
    if (found == expected) {
        return {};
    }
    return corrupt(fmt::format("{}: belongs to store {}, not to {}: a foreign file", what,
                               to_hex(found), to_hex(expected)));
}

uint32_t pages_for(size_t bytes) {
    return static_cast<uint32_t>((bytes + kPageBytes - 1) / kPageBytes);
}

template <typename T>
const T* view_of(Bytes bytes) {
    static_assert(alignof(T) == 1 && std::is_trivially_copyable_v<T>);
    assert(bytes.size() >= sizeof(T));
    return reinterpret_cast<const T*>(bytes.data());
}

template <typename T>
std::span<const T> array_of(Bytes bytes, size_t count) {
    static_assert(alignof(T) == 1 && std::is_trivially_copyable_v<T>);
    assert(bytes.size() >= count * sizeof(T));
    return {reinterpret_cast<const T*>(bytes.data()), count};
}

/// Entries must be of known kinds, within [first_page, end_page), in order and must not overlap,
/// except that members lie within their pack.
Result<void> check_entries(std::span<const Entry> entries, uint32_t first_page, uint32_t end_page,
                           bool with_members, std::string_view what) {
    uint64_t free_from = uint64_t{first_page} * kPageBytes;
    uint64_t pack_end = 0;
    for (size_t i = 0; i < entries.size(); ++i) {
        const Entry& entry = entries[i];
        const uint64_t start = entry.offset_bytes();
        uint64_t end = start + entry.length.get();
        const char* wrong = nullptr;
        const bool starts_page = entry.offset.get() == 0;
        switch (entry.entry_kind()) {
            case EntryKind::kChunk:
                if (!starts_page || entry.length.get() % kPageBytes != 0 ||
                    entry.length.get() == 0 || entry.length.get() > kMaxChunkBytes) {
                    wrong = "a chunk that is not 1 to 16 whole pages";
                }
                break;
            case EntryKind::kObject:
                if (!starts_page || entry.length.get() == 0 ||
                    entry.length.get() > kMaxObjectBytes) {
                    wrong = "an object of an impossible length or place";
                }
                break;
            case EntryKind::kPack:
                if (!starts_page || entry.length.get() < sizeof(PackHeader) ||
                    entry.length.get() > kMaxPackBytes) {
                    wrong = "a pack of an impossible length or place";
                }
                break;
            case EntryKind::kMember:
                end += sizeof(PackMember);
                if (!with_members || entry.offset.get() >= kPageBytes || end > pack_end) {
                    wrong = "a member outside its pack";
                }
                break;
            default:
                wrong = "an unknown kind";
        }
        if (wrong == nullptr && start < free_from) {
            wrong = "an overlap with the one before";
        }
        if (wrong == nullptr && end > uint64_t{end_page} * kPageBytes) {
            wrong = "an end past its batch";
        }
        if (wrong != nullptr) {
            return corrupt(
                fmt::format("{}: entry {} (kind {}, page {}, offset {}, {} bytes) has {}", what, i,
                            unsigned{entry.kind.get()}, entry.page.get(), entry.offset.get(),
                            entry.length.get(), wrong));
        }
        if (entry.entry_kind() == EntryKind::kPack) {
            // Members follow, each within the pack and after the pack's own header.
            pack_end = end;
            free_from = start + sizeof(PackHeader);
        } else if (entry.entry_kind() == EntryKind::kMember) {
            free_from = end;
        } else {
            free_from = end;
            pack_end = 0;
        }
        if (entry.entry_kind() == EntryKind::kPack && !with_members) {
            free_from = end;
        }
    }
    return {};
}

}  // namespace

std::string to_hex(const StoreId& id) {
    std::string text;
    for (const uint8_t byte : id) {
        text += fmt::format("{:02x}", byte);
    }
    return text;
}

std::string_view to_string(EntryKind kind) {
    switch (kind) {
        case EntryKind::kChunk:
            return "chunk";
        case EntryKind::kObject:
            return "object";
        case EntryKind::kPack:
            return "pack";
        case EntryKind::kMember:
            return "member";
    }
    return "unknown";
}

Result<std::string> check_versions(uint16_t read_version, uint16_t write_version,
                                   uint64_t features_refuse, uint64_t features_read_only) {
    if (read_version > kFormatReadVersion) {
        return fail(ErrorCode::kUnsupported,
                    fmt::format("read version {} at offset 16 is newer than {}, the newest that "
                                "this program reads: use a newer program",
                                read_version, kFormatReadVersion));
    }
    if (const uint64_t unknown = features_refuse & ~kKnownFeaturesRefuse; unknown != 0) {
        return fail(ErrorCode::kUnsupported,
                    fmt::format("feature bits {:#x} at offset 24 are unknown to this program and "
                                "must be known to read it: use a newer program",
                                unknown));
    }
    if (write_version > kFormatWriteVersion) {
        return fmt::format(
            "write version {} at offset 18 is newer than {}, the newest that this "
            "program writes",
            write_version, kFormatWriteVersion);
    }
    if (const uint64_t unknown = features_read_only & ~kKnownFeaturesReadOnly; unknown != 0) {
        return fmt::format(
            "feature bits {:#x} at offset 32 are unknown to this program and must "
            "be known to write it",
            unknown);
    }
    return std::string();
}

// ---- Superblock -------------------------------------------------------------------------------

void seal(SuperblockSlot& slot) {
    assert(slot.payload_bytes.get() <= kMaxCheckpointPayload);
    slot.magic = kSuperblockMagic;
    slot.read_version = kFormatReadVersion;
    slot.write_version = kFormatWriteVersion;
    slot.page_bytes = kPageBytes;
    slot.checksum = checksum64(bytes_of(slot).subspan(kSealBytes));
}

Result<SuperblockSlot> decode_superblock_slot(Bytes page) {
    constexpr std::string_view kWhat = "superblock slot";
    assert(page.size() == kPageBytes);
    const auto slot = load<SuperblockSlot>(page);
    STELLARIUM_TRY(check_magic(slot.magic, kSuperblockMagic, kWhat));
    STELLARIUM_TRY(check_sum(page.subspan(kSealBytes), slot.checksum, kWhat));
    // A newer format keeps what is above and may change all that is below.
    if (slot.read_version.get() > kFormatReadVersion ||
        (slot.features_refuse & ~kKnownFeaturesRefuse) != 0) {
        return slot;
    }
    if (slot.page_bytes != kPageBytes) {
        return fail(ErrorCode::kUnsupported,
                    fmt::format("{}: page size {} at offset 20; this program knows {}", kWhat,
                                slot.page_bytes.get(), kPageBytes));
    }
    if (slot.payload_bytes > kMaxCheckpointPayload) {
        return corrupt(fmt::format("{}: payload length {} at offset {} exceeds {}", kWhat,
                                   slot.payload_bytes.get(),
                                   offsetof(SuperblockSlot, payload_bytes), kMaxCheckpointPayload));
    }
    if (slot.log_segment.get() == 0 || slot.log_segment.get() > PageAddress::kMaxSegment ||
        slot.log_page.get() == 0 || slot.log_page.get() > kSegmentPages) {
        return corrupt(fmt::format("{}: log position segment {} page {} at offset {} is impossible",
                                   kWhat, slot.log_segment.get(), slot.log_page.get(),
                                   offsetof(SuperblockSlot, log_segment)));
    }
    const bool has_dead_map = (slot.features_refuse & kFeatureDeadMap) != 0;
    if (has_dead_map != (slot.dead_map_generation != 0) || slot.dead_map_freed > 1 ||
        (!has_dead_map && slot.dead_map_freed != 0)) {
        return corrupt(fmt::format(
            "{}: dead map {} and its state {} at offset {} contradict each other or the feature "
            "bits {:#x}",
            kWhat, slot.dead_map_generation.get(), slot.dead_map_freed.get(),
            offsetof(SuperblockSlot, dead_map_generation), slot.features_refuse.get()));
    }
    const Bytes reserved = std::as_bytes(std::span(slot.reserved));
    STELLARIUM_TRY(check_zero(reserved, offsetof(SuperblockSlot, reserved), kWhat));
    const size_t unused = offsetof(SuperblockSlot, payload) + slot.payload_bytes.get();
    STELLARIUM_TRY(check_zero(page.subspan(unused), unused, kWhat));
    return slot;
}

// ---- Segment ----------------------------------------------------------------------------------

SegmentHeader make_segment_header(const StoreId& store_id, uint32_t segment,
                                  uint64_t first_sequence) {
    SegmentHeader header{};
    header.magic = kSegmentHeaderMagic;
    header.read_version = kFormatReadVersion;
    header.write_version = kFormatWriteVersion;
    header.page_bytes = kPageBytes;
    header.store_id = store_id;
    header.segment = segment;
    header.first_sequence = first_sequence;
    header.checksum = checksum64(bytes_of(header).subspan(kSealBytes));
    return header;
}

Result<SegmentHeader> decode_segment_header(Bytes page, const StoreId& store_id, uint32_t segment) {
    constexpr std::string_view kWhat = "segment header";
    assert(page.size() == kPageBytes);
    const auto header = load<SegmentHeader>(page);
    STELLARIUM_TRY(check_magic(header.magic, kSegmentHeaderMagic, kWhat));
    STELLARIUM_TRY(check_sum(page.subspan(kSealBytes), header.checksum, kWhat));
    STELLARIUM_TRY(check_store(header.store_id, store_id, kWhat));
    STELLARIUM_TRY(check_versions(header.read_version, header.write_version, header.features_refuse,
                                  header.features_read_only));
    if (header.page_bytes != kPageBytes) {
        return fail(ErrorCode::kUnsupported,
                    fmt::format("{}: page size {} at offset 20; this program knows {}", kWhat,
                                header.page_bytes.get(), kPageBytes));
    }
    if (header.segment != segment) {
        return corrupt(fmt::format("{}: says segment {} at offset {}, but the file is named {}",
                                   kWhat, header.segment.get(), offsetof(SegmentHeader, segment),
                                   segment));
    }
    STELLARIUM_TRY(check_zero(bytes_of(header.reserved), offsetof(SegmentHeader, reserved), kWhat));
    STELLARIUM_TRY(check_zero(std::as_bytes(std::span(header.padding)),
                              offsetof(SegmentHeader, padding), kWhat));
    return header;
}

uint32_t Entry::pages() const {
    const size_t prefix = entry_kind() == EntryKind::kMember ? sizeof(PackMember) : 0;
    return std::max<uint32_t>(1, pages_for(offset.get() + prefix + length.get()));
}

uint32_t batch_header_pages(size_t entries, size_t record_bytes) {
    return pages_for(sizeof(BatchHeader) + entries * sizeof(Entry) + record_bytes);
}

bool looks_like_batch(Bytes page, const StoreId& store_id, uint32_t segment, uint32_t page_number) {
    const auto* header = view_of<BatchHeader>(page);
    return header->magic == kBatchMagic && header->store_id == store_id &&
           header->segment == segment && header->page == page_number;
}

Result<uint32_t> peek_header_pages(Bytes page, const StoreId& store_id, uint32_t segment,
                                   uint32_t page_number) {
    constexpr std::string_view kWhat = "batch header";
    const auto* header = view_of<BatchHeader>(page);
    STELLARIUM_TRY(check_magic(header->magic, kBatchMagic, kWhat));
    STELLARIUM_TRY(check_store(header->store_id, store_id, kWhat));
    if (header->segment != segment || header->page != page_number) {
        return corrupt(
            fmt::format("{}: was written for segment {} page {}, and stands in segment "
                        "{} page {}: left over from another use",
                        kWhat, header->segment.get(), header->page.get(), segment, page_number));
    }
    const uint32_t pages = header->header_pages;
    if (pages == 0 || pages > kMaxBatchHeaderPages || pages > kSegmentPages - page_number) {
        return corrupt(fmt::format("{}: {} header pages at offset {} are impossible", kWhat, pages,
                                   offsetof(BatchHeader, header_pages)));
    }
    return pages;
}

Result<BatchView> decode_batch(Bytes header_pages, const StoreId& store_id, uint32_t segment,
                               uint32_t page_number) {
    constexpr std::string_view kWhat = "batch header";
    assert(header_pages.size() >= kPageBytes);
    STELLARIUM_ASSIGN(const uint32_t pages,
                      peek_header_pages(header_pages, store_id, segment, page_number));
    assert(header_pages.size() == pages * kPageBytes);
    const auto* header = view_of<BatchHeader>(header_pages);
    STELLARIUM_TRY(check_sum(header_pages.subspan(kSealBytes), header->checksum, kWhat));

    const uint64_t tables = uint64_t{header->entries} * sizeof(Entry) + header->record_bytes.get();
    const uint64_t used = sizeof(BatchHeader) + tables;
    if (header->entries.get() > kMaxBatchDataPages ||
        header->record_bytes.get() > kMaxRecordBytes ||
        (used + kPageBytes - 1) / kPageBytes != pages) {
        return corrupt(
            fmt::format("{}: {} entries and {} record bytes at offset {} do not make {} "
                        "header pages",
                        kWhat, header->entries.get(), header->record_bytes.get(),
                        offsetof(BatchHeader, entries), pages));
    }
    if (header->data_pages.get() > kMaxBatchDataPages ||
        uint64_t{page_number} + pages + header->data_pages.get() > kSegmentPages) {
        return corrupt(fmt::format("{}: {} data pages at offset {} do not fit into a segment",
                                   kWhat, header->data_pages.get(),
                                   offsetof(BatchHeader, data_pages)));
    }
    if (header->sequence <= header->previous_sequence ||
        header->durable_through > header->previous_sequence) {
        return corrupt(
            fmt::format("{}: sequence {}, previous {} and durable through {} at offset "
                        "{} contradict each other",
                        kWhat, header->sequence.get(), header->previous_sequence.get(),
                        header->durable_through.get(), offsetof(BatchHeader, sequence)));
    }
    STELLARIUM_TRY(check_zero(bytes_of(header->reserved), offsetof(BatchHeader, reserved), kWhat));

    BatchView view;
    view.header = header;
    view.entries = array_of<Entry>(header_pages.subspan(sizeof(BatchHeader)), header->entries);
    const size_t records_at = sizeof(BatchHeader) + view.entries.size_bytes();
    view.records = header_pages.subspan(records_at, header->record_bytes);
    STELLARIUM_TRY(check_entries(view.entries, page_number + pages, view.end_page(), false, kWhat));

    uint32_t count = 0;
    for (size_t at = 0; at < view.records.size(); ++count) {
        const size_t left = view.records.size() - at;
        RecordHeader record{};
        if (left >= sizeof(RecordHeader)) {
            record = load<RecordHeader>(view.records.subspan(at));
        }
        const size_t length = record.length;
        if (left < sizeof(RecordHeader) || length > left - sizeof(RecordHeader) ||
            record.reserved != 0) {
            return corrupt(
                fmt::format("{}: record {} at offset {} claims {} bytes, and {} are "
                            "left; or its reserved bytes are not zero",
                            kWhat, count, records_at + at, length, left));
        }
        at += sizeof(RecordHeader) + length;
    }
    if (count != header->records) {
        return corrupt(fmt::format("{}: {} records at offset {}, but {} are there", kWhat,
                                   header->records.get(), offsetof(BatchHeader, records), count));
    }
    STELLARIUM_TRY(check_zero(header_pages.subspan(used), used, kWhat));
    return view;
}

Result<void> BatchView::for_each_record(
    const std::function<Result<void>(uint16_t kind, Bytes payload)>& visit) const {
    for (size_t at = 0; at < records.size();) {
        const auto record = load<RecordHeader>(records.subspan(at));
        STELLARIUM_TRY(
            visit(record.kind, records.subspan(at + sizeof(RecordHeader), record.length)));
        at += sizeof(RecordHeader) + record.length.get();
    }
    return {};
}

void seal_batch(MutableBytes header_pages) {
    BatchHeader header = load<BatchHeader>(header_pages);
    header.magic = kBatchMagic;
    header.checksum = checksum64(Bytes(header_pages).subspan(kSealBytes));
    std::memcpy(header_pages.data(), &header, kSealBytes);
}

uint32_t footer_pages(size_t entries) {
    return pages_for(entries * sizeof(Entry) + sizeof(FooterTrailer));
}

namespace {

uint64_t footer_checksum(Bytes before_trailer, const FooterTrailer& trailer) {
    return checksum64(bytes_of(trailer).subspan(kSealBytes), checksum64(before_trailer));
}

}  // namespace

std::vector<std::byte> encode_footer(const StoreId& store_id, uint32_t segment,
                                     uint32_t footer_page, std::span<const Entry> entries,
                                     uint64_t first_sequence, uint64_t last_sequence) {
    std::vector<std::byte> out(footer_pages(entries.size()) * kPageBytes);
    if (!entries.empty()) {
        std::memcpy(out.data(), entries.data(), entries.size_bytes());
    }
    FooterTrailer trailer{};
    trailer.magic = kFooterMagic;
    trailer.store_id = store_id;
    trailer.segment = segment;
    trailer.footer_page = footer_page;
    trailer.entries = static_cast<uint32_t>(entries.size());
    trailer.first_sequence = first_sequence;
    trailer.last_sequence = last_sequence;
    const size_t trailer_at = out.size() - sizeof(FooterTrailer);
    trailer.checksum = footer_checksum(Bytes(out).first(trailer_at), trailer);
    std::memcpy(out.data() + trailer_at, &trailer, sizeof(trailer));
    return out;
}

Result<FooterTrailer> decode_footer_trailer(Bytes last_page, const StoreId& store_id,
                                            uint32_t segment, uint64_t file_pages) {
    constexpr std::string_view kWhat = "footer trailer";
    assert(last_page.size() == kPageBytes);
    const auto trailer = load<FooterTrailer>(last_page.last(sizeof(FooterTrailer)));
    STELLARIUM_TRY(check_magic(trailer.magic, kFooterMagic, kWhat));
    STELLARIUM_TRY(check_store(trailer.store_id, store_id, kWhat));
    if (trailer.segment != segment) {
        return corrupt(fmt::format("{}: was written for segment {}, not {}", kWhat,
                                   trailer.segment.get(), segment));
    }
    if (file_pages > kSegmentPages || trailer.footer_page.get() == 0 ||
        trailer.footer_page.get() >= file_pages ||
        footer_pages(trailer.entries) != file_pages - trailer.footer_page) {
        return corrupt(
            fmt::format("{}: {} entries from page {} on do not end at page {}, where "
                        "the file ends",
                        kWhat, trailer.entries.get(), trailer.footer_page.get(), file_pages));
    }
    STELLARIUM_TRY(
        check_zero(bytes_of(trailer.reserved), offsetof(FooterTrailer, reserved), kWhat));
    return trailer;
}

Result<FooterView> decode_footer(Bytes footer, const StoreId& store_id, uint32_t segment,
                                 uint64_t file_pages) {
    constexpr std::string_view kWhat = "footer";
    assert(footer.size() >= kPageBytes && footer.size() % kPageBytes == 0);
    FooterView view;
    STELLARIUM_ASSIGN(view.trailer, decode_footer_trailer(footer.last(kPageBytes), store_id,
                                                          segment, file_pages));
    assert(footer.size() == (file_pages - view.trailer.footer_page.get()) * kPageBytes);
    const size_t trailer_at = footer.size() - sizeof(FooterTrailer);
    if (footer_checksum(footer.first(trailer_at), view.trailer) != view.trailer.checksum) {
        return corrupt(fmt::format("{}: the checksum does not match: damaged or torn", kWhat));
    }
    view.entries = array_of<Entry>(footer, view.trailer.entries);
    STELLARIUM_TRY(check_entries(view.entries, 1, view.trailer.footer_page, true, kWhat));
    const size_t used = view.entries.size_bytes();
    STELLARIUM_TRY(check_zero(footer.subspan(used, trailer_at - used), used, kWhat));
    return view;
}

// ---- Pack -------------------------------------------------------------------------------------

Result<PackView> decode_pack(Bytes pack) {
    constexpr std::string_view kWhat = "pack";
    if (pack.size() < sizeof(PackHeader)) {
        return corrupt(fmt::format("{}: {} bytes are too few", kWhat, pack.size()));
    }
    PackView view;
    view.header = view_of<PackHeader>(pack);
    STELLARIUM_TRY(check_magic(view.header->magic, kPackMagic, kWhat));
    if (view.header->version.get() > kPackVersion) {
        return fail(ErrorCode::kUnsupported,
                    fmt::format("{}: version {} at offset 4 is newer than {}: use a newer program",
                                kWhat, view.header->version.get(), kPackVersion));
    }
    if (view.header->bytes != pack.size()) {
        return corrupt(fmt::format("{}: length {} at offset 8, but it has {} bytes", kWhat,
                                   view.header->bytes.get(), pack.size()));
    }
    STELLARIUM_TRY(
        check_zero(bytes_of(view.header->reserved), offsetof(PackHeader, reserved), kWhat));
    const size_t members = view.header->members;
    uint64_t free_from = sizeof(PackHeader) + members * sizeof(PackEntry);
    if (free_from > pack.size()) {
        return corrupt(fmt::format("{}: {} members at offset 6 do not fit", kWhat, members));
    }
    view.entries = array_of<PackEntry>(pack.subspan(sizeof(PackHeader)), members);
    for (size_t i = 0; i < members; ++i) {
        const PackEntry& entry = view.entries[i];
        const uint64_t end = uint64_t{entry.offset} + sizeof(PackMember) +
                             entry.content_bytes.get() + entry.aux_bytes.get();
        if (entry.offset.get() < free_from || end > pack.size() || entry.reserved != 0) {
            return corrupt(fmt::format(
                "{}: member {} ({} + {} bytes at offset {}) overlaps or "
                "does not fit",
                kWhat, i, entry.content_bytes.get(), entry.aux_bytes.get(), entry.offset.get()));
        }
        free_from = end;
    }
    return view;
}

void append_member_entries(const PackView& pack, uint32_t pack_page, std::vector<Entry>& out) {
    for (const PackEntry& member : pack.entries) {
        Entry entry{};
        entry.id = member.id;
        entry.page = static_cast<uint16_t>(pack_page + member.offset.get() / kPageBytes);
        entry.offset = static_cast<uint16_t>(member.offset.get() % kPageBytes);
        entry.length = member.content_bytes.get();
        entry.kind = static_cast<uint8_t>(EntryKind::kMember);
        out.push_back(entry);
    }
}

bool PackBuilder::add(const ChunkId& id, Bytes content, Bytes aux) {
    const size_t more = sizeof(PackEntry) + sizeof(PackMember) + content.size() + aux.size();
    if (bytes() + more > kMaxPackBytes) {
        return false;
    }
    members_.push_back({id, content, aux});
    stored_bytes_ += more;
    return true;
}

size_t PackBuilder::bytes() const {
    return sizeof(PackHeader) + stored_bytes_;
}

std::vector<std::byte> PackBuilder::finish() {
    assert(!members_.empty());
    std::vector<std::byte> out;
    out.reserve(bytes());
    PackHeader header{};
    header.magic = kPackMagic;
    header.version = kPackVersion;
    header.members = static_cast<uint16_t>(members_.size());
    header.bytes = static_cast<uint32_t>(bytes());
    append_bytes(out, bytes_of(header));
    size_t at = sizeof(PackHeader) + members_.size() * sizeof(PackEntry);
    for (const Member& member : members_) {
        PackEntry entry{};
        entry.id = member.id;
        entry.offset = static_cast<uint16_t>(at);
        entry.content_bytes = static_cast<uint16_t>(member.content.size());
        entry.aux_bytes = static_cast<uint16_t>(member.aux.size());
        append_bytes(out, bytes_of(entry));
        at += sizeof(PackMember) + member.content.size() + member.aux.size();
    }
    for (const Member& member : members_) {
        PackMember prefix{};
        prefix.content_bytes = static_cast<uint16_t>(member.content.size());
        prefix.aux_bytes = static_cast<uint16_t>(member.aux.size());
        prefix.aux_checksum = static_cast<uint32_t>(checksum64(member.aux));
        append_bytes(out, bytes_of(prefix));
        append_bytes(out, member.content);
        append_bytes(out, member.aux);
    }
    assert(out.size() == bytes());
    members_.clear();
    stored_bytes_ = 0;
    return out;
}

}  // namespace stellarium::nebula
