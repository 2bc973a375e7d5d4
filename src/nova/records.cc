#include "nova/records.h"

#include <algorithm>
#include <cassert>

#include <fmt/format.h>

#include "nova/format.h"
#include "nova/limits.h"

namespace stellarium::nova {
namespace {

/// Builds a payload front to back.
class Writer {
  public:
    template <typename Struct>
    void put(const Struct& value) {
        put_bytes(bytes_of(value));
    }
    void put_bytes(Bytes bytes) { out_.insert(out_.end(), bytes.begin(), bytes.end()); }
    void put_text(std::string_view text) { put_bytes(bytes_of(text)); }
    std::vector<std::byte> take() {
        assert(out_.size() <= kMaxRecordBytes);
        return std::move(out_);
    }

  private:
    std::vector<std::byte> out_;
};

/// Reads a payload front to back; every error names the record's kind.
class Parser {
  public:
    Parser(RecordKind kind, Bytes payload) : kind_(kind), rest_(payload) {}

    std::unexpected<Error> bad(std::string_view why) const {
        return fail(
            ErrorCode::kCorrupt,
            fmt::format("{} record: {}", record_kind_name(static_cast<uint16_t>(kind_)), why));
    }

    template <typename Struct>
    Result<Struct> get() {
        if (rest_.size() < sizeof(Struct)) {
            return bad(fmt::format("{} bytes are too few", rest_.size()));
        }
        Struct value = load<Struct>(rest_);
        rest_ = rest_.subspan(sizeof(Struct));
        return value;
    }

    Result<Bytes> get_bytes(size_t count) {
        if (rest_.size() < count) {
            return bad(fmt::format("it ends {} bytes early", count - rest_.size()));
        }
        const Bytes bytes = rest_.first(count);
        rest_ = rest_.subspan(count);
        return bytes;
    }

    Result<std::string> get_text(size_t count) {
        STELLARIUM_ASSIGN(const Bytes bytes, get_bytes(count));
        std::string text(count, '\0');
        std::transform(bytes.begin(), bytes.end(), text.begin(),
                       [](std::byte b) { return static_cast<char>(b); });
        return text;
    }

    Result<std::string> get_name(size_t count) {
        STELLARIUM_ASSIGN(std::string name, get_text(count));
        if (!check_name(name)) {
            return bad(fmt::format("its name of {} bytes is not a valid name", count));
        }
        return name;
    }

    Result<void> finish() const {
        if (!rest_.empty()) {
            return bad(fmt::format("{} bytes follow its end", rest_.size()));
        }
        return {};
    }

    size_t remaining() const { return rest_.size(); }

