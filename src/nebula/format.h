// The store's formats: superblock, segment header, batch, footer, pack. docs/formats/ describes
// them; format_test.cc compares the pages' tables with these structs.
//
// Every struct consists of little-endian byte arrays, so it is its own format and may be read in
// place. Every format starts with a magic number and a checksum over all that follows (footers
// end with them). The encode functions fill both; the decode functions check magic, checksum,
// store id, place, lengths and reserved bytes, so that whoever holds a decoded view needs no
// further check to stay within its bounds.
//
// Thread rule: everything here is a value or a pure function.
// Ownership: a view borrows the bytes that it was decoded from.
// Errors: kCorrupt and kUnsupported say what is wrong and at which offset within the given bytes;
// callers add the file's name and place.
//
//     auto batch = decode_batch(header_pages, store_id, segment, page);
//     if (!batch) return std::unexpected(batch.error().with_context(file.path()));
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "base/hash.h"
#include "nebula/types.h"

namespace stellarium::nebula {

/// Random, made at creation; names one store.
using StoreId = std::array<uint8_t, 16>;
/// 32 hexadecimal digits.
std::string to_hex(const StoreId& id);

/// This code reads formats whose read version is at most this, and writes those whose write version
/// is at most this.
inline constexpr uint16_t kFormatReadVersion = 1;
inline constexpr uint16_t kFormatWriteVersion = 1;
/// Feature bits that this code knows. An unknown bit in the first word means "refuse to open", in
/// the second "open read-only", in the third nothing.
inline constexpr uint64_t kKnownFeaturesRefuse = 1;
inline constexpr uint64_t kKnownFeaturesReadOnly = 0;
/// In the first word of the superblock: there is a dead map, and parts of segments are gone.
inline constexpr uint64_t kFeatureDeadMap = 1;

/// Of the formats that start with magic and checksum: what the checksum does not cover.
inline constexpr size_t kSealBytes = 16;

inline constexpr uint64_t kSuperblockMagic = 0x00505553'524C5453;     // "STLRSUP\0"
inline constexpr uint64_t kSegmentHeaderMagic = 0x00474553'524C5453;  // "STLRSEG\0"
inline constexpr uint64_t kBatchMagic = 0x00484342'524C5453;          // "STLRBCH\0"
inline constexpr uint64_t kFooterMagic = 0x00544F46'524C5453;         // "STLRFOT\0"
inline constexpr uint32_t kPackMagic = 0x4B434150;                    // "PACK"

// ---- Superblock -------------------------------------------------------------------------------

inline constexpr size_t kSuperblockSlots = 4;
inline constexpr size_t kSuperblockBytes = kSuperblockSlots * kPageBytes;

/// One of the four copies. Generation g lives in slots 2*(g%2) and 2*(g%2)+1.
struct SuperblockSlot {
    U64Le magic;
    U64Le checksum;  ///< Of the slot's bytes from 16 on.
    U16Le read_version;
    U16Le write_version;
    U32Le page_bytes;
    U64Le features_refuse;
    U64Le features_read_only;
    U64Le features_ignore;
    StoreId store_id;
    U64Le generation;
    U64Le sequence;          ///< The checkpoint holds the effect of every batch up to this one.
    U64Le durable_sequence;  ///< Every batch up to this one was durable.
    U64Le highest_sequence;  ///< No batch ever had a higher number.
    U32Le log_segment;       ///< Where the first batch after `sequence` is, or would be.
    U32Le log_page;
    U32Le last_segment;      ///< No segment ever had a higher number.
    U32Le index_generation;  ///< 0: there is no index file.
    U64Le chunks;            ///< The counters are those of the moment after batch `sequence`.
    U64Le unique_bytes;
    U64Le stored_bytes;
    U64Le appended_bytes;
    U64Le duplicate_bytes;
    U32Le payload_bytes;
    U32Le index_segment;         ///< The index file has every entry of the segments below this one.
    U64Le index_appended_bytes;  ///< appended_bytes when the index file was written.
    U32Le dead_map_generation;   ///< 0: there is no dead map.
    U32Le dead_map_freed;        ///< 1: all that it names was given back to the file system.
    std::array<uint8_t, 80> reserved;
    std::array<uint8_t, kMaxCheckpointPayload> payload;
    std::array<uint8_t, kPageBytes - 256 - kMaxCheckpointPayload> padding;
};
static_assert(sizeof(SuperblockSlot) == kPageBytes && alignof(SuperblockSlot) == 1);

/// Fills magic, versions, page size and checksum.
void seal(SuperblockSlot& slot);
/// Checks everything but versions and features, which check_versions does.
Result<SuperblockSlot> decode_superblock_slot(Bytes page);

/// The version and feature rules, the same for every format that carries them. Returns the reason
/// why it may be read and not written; empty when both are allowed; kUnsupported when neither.
Result<std::string> check_versions(uint16_t read_version, uint16_t write_version,
                                   uint64_t features_refuse, uint64_t features_read_only);

// ---- Segment ----------------------------------------------------------------------------------

/// Page 0 of a segment file.
struct SegmentHeader {
    U64Le magic;
    U64Le checksum;  ///< Of the page's bytes from 16 on.
    U16Le read_version;
    U16Le write_version;
    U32Le page_bytes;
    U64Le features_refuse;
    U64Le features_read_only;
    U64Le features_ignore;
    StoreId store_id;
    U32Le segment;
    U32Le reserved;
    U64Le first_sequence;  ///< The first batch that could go here.
    std::array<uint8_t, kPageBytes - 80> padding;
};
static_assert(sizeof(SegmentHeader) == kPageBytes && alignof(SegmentHeader) == 1);

SegmentHeader make_segment_header(const StoreId& store_id, uint32_t segment,
                                  uint64_t first_sequence);
Result<SegmentHeader> decode_segment_header(Bytes page, const StoreId& store_id, uint32_t segment);

/// What an Entry describes.
enum class EntryKind : uint8_t {
    kChunk = 1,   ///< 1 to 16 whole pages, at the start of a page.
    kObject = 2,  ///< Content of an object alone, at the start of a page.
    kPack = 3,    ///< A pack, at the start of a page; the id is the hash of the whole container.
    kMember = 4,  ///< An object in a pack: the place is that of its PackMember prefix.
};
std::string_view to_string(EntryKind kind);

/// One chunk, object or pack of a segment: in batch headers (without members) and in footers.
struct Entry {
    ChunkId id;
    U16Le page;    ///< In the segment.
    U16Le offset;  ///< In the page.
    U24Le length;  ///< Of the content; for a pack, of the container.
    U8 kind;       ///< EntryKind.

