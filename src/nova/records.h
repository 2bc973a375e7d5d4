// The records of the volumes layer in the log: what happened, in the order in which it happened.
//
// A record is a kind and a payload (docs/formats/records.md). encode() makes the payload; decode()
// gives the record back or says what is wrong with it. Decoding checks everything that can be
// checked without the catalog: lengths, reserved bytes, ranges, names. Catalog::apply does the
// rest.
//
//     batch.add_record(kResizeRecord, encode(ResizeRecord{.volume = 7, .size_bytes = kGiB}));
//     STELLARIUM_ASSIGN(ResizeRecord record, decode<ResizeRecord>(payload));
//
// Thread rule: pure functions and values.
// Errors: decode gives kCorrupt, naming the record's kind and the field.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "base/hash.h"
#include "nebula/types.h"
#include "nova/entity.h"
#include "nova/pieces.h"
#include "nova/tree.h"

namespace stellarium::nova {

/// Never reused for another meaning: logs hold them.
enum class RecordKind : uint16_t {
    kCreate = 0x0101,
    kClone = 0x0102,
    kSnapshot = 0x0103,
    kRollback = 0x0104,
    kResize = 0x0105,
    kRename = 0x0106,
    kRemove = 0x0107,
    kAttachment = 0x0108,
    kMap = 0x0109,
    kHole = 0x010a,
    kFold = 0x010b,
    kArena = 0x010c,
    kBoot = 0x010d,
    kSharing = 0x010e,
};

/// An image or volume comes to be: empty, or with the tree that an import built.
struct CreateRecord {
    static constexpr RecordKind kKind = RecordKind::kCreate;
    uint64_t id = 0;
    EntityKind kind = EntityKind::kVolume;  ///< kImage or kVolume.
    uint64_t size_bytes = 0;
    uint64_t created_ns = 0;  ///< Since 1970, UTC.
    uint64_t data_bytes = 0;  ///< Of an import: bytes that were no holes.
    NodeRef root;
    std::string name;
};

/// `names.size()` volumes with consecutive ids that start as equals of `source`.
struct CloneRecord {
    static constexpr RecordKind kKind = RecordKind::kClone;
    uint64_t source = 0;
    uint64_t first_id = 0;
    uint64_t size_bytes = 0;
    uint64_t created_ns = 0;
    std::vector<std::string> names;
};

struct SnapshotRecord {
    static constexpr RecordKind kKind = RecordKind::kSnapshot;
    uint64_t id = 0;
    uint64_t volume = 0;
    uint64_t created_ns = 0;
    std::string name;
};

/// The volume takes the state and the size of its snapshot.
struct RollbackRecord {
    static constexpr RecordKind kKind = RecordKind::kRollback;
    uint64_t volume = 0;
    uint64_t snapshot = 0;
};

/// A new size. When it is smaller, `root` is the tree without what lies beyond, and replay removes
/// that from the delta; when it is larger, `root` is the present one.
struct ResizeRecord {
    static constexpr RecordKind kKind = RecordKind::kResize;
    uint64_t volume = 0;
    uint64_t size_bytes = 0;
    NodeRef root;
};

struct RenameRecord {
    static constexpr RecordKind kKind = RecordKind::kRename;
    uint64_t id = 0;
    std::string name;
};

/// All of these go; the snapshots of a volume are listed with it.
struct RemoveRecord {
    static constexpr RecordKind kKind = RecordKind::kRemove;
    std::vector<uint64_t> ids;
};

/// What a frontend remembers of an attachment; nullopt forgets it.
struct AttachmentRecordBody {
    std::string label;
    std::vector<std::byte> options;
};
struct AttachmentChangeRecord {
    static constexpr RecordKind kKind = RecordKind::kAttachment;
    uint64_t id = 0;
    std::optional<AttachmentRecordBody> body;
};

/// Pages [page, page + pages) of the volume are now pages of a chunk, from `first_in_chunk` on.
/// They lie in one leaf.
struct MapEntry {
    uint64_t page = 0;
    uint8_t pages = 0;  ///< 1 to 16.
    uint8_t first_in_chunk = 0;
    ChunkId id;
    friend bool operator==(const MapEntry&, const MapEntry&) = default;
};
struct MapRecord {
    static constexpr RecordKind kKind = RecordKind::kMap;
    uint64_t volume = 0;
    std::vector<MapEntry> entries;  ///< Ascending, not overlapping.
};

/// Pages of the volume are now holes.
struct PageRange {
    uint64_t page = 0;
    uint64_t pages = 0;
    friend bool operator==(const PageRange&, const PageRange&) = default;
};
struct HoleRecord {
    static constexpr RecordKind kKind = RecordKind::kHole;
    uint64_t volume = 0;
    std::vector<PageRange> ranges;  ///< Ascending, not overlapping.
};

/// The delta over these leaves has become part of the tree.
struct FoldRecord {
    static constexpr RecordKind kKind = RecordKind::kFold;
    uint64_t volume = 0;
    NodeRef root;
    std::vector<uint32_t> leaves;  ///< Ascending.
};

/// Which memory file may hold acknowledged writes that the log does not have. Empty path: none has
/// ever been used. The name stays when the pool is closed: the file is gone then.
struct ArenaRecord {
    static constexpr RecordKind kKind = RecordKind::kArena;
    std::array<uint8_t, 16> id{};
    bool closed = false;  ///< The pool was closed cleanly; only for what people are told.
    std::string path;
};

/// The boot manifest of images with this root comes to be or is replaced, or goes (nullopt). What
/// it says is not known here (docs/formats/boot-manifest.md).
struct BootRecord {
    static constexpr RecordKind kKind = RecordKind::kBoot;
    Hash256 root;  ///< Not the empty node.
    std::optional<Pieces> manifest;
};

/// Whether others may map the image where it lies (Pool::set_shareable).
struct SharingRecord {
    static constexpr RecordKind kKind = RecordKind::kSharing;
    uint64_t id = 0;
    bool shareable = false;
};

std::vector<std::byte> encode(const CreateRecord& record);
std::vector<std::byte> encode(const CloneRecord& record);
std::vector<std::byte> encode(const SnapshotRecord& record);
std::vector<std::byte> encode(const RollbackRecord& record);
std::vector<std::byte> encode(const ResizeRecord& record);
std::vector<std::byte> encode(const RenameRecord& record);
std::vector<std::byte> encode(const RemoveRecord& record);
std::vector<std::byte> encode(const AttachmentChangeRecord& record);
std::vector<std::byte> encode(const MapRecord& record);
std::vector<std::byte> encode(const HoleRecord& record);
std::vector<std::byte> encode(const FoldRecord& record);
std::vector<std::byte> encode(const ArenaRecord& record);
std::vector<std::byte> encode(const BootRecord& record);
std::vector<std::byte> encode(const SharingRecord& record);

/// Defined for the record types above.
template <typename Record>
Result<Record> decode(Bytes payload);
template <>
Result<CreateRecord> decode(Bytes payload);
template <>
Result<CloneRecord> decode(Bytes payload);
template <>
Result<SnapshotRecord> decode(Bytes payload);
template <>
Result<RollbackRecord> decode(Bytes payload);
template <>
Result<ResizeRecord> decode(Bytes payload);
template <>
Result<RenameRecord> decode(Bytes payload);
template <>
Result<RemoveRecord> decode(Bytes payload);
template <>
Result<AttachmentChangeRecord> decode(Bytes payload);
template <>
Result<MapRecord> decode(Bytes payload);
template <>
Result<HoleRecord> decode(Bytes payload);
template <>
Result<FoldRecord> decode(Bytes payload);
template <>
Result<ArenaRecord> decode(Bytes payload);
template <>
Result<BootRecord> decode(Bytes payload);
template <>
Result<SharingRecord> decode(Bytes payload);

/// "map", "clone", ... for messages; "0x1234" for a kind that is not ours.
std::string record_kind_name(uint16_t kind);

}  // namespace stellarium::nova