  private:
    RecordKind kind_;
    Bytes rest_;
};

format::NodeName to_format(const NodeRef& node) {
    format::NodeName name{};
    name.id = node.id;
    name.hint = node.hint ? node.hint->value() : 0;
    return name;
}

std::optional<NodeRef> from_format(const format::NodeName& name) {
    if (name.hint.get() >= nebula::PageAddress::kReserved) {
        return std::nullopt;
    }
    NodeRef node{.id = name.id, .hint = std::nullopt};
    if (name.hint.get() != 0) {
        node.hint = nebula::PageAddress(name.hint.get());
    }
    return node;
}

template <size_t N>
bool is_zero(const std::array<uint8_t, N>& reserved) {
    return std::all_of(reserved.begin(), reserved.end(), [](uint8_t b) { return b == 0; });
}

bool page_range_is_valid(uint64_t page, uint64_t pages) {
    return pages > 0 && pages <= kMaxPages && page <= kMaxPages - pages;
}

U8 length8(size_t length) {
    assert(length <= 0xff);
    return U8(static_cast<uint8_t>(length));
}
U16Le length16(size_t length) {
    assert(length <= 0xffff);
    return U16Le(static_cast<uint16_t>(length));
}
U32Le length32(size_t length) {
    assert(length <= 0xffff'ffff);
    return U32Le(static_cast<uint32_t>(length));
}

}  // namespace

std::string record_kind_name(uint16_t kind) {
    switch (static_cast<RecordKind>(kind)) {
        case RecordKind::kCreate:
            return "create";
        case RecordKind::kClone:
            return "clone";
        case RecordKind::kSnapshot:
            return "snapshot";
        case RecordKind::kRollback:
            return "rollback";
        case RecordKind::kResize:
            return "resize";
        case RecordKind::kRename:
            return "rename";
        case RecordKind::kRemove:
            return "remove";
        case RecordKind::kAttachment:
            return "attachment";
        case RecordKind::kMap:
            return "map";
        case RecordKind::kHole:
            return "hole";
        case RecordKind::kFold:
            return "fold";
        case RecordKind::kArena:
            return "arena";
        case RecordKind::kSharing:
            return "sharing";
        case RecordKind::kBoot:
            return "boot";
    }
    return fmt::format("{:#06x}", kind);
}

std::string_view kind_name(EntityKind kind) {
    switch (kind) {
        case EntityKind::kImage:
            return "image";
        case EntityKind::kVolume:
            return "volume";
        case EntityKind::kSnapshot:
            return "snapshot";
    }
    return "entity";
}

Result<void> check_name(std::string_view name) {
    const auto allowed = [](char c) {
        return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') ||
               c == '.' || c == '_' || c == '-';
    };
    if (name.empty() || name.size() > kMaxNameBytes ||
        !std::all_of(name.begin(), name.end(), allowed) || name == "." || name == "..") {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("'{}' is not a valid name: use 1 to {} of A-Z a-z 0-9 . _ - (and "
                                "not '.' or '..' alone)",
                                name.substr(0, kMaxNameBytes), kMaxNameBytes));
    }
    return {};
}

// --- Create --------------------------------------------------------------------------------------

std::vector<std::byte> encode(const CreateRecord& record) {
    format::Create head{};
    head.id = record.id;
    head.kind = static_cast<uint8_t>(record.kind);
    head.name_bytes = length8(record.name.size());
    head.size_bytes = record.size_bytes;
    head.created_ns = record.created_ns;
    head.data_bytes = record.data_bytes;
    head.root = to_format(record.root);
    Writer out;
    out.put(head);
    out.put_text(record.name);
    return out.take();
}

template <>
Result<CreateRecord> decode(Bytes payload) {
    Parser in(CreateRecord::kKind, payload);
    STELLARIUM_ASSIGN(const auto head, in.get<format::Create>());
    const auto root = from_format(head.root);
    if (head.kind > static_cast<uint8_t>(EntityKind::kVolume) || !is_zero(head.reserved) || !root ||
        head.size_bytes > kMaxVolumeBytes) {
        return in.bad("kind, size, root hint or reserved bytes are out of range");
    }
    CreateRecord record{.id = head.id,
                        .kind = static_cast<EntityKind>(head.kind.get()),
                        .size_bytes = head.size_bytes,
                        .created_ns = head.created_ns,
                        .data_bytes = head.data_bytes,
                        .root = *root,
                        .name = {}};
    STELLARIUM_ASSIGN(record.name, in.get_name(head.name_bytes));
    STELLARIUM_TRY(in.finish());
    return record;
}

// --- Clone ---------------------------------------------------------------------------------------

std::vector<std::byte> encode(const CloneRecord& record) {
    format::Clone head{};
    head.source = record.source;
    head.first_id = record.first_id;
    head.size_bytes = record.size_bytes;
    head.created_ns = record.created_ns;
    head.count = length32(record.names.size());
    Writer out;
    out.put(head);
    for (const std::string& name : record.names) {
        out.put(length8(name.size()));
        out.put_text(name);
    }
    return out.take();
}

template <>
Result<CloneRecord> decode(Bytes payload) {
    Parser in(CloneRecord::kKind, payload);
    STELLARIUM_ASSIGN(const auto head, in.get<format::Clone>());
    if (!is_zero(head.reserved) || head.size_bytes > kMaxVolumeBytes ||
        head.count > in.remaining()) {
        return in.bad("count, size or reserved bytes are out of range");
    }
    CloneRecord record{.source = head.source,
                       .first_id = head.first_id,
                       .size_bytes = head.size_bytes,
                       .created_ns = head.created_ns,
                       .names = {}};
    record.names.reserve(head.count);
    for (uint32_t i = 0; i < head.count; ++i) {
        STELLARIUM_ASSIGN(const auto name_bytes, in.get<U8>());
        STELLARIUM_ASSIGN(std::string name, in.get_name(name_bytes));
        record.names.push_back(std::move(name));
    }
    STELLARIUM_TRY(in.finish());
    return record;
}

// --- Snapshot, rollback --------------------------------------------------------------------------

std::vector<std::byte> encode(const SnapshotRecord& record) {
    format::Snapshot head{};
    head.id = record.id;
    head.volume = record.volume;
    head.created_ns = record.created_ns;
    head.name_bytes = length8(record.name.size());
    Writer out;
    out.put(head);
    out.put_text(record.name);
    return out.take();
}

template <>
Result<SnapshotRecord> decode(Bytes payload) {
    Parser in(SnapshotRecord::kKind, payload);
    STELLARIUM_ASSIGN(const auto head, in.get<format::Snapshot>());
    if (!is_zero(head.reserved)) {
        return in.bad("reserved bytes are not zero");
    }
    SnapshotRecord record{
        .id = head.id, .volume = head.volume, .created_ns = head.created_ns, .name = {}};
    STELLARIUM_ASSIGN(record.name, in.get_name(head.name_bytes));
    STELLARIUM_TRY(in.finish());
    return record;
}

std::vector<std::byte> encode(const RollbackRecord& record) {
    format::Rollback head{};
    head.volume = record.volume;
    head.snapshot = record.snapshot;
    Writer out;
    out.put(head);
    return out.take();
}

template <>
Result<RollbackRecord> decode(Bytes payload) {
    Parser in(RollbackRecord::kKind, payload);
    STELLARIUM_ASSIGN(const auto head, in.get<format::Rollback>());
    STELLARIUM_TRY(in.finish());
    return RollbackRecord{.volume = head.volume, .snapshot = head.snapshot};
}

// --- Resize, rename, remove ----------------------------------------------------------------------

std::vector<std::byte> encode(const ResizeRecord& record) {
    format::Resize head{};
    head.volume = record.volume;
    head.size_bytes = record.size_bytes;
    head.root = to_format(record.root);
    Writer out;
    out.put(head);
    return out.take();
}

template <>
Result<ResizeRecord> decode(Bytes payload) {
    Parser in(ResizeRecord::kKind, payload);
    STELLARIUM_ASSIGN(const auto head, in.get<format::Resize>());
    STELLARIUM_TRY(in.finish());
    const auto root = from_format(head.root);
    if (!root || head.size_bytes > kMaxVolumeBytes) {
        return in.bad("size or root hint is out of range");
    }
    return ResizeRecord{.volume = head.volume, .size_bytes = head.size_bytes, .root = *root};
}

std::vector<std::byte> encode(const RenameRecord& record) {
    format::Rename head{};
    head.id = record.id;
    head.name_bytes = length8(record.name.size());
    Writer out;
    out.put(head);
    out.put_text(record.name);
    return out.take();
}

template <>
Result<RenameRecord> decode(Bytes payload) {
    Parser in(RenameRecord::kKind, payload);
    STELLARIUM_ASSIGN(const auto head, in.get<format::Rename>());
    if (!is_zero(head.reserved)) {
        return in.bad("reserved bytes are not zero");
    }
    RenameRecord record{.id = head.id, .name = {}};
    STELLARIUM_ASSIGN(record.name, in.get_name(head.name_bytes));
    STELLARIUM_TRY(in.finish());
    return record;
}

std::vector<std::byte> encode(const RemoveRecord& record) {
    format::Remove head{};
    head.count = length32(record.ids.size());
    Writer out;
    out.put(head);
    for (const uint64_t id : record.ids) {
        out.put(U64Le(id));
    }
    return out.take();
}

template <>
Result<RemoveRecord> decode(Bytes payload) {
    Parser in(RemoveRecord::kKind, payload);
    STELLARIUM_ASSIGN(const auto head, in.get<format::Remove>());
    if (!is_zero(head.reserved) || head.count > in.remaining() / sizeof(U64Le)) {
        return in.bad("count or reserved bytes are out of range");
    }
    RemoveRecord record;
    record.ids.reserve(head.count);
    for (uint32_t i = 0; i < head.count; ++i) {
        STELLARIUM_ASSIGN(const auto id, in.get<U64Le>());
        record.ids.push_back(id);
    }
    STELLARIUM_TRY(in.finish());
    return record;
}

// --- Attachment ----------------------------------------------------------------------------------

std::vector<std::byte> encode(const AttachmentChangeRecord& record) {
    format::Attachment head{};
    head.id = record.id;
    head.present = static_cast<uint8_t>(record.body ? 1 : 0);
    Writer out;
    if (record.body) {
        head.label_bytes = length16(record.body->label.size());
        head.options_bytes = length16(record.body->options.size());
    }
    out.put(head);
    if (record.body) {
        out.put_text(record.body->label);
        out.put_bytes(record.body->options);
    }
    return out.take();
}

template <>
Result<AttachmentChangeRecord> decode(Bytes payload) {
    Parser in(AttachmentChangeRecord::kKind, payload);
    STELLARIUM_ASSIGN(const auto head, in.get<format::Attachment>());
    if (!is_zero(head.reserved) || head.reserved0 != 0 || head.present > 1 ||
        head.label_bytes > kMaxLabelBytes || head.options_bytes > kMaxAttachmentOptionsBytes) {
        return in.bad("lengths, flag or reserved bytes are out of range");
    }
    AttachmentChangeRecord record{.id = head.id, .body = std::nullopt};
    STELLARIUM_ASSIGN(std::string label, in.get_text(head.label_bytes));
    STELLARIUM_ASSIGN(const Bytes options, in.get_bytes(head.options_bytes));
    STELLARIUM_TRY(in.finish());
    if (head.present != 0) {
        record.body = AttachmentRecordBody{.label = std::move(label),
                                           .options = {options.begin(), options.end()}};
    } else if (head.label_bytes != 0 || head.options_bytes != 0) {
        return in.bad("it forgets an attachment and yet describes one");
    }
    return record;
}

// --- Map, hole, fold -----------------------------------------------------------------------------

std::vector<std::byte> encode(const MapRecord& record) {
    assert(record.entries.size() <= kMaxMapEntriesPerRecord);
    format::Map head{};
    head.volume = record.volume;
    head.count = length32(record.entries.size());
    Writer out;
    out.put(head);
    for (const MapEntry& entry : record.entries) {
        assert(entry.pages >= 1 && entry.first_in_chunk + entry.pages <= nebula::kMaxChunkPages);
        format::MapEntry packed{};
        packed.page = entry.page;
        packed.chunk_pages = static_cast<uint8_t>((entry.first_in_chunk << 4) | (entry.pages - 1));
        packed.id = entry.id;
        out.put(packed);
    }
    return out.take();
}

template <>
Result<MapRecord> decode(Bytes payload) {
    Parser in(MapRecord::kKind, payload);
    STELLARIUM_ASSIGN(const auto head, in.get<format::Map>());
    if (!is_zero(head.reserved) || head.count > in.remaining() / sizeof(format::MapEntry)) {
        return in.bad("count or reserved bytes are out of range");
    }
    MapRecord record{.volume = head.volume, .entries = {}};
    record.entries.reserve(head.count);
    uint64_t end = 0;
    for (uint32_t i = 0; i < head.count; ++i) {
        STELLARIUM_ASSIGN(const auto packed, in.get<format::MapEntry>());
        const MapEntry entry{
            .page = packed.page,
            .pages = static_cast<uint8_t>((packed.chunk_pages & 0x0f) + 1),
            .first_in_chunk = static_cast<uint8_t>(packed.chunk_pages >> 4),
            .id = packed.id,
        };
        if (!page_range_is_valid(entry.page, entry.pages) || entry.page < end ||
            entry.first_in_chunk + entry.pages > static_cast<int>(nebula::kMaxChunkPages) ||
            entry.page / kPagesPerLeaf != (entry.page + entry.pages - 1) / kPagesPerLeaf) {
            return in.bad(
                fmt::format("entry {} (page {}, {} pages from {}) is out of range or "
                            "order",
                            i, entry.page, entry.pages, entry.first_in_chunk));
        }
        end = entry.page + entry.pages;
        record.entries.push_back(entry);
    }
    STELLARIUM_TRY(in.finish());
    return record;
}

std::vector<std::byte> encode(const HoleRecord& record) {
    assert(record.ranges.size() <= kMaxHoleEntriesPerRecord);
    format::Hole head{};
    head.volume = record.volume;
    head.count = length32(record.ranges.size());
    Writer out;
    out.put(head);
    for (const PageRange& range : record.ranges) {
        format::HoleEntry packed{};
        packed.page = range.page;
        packed.pages = range.pages;
        out.put(packed);
    }
    return out.take();
}

template <>
Result<HoleRecord> decode(Bytes payload) {
    Parser in(HoleRecord::kKind, payload);
    STELLARIUM_ASSIGN(const auto head, in.get<format::Hole>());
    if (!is_zero(head.reserved) || head.count > in.remaining() / sizeof(format::HoleEntry)) {
        return in.bad("count or reserved bytes are out of range");
    }
    HoleRecord record{.volume = head.volume, .ranges = {}};
    record.ranges.reserve(head.count);
    uint64_t end = 0;
    for (uint32_t i = 0; i < head.count; ++i) {
        STELLARIUM_ASSIGN(const auto packed, in.get<format::HoleEntry>());
        const PageRange range{.page = packed.page, .pages = packed.pages};
        if (!page_range_is_valid(range.page, range.pages) || range.page < end) {
            return in.bad(fmt::format("range {} (page {}, {} pages) is out of range or order", i,
                                      range.page, range.pages));
        }
        end = range.page + range.pages;
        record.ranges.push_back(range);
    }
    STELLARIUM_TRY(in.finish());
    return record;
}

std::vector<std::byte> encode(const FoldRecord& record) {
    assert(record.leaves.size() <= kMaxFoldLeavesPerRecord);
    format::Fold head{};
    head.volume = record.volume;
    head.root = to_format(record.root);
    head.count = length32(record.leaves.size());
    Writer out;
    out.put(head);
    for (const uint32_t leaf : record.leaves) {
        out.put(U32Le(leaf));
    }
    return out.take();
}

template <>
Result<FoldRecord> decode(Bytes payload) {
    Parser in(FoldRecord::kKind, payload);
    STELLARIUM_ASSIGN(const auto head, in.get<format::Fold>());
    const auto root = from_format(head.root);
    if (!is_zero(head.reserved) || !root || head.count > in.remaining() / sizeof(U32Le)) {
        return in.bad("count, root hint or reserved bytes are out of range");
    }
    FoldRecord record{.volume = head.volume, .root = *root, .leaves = {}};
    record.leaves.reserve(head.count);
    for (uint32_t i = 0; i < head.count; ++i) {
        STELLARIUM_ASSIGN(const auto leaf, in.get<U32Le>());
        if (leaf >= kMaxLeaves || (i > 0 && leaf <= record.leaves.back())) {
            return in.bad(fmt::format("leaf {} is out of range or order", leaf.get()));
        }
        record.leaves.push_back(leaf);
    }
    STELLARIUM_TRY(in.finish());
    return record;
}

// --- Arena ---------------------------------------------------------------------------------------

std::vector<std::byte> encode(const ArenaRecord& record) {
    format::Arena head{};
    head.id = record.id;
    head.path_bytes = length16(record.path.size());
    head.closed = static_cast<uint8_t>(record.closed ? 1 : 0);
    Writer out;
    out.put(head);
    out.put_text(record.path);
    return out.take();
}

template <>
Result<ArenaRecord> decode(Bytes payload) {
    Parser in(ArenaRecord::kKind, payload);
    STELLARIUM_ASSIGN(const auto head, in.get<format::Arena>());
    if (!is_zero(head.reserved) || head.closed > 1) {
        return in.bad("flag or reserved bytes are out of range");
    }
    ArenaRecord record{.id = head.id, .closed = head.closed != 0, .path = {}};
    STELLARIUM_ASSIGN(record.path, in.get_text(head.path_bytes));
    STELLARIUM_TRY(in.finish());
    return record;
}

// --- Boot ----------------------------------------------------------------------------------------

std::vector<std::byte> encode(const BootRecord& record) {
    format::Boot head{};
    head.root = record.root;
    if (record.manifest) {
        head.pieces = to_format(record.manifest->top);
        head.levels = record.manifest->levels;
        head.bytes = length32(record.manifest->bytes);
    }
    Writer out;
    out.put(head);
    return out.take();
}

template <>
Result<BootRecord> decode(Bytes payload) {
    Parser in(BootRecord::kKind, payload);
    STELLARIUM_ASSIGN(const auto head, in.get<format::Boot>());
    STELLARIUM_TRY(in.finish());
    const auto top = from_format(head.pieces);
    if (head.root == Hash256{} || !top || head.levels > kMaxBootManifestLevels ||
        head.bytes > kMaxBootManifestBytes) {
        return in.bad("root, hint, levels or length are out of range");
    }
    BootRecord record{.root = head.root, .manifest = std::nullopt};
    if (head.bytes != 0) {
        record.manifest = Pieces{.top = *top, .levels = head.levels, .bytes = head.bytes};
    } else if (!top->empty() || top->hint || head.levels != 0) {
        return in.bad("it forgets a manifest and yet names one");
    }
    return record;
}

// --- Sharing -------------------------------------------------------------------------------------

std::vector<std::byte> encode(const SharingRecord& record) {
    format::Sharing head{};
    head.id = record.id;
    head.shareable = static_cast<uint8_t>(record.shareable ? 1 : 0);
    Writer out;
    out.put(head);
    return out.take();
}

template <>
Result<SharingRecord> decode(Bytes payload) {
    Parser in(SharingRecord::kKind, payload);
    STELLARIUM_ASSIGN(const auto head, in.get<format::Sharing>());
    STELLARIUM_TRY(in.finish());
    if (!is_zero(head.reserved) || head.shareable > 1) {
        return in.bad("flag or reserved bytes are out of range");
    }
    return SharingRecord{.id = head.id, .shareable = head.shareable != 0};
}

}  // namespace stellarium::nova