    EntryKind entry_kind() const { return static_cast<EntryKind>(kind.get()); }
    /// Byte offset in the segment file.
    uint64_t offset_bytes() const { return uint64_t{page.get()} * kPageBytes + offset.get(); }
    /// Pages from `page` to the last one touched by the stored form without aux.
    uint32_t pages() const;
    /// True when read() can serve it: whole pages at the start of a page.
    bool page_addressable() const {
        return (entry_kind() == EntryKind::kChunk || entry_kind() == EntryKind::kObject) &&
               length.get() % kPageBytes == 0 && length.get() > 0;
    }
};
static_assert(sizeof(Entry) == 40 && alignof(Entry) == 1);

inline constexpr uint32_t kMaxBatchDataPages = 2048;

/// Fixed part of a batch's header; entries and records follow at once, then zeros to the page's
/// end, then `data_pages` pages of data.
struct BatchHeader {
    U64Le magic;
    U64Le checksum;  ///< Of the header pages' bytes from 16 on.
    StoreId store_id;
    U32Le segment;  ///< Where this header stands: a copy elsewhere is no batch.
    U32Le page;
    U64Le sequence;
    U64Le previous_sequence;  ///< Of the batch before this one in the log; 0 for the first.
    U64Le durable_through;    ///< Every batch up to this one was durable when this was written.
    U32Le header_pages;
    U32Le data_pages;
    U32Le entries;
    U32Le records;
    U32Le record_bytes;
    U32Le reserved;
    U64Le duplicate_bytes;  ///< Of chunks given to append since the last batch and already there.
};
static_assert(sizeof(BatchHeader) == 96 && alignof(BatchHeader) == 1);

/// Precedes each record's payload.
struct RecordHeader {
    U16Le kind;
    U16Le reserved;
    U32Le length;
};
static_assert(sizeof(RecordHeader) == 8 && alignof(RecordHeader) == 1);

inline constexpr uint32_t kMaxBatchHeaderPages = static_cast<uint32_t>(
    (sizeof(BatchHeader) + kMaxBatchDataPages * sizeof(Entry) + kMaxRecordBytes + kPageBytes - 1) /
    kPageBytes);
static_assert(kMaxBatchHeaderPages + kMaxBatchDataPages < kSegmentPages / 2);

/// Pages that the header of a batch with so many entries and record bytes takes.
uint32_t batch_header_pages(size_t entries, size_t record_bytes);

struct BatchView {
    const BatchHeader* header = nullptr;
    std::span<const Entry> entries;
    Bytes records;

    uint32_t end_page() const {
        return header->page.get() + header->header_pages.get() + header->data_pages.get();
    }
    /// Calls `visit(kind, payload)` for each record in order, until it fails.
    Result<void> for_each_record(
        const std::function<Result<void>(uint16_t kind, Bytes payload)>& visit) const;
};

/// True when `page` starts like a batch header of this store at this place: worth decoding.
bool looks_like_batch(Bytes page, const StoreId& store_id, uint32_t segment, uint32_t page_number);
/// How many header pages the batch whose first page this is claims to have; checks magic and place.
Result<uint32_t> peek_header_pages(Bytes page, const StoreId& store_id, uint32_t segment,
                                   uint32_t page_number);
/// `header_pages` are exactly as many pages as peek_header_pages said.
Result<BatchView> decode_batch(Bytes header_pages, const StoreId& store_id, uint32_t segment,
                               uint32_t page_number);
/// Fills magic and checksum of the header that `header_pages` start with.
void seal_batch(MutableBytes header_pages);

/// The last bytes of a closed segment. Its entries start at `footer_page`.
struct FooterTrailer {
    U64Le magic;
    U64Le checksum;  ///< Of the entries and padding, then of the trailer's bytes from 16 on.
    StoreId store_id;
    U32Le segment;
    U32Le footer_page;  ///< The first page after the last batch.
    U32Le entries;
    U32Le reserved;
    U64Le first_sequence;  ///< Of the segment's batches; both 0 when there are none.
    U64Le last_sequence;
};
static_assert(sizeof(FooterTrailer) == 64 && alignof(FooterTrailer) == 1);

/// Pages that a footer with so many entries takes.
uint32_t footer_pages(size_t entries);
/// The footer's pages, sealed.
std::vector<std::byte> encode_footer(const StoreId& store_id, uint32_t segment,
                                     uint32_t footer_page, std::span<const Entry> entries,
                                     uint64_t first_sequence, uint64_t last_sequence);
struct FooterView {
    FooterTrailer trailer;
    std::span<const Entry> entries;
};
/// From the segment's last page: which trailer it ends with; checks magic, id and number.
Result<FooterTrailer> decode_footer_trailer(Bytes last_page, const StoreId& store_id,
                                            uint32_t segment, uint64_t file_pages);
/// From all of the footer's pages.
Result<FooterView> decode_footer(Bytes footer, const StoreId& store_id, uint32_t segment,
                                 uint64_t file_pages);

// ---- Pack -------------------------------------------------------------------------------------

/// A pack: header, one PackEntry for each member, then the members' stored forms.
struct PackHeader {
    U32Le magic;
    U16Le version;
    U16Le members;
    U32Le bytes;  ///< Of the whole pack.
    U32Le reserved;
};
static_assert(sizeof(PackHeader) == 16 && alignof(PackHeader) == 1);

struct PackEntry {
    ChunkId id;
    U16Le offset;  ///< In the pack, of the member's prefix.
    U16Le content_bytes;
    U16Le aux_bytes;
    U16Le reserved;
};
static_assert(sizeof(PackEntry) == 40 && alignof(PackEntry) == 1);

/// Precedes each member's content, so that reading one object needs no other part of the pack.
struct PackMember {
    U16Le content_bytes;
    U16Le aux_bytes;
    U32Le aux_checksum;  ///< Low half of checksum64 of the aux bytes, which no id covers.
};
static_assert(sizeof(PackMember) == 8 && alignof(PackMember) == 1);

inline constexpr size_t kMaxPackBytes = kMaxChunkBytes - 8;
inline constexpr uint16_t kPackVersion = 1;
static_assert(sizeof(PackHeader) + sizeof(PackEntry) + sizeof(PackMember) + kMaxObjectBytes <=
              kMaxPackBytes);
static_assert(kMaxPackBytes <= UINT16_MAX && kMaxObjectBytes <= UINT16_MAX);

struct PackView {
    const PackHeader* header = nullptr;
    std::span<const PackEntry> entries;
};
/// Checks the tables only; members are checked against their ids when they are read.
Result<PackView> decode_pack(Bytes pack);
/// Appends the segment entries of a pack's members.
void append_member_entries(const PackView& pack, uint32_t pack_page, std::vector<Entry>& out);

/// Collects objects for one pack. Bytes are borrowed until finish().
class PackBuilder {
  public:
    /// False when it does not fit any more; nothing has changed then.
    bool add(const ChunkId& id, Bytes content, Bytes aux);
    bool empty() const { return members_.empty(); }
    size_t bytes() const;
    /// The finished pack; the builder is empty again.
    std::vector<std::byte> finish();

  private:
    struct Member {
        ChunkId id;
        Bytes content;
        Bytes aux;
    };
    std::vector<Member> members_;
    size_t stored_bytes_ = 0;
};

}  // namespace stellarium::nebula
