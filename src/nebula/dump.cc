#include "nebula/dump.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "base/units.h"
#include "nebula/dead_map.h"
#include "nebula/format.h"
#include "nebula/index.h"
#include "nebula/segment.h"

namespace stellarium::nebula {
namespace {

constexpr size_t kShownRecordBytes = 32;

std::string hex(Bytes bytes) {
    std::string text;
    for (const std::byte byte : bytes.first(std::min(bytes.size(), kShownRecordBytes))) {
        text += fmt::format("{:02x}", std::to_integer<unsigned>(byte));
    }
    return bytes.size() > kShownRecordBytes ? text + "..." : text;
}

std::string leading_digits(Bytes bytes) {
    std::string digits;
    for (const std::byte byte : bytes) {
        const char character = static_cast<char>(byte);
        if (character < '0' || character > '9') {
            break;
        }
        digits += character;
    }
    return digits.empty() ? "(no number)" : digits;
}

/// Prints, and counts what is damaged.
class Report {
  public:
    explicit Report(const PrintLine& print) : print_(print) {}

    template <typename... Arguments>
    void say(fmt::format_string<Arguments...> format, Arguments&&... arguments) {
        print_(fmt::format(format, std::forward<Arguments>(arguments)...));
    }
    void damage(std::string_view where, std::string_view what) {
        ++damages_;
        print_(fmt::format("{}DAMAGED: {}", where, what));
    }
    uint64_t damages() const { return damages_; }

  private:
    const PrintLine& print_;
    uint64_t damages_ = 0;
};

std::string versions(uint16_t read_version, uint16_t write_version, uint64_t refuse,
                     uint64_t read_only, uint64_t ignore) {
    return fmt::format("format {} (to read) and {} (to write), features {:#x} {:#x} {:#x}",
                       read_version, write_version, refuse, read_only, ignore);
}

Result<std::vector<std::byte>> read_page(io::File& file, uint64_t page) {
    std::vector<std::byte> bytes(kPageBytes);
    STELLARIUM_TRY(io::read_exact(file, bytes, page * kPageBytes));
    return bytes;
}

// ---- Superblock -------------------------------------------------------------------------------

Result<void> dump_superblock(io::File& file, uint64_t size, Report& report) {
    report.say("superblock of a store, {} slots of {} bytes", kSuperblockSlots, kPageBytes);
    if (size != kSuperblockBytes) {
        report.damage("",
                      fmt::format("the file has {} bytes instead of {}", size, kSuperblockBytes));
    }
    std::optional<std::pair<uint64_t, size_t>> newest;
    for (size_t i = 0; i < kSuperblockSlots && (i + 1) * kPageBytes <= size; ++i) {
        STELLARIUM_ASSIGN(const auto page, read_page(file, i));
        report.say("slot {} at offset {}:", i, i * kPageBytes);
        const auto slot = decode_superblock_slot(page);
        if (!slot) {
            report.damage("  ", slot.error().message());
            continue;
        }
        if (!newest || slot->generation > newest->first) {
            newest = {slot->generation, i};
        }
        report.say("  generation {} of store {}", slot->generation.get(), to_hex(slot->store_id));
        report.say("  {}", versions(slot->read_version, slot->write_version, slot->features_refuse,
                                    slot->features_read_only, slot->features_ignore));
        const auto usable = check_versions(slot->read_version, slot->write_version,
                                           slot->features_refuse, slot->features_read_only);
        if (!usable) {
            report.say("  cannot be used by this program: {}", usable.error().message());
            continue;
        }
        if (!usable->empty()) {
            report.say("  cannot be written by this program: {}", *usable);
        }
        report.say("  checkpoint at batch {}, durable through {}, highest number used {}",
                   slot->sequence.get(), slot->durable_sequence.get(),
                   slot->highest_sequence.get());
        report.say("  the log goes on at segment {} page {}; highest segment used {}",
                   slot->log_segment.get(), slot->log_page.get(), slot->last_segment.get());
        if (slot->index_generation == 0) {
            report.say("  no index file");
        } else {
            report.say("  index-{}.ckpt has the segments below {}", slot->index_generation.get(),
                       slot->index_segment.get());
        }
        if (slot->dead_map_generation != 0) {
            report.say("  {} names what is dead; {}", dead_map_file_name(slot->dead_map_generation),
                       slot->dead_map_freed != 0 ? "all of it was given back"
                                                 : "some of it may still take room");
        }
        report.say(
            "  {} chunks and objects of {} in all; {} stored, {} ever appended, {} were "
            "duplicates",
            slot->chunks.get(), format_size(slot->unique_bytes), format_size(slot->stored_bytes),
            format_size(slot->appended_bytes), format_size(slot->duplicate_bytes));
        const Bytes payload =
            std::as_bytes(std::span(slot->payload)).first(slot->payload_bytes.get());
        report.say("  payload of {} bytes: {}", payload.size(), hex(payload));
    }
    if (newest) {
        report.say("the newest valid copy is slot {}, generation {}", newest->second,
                   newest->first);
    } else {
        report.damage("", "no slot is valid: the store cannot be opened");
    }
    return {};
}

// ---- Segment ----------------------------------------------------------------------------------

/// Which store and segment the file belongs to: by its header, else by its first batch.
struct Identity {
    StoreId store_id{};
    uint32_t segment = 0;
};

Result<std::optional<Identity>> identify_by_batches(io::File& file, uint64_t pages) {
    for (uint64_t page = 1; page < pages; ++page) {
        STELLARIUM_ASSIGN(const auto bytes, read_page(file, page));
        const auto header = load<BatchHeader>(bytes);
        if (header.magic == kBatchMagic && header.page == page) {
            return Identity{header.store_id, header.segment};
        }
    }
    return std::nullopt;
}

class SegmentDump {
  public:
    SegmentDump(io::File& file, const Identity& identity, uint64_t size, std::vector<PageRun> dead,
                const DumpOptions& options, Report& report)
        : file_(file),
          id_(identity),
          dead_(std::move(dead)),
          size_(size),
          end_page_(static_cast<uint32_t>(std::min<uint64_t>(size / kPageBytes, kSegmentPages))),
          options_(options),
          report_(report) {}

    Result<void> run();

  private:
    Result<void> dump_batch(uint32_t page, const ScannedBatch& batch);
    void dump_entry(const Entry& entry, const ScannedBatch& batch);
    /// The footer that the file ends with; its first page, or the file's end when there is none.
    Result<uint32_t> dump_footer();

    io::File& file_;
    const Identity id_;
    const std::vector<PageRun> dead_;
    const uint64_t size_;
    const uint32_t end_page_;
    const DumpOptions& options_;
    Report& report_;
    size_t entries_ = 0;
};

void SegmentDump::dump_entry(const Entry& entry, const ScannedBatch& batch) {
    const bool damaged = std::ranges::any_of(batch.damage, [&](const std::string& sentence) {
        return sentence.find(entry.id.hex()) != std::string::npos;
    });
    const bool is_dead = skip_dead(dead_, entry.page) != entry.page;
    const char* state = is_dead ? ", freed" : damaged ? ", DAMAGED" : "";
    report_.say("  page {} offset {}: {} {}, {} bytes{}", entry.page.get(), entry.offset.get(),
                to_string(entry.entry_kind()), entry.id.hex(), entry.length.get(), state);
}

Result<void> SegmentDump::dump_batch(uint32_t page, const ScannedBatch& batch) {
    STELLARIUM_ASSIGN(const auto bytes, read_batch_header(file_, id_.store_id, id_.segment, page));
    STELLARIUM_ASSIGN(const BatchView view, decode_batch(bytes, id_.store_id, id_.segment, page));
    report_.say(
        "page {}: batch {} after {}, durable through {}; {} header and {} data pages, {} "
        "entries, {} records of {} bytes, {} duplicate bytes before it",
        page, batch.sequence, batch.previous_sequence, batch.durable_through,
        view.header->header_pages.get(), view.header->data_pages.get(), view.entries.size(),
        batch.records, view.records.size(), batch.duplicate_bytes);
    for (const Entry& entry : batch.entries) {
        dump_entry(entry, batch);
    }
    entries_ += batch.entries.size();
    STELLARIUM_TRY(view.for_each_record([&](uint16_t kind, Bytes payload) -> Result<void> {
        std::string meaning =
            options_.format_record ? options_.format_record(kind, payload) : std::string();
        report_.say("  record of kind {}, {} bytes: {}", kind, payload.size(),
                    meaning.empty() ? hex(payload) : meaning);
        return {};
    }));
    for (const std::string& sentence : batch.damage) {
        report_.damage("  ", sentence);
    }
    return {};
}

Result<uint32_t> SegmentDump::dump_footer() {
    if (end_page_ < 2 || size_ % kPageBytes != 0) {
        return end_page_;
    }
    STELLARIUM_ASSIGN(const auto last, read_page(file_, end_page_ - 1));
    const auto trailer = decode_footer_trailer(last, id_.store_id, id_.segment, end_page_);
    if (!trailer) {
        return end_page_;
    }
    const uint32_t first = trailer->footer_page;
    std::vector<std::byte> bytes(size_t{end_page_ - first} * kPageBytes);
    STELLARIUM_TRY(io::read_exact(file_, bytes, uint64_t{first} * kPageBytes));
    const auto footer = decode_footer(bytes, id_.store_id, id_.segment, end_page_);
    if (!footer) {
        report_.damage(fmt::format("page {}: ", first), footer.error().message());
        return first;
    }
    report_.say("page {}: footer with {} entries, batches {} to {}", first, footer->entries.size(),
                trailer->first_sequence.get(), trailer->last_sequence.get());
    // Batches that are gone as a whole, and packs that are, show their entries in the footer only.
    if (dead_.empty() ? footer->entries.size() != entries_ : footer->entries.size() < entries_) {
        report_.damage("  ", fmt::format("the batches have {} entries", entries_));
    }
    return first;
}

Result<void> SegmentDump::run() {
    if (size_ % kPageBytes != 0) {
        report_.damage(
            "", fmt::format("the file's {} bytes are not whole pages of {}", size_, kPageBytes));
    }
    // The footer is found from the end; what lies before it are batches.
    uint32_t batches_end = end_page_;
    if (end_page_ >= 2 && size_ % kPageBytes == 0) {
        STELLARIUM_ASSIGN(const auto last, read_page(file_, end_page_ - 1));
        if (const auto trailer =
                decode_footer_trailer(last, id_.store_id, id_.segment, end_page_)) {
            batches_end = trailer->footer_page;
        }
    }
    const DataCheck check = options_.check_data ? DataCheck::kHashes : DataCheck::kNone;
    for (uint32_t page = 1; page < batches_end;) {
        if (const uint32_t alive = skip_dead(dead_, page); alive != page) {
            report_.say("pages {} to {}: freed by garbage collection", page, alive - 1);
            page = alive;
            continue;
        }
        auto batch = read_batch(file_, id_.store_id, id_.segment, page, check, dead_);
        if (batch) {
            STELLARIUM_TRY(dump_batch(page, *batch));
            page = batch->end_page;
            continue;
        }
        if (batch.error().code() != ErrorCode::kCorrupt) {
            return std::unexpected(std::move(batch).error());
        }
        report_.damage(fmt::format("page {}: ", page), batch.error().message());
        STELLARIUM_ASSIGN(const auto next, find_batch(file_, id_.store_id, id_.segment, page + 1));
        const uint32_t resume = next ? std::min(*next, batches_end) : batches_end;
        report_.say("pages {} to {}: no batch", page, resume - 1);
        page = resume;
    }
    STELLARIUM_ASSIGN(const uint32_t footer_page, dump_footer());
    if (footer_page == end_page_) {
        report_.say("page {}: the end; no footer", end_page_);
    }
    return {};
}

/// What the store around a segment file knows to be dead of it; nothing when there is none.
std::vector<PageRun> dead_runs_around(const io::Env& env, const std::string& path,
                                      const Identity& identity) {
    // Above the directory that holds it.
    std::string store = path.substr(0, path.rfind('/') + 1) + "../";
    if (const size_t place = path.rfind("segments/"); place != std::string::npos) {
        store = path.substr(0, place);
    }
    const auto superblock = env.files->open(store + "superblock", io::OpenMode::kReadOnly);
    if (!superblock) {
        return {};
    }
    std::optional<SuperblockSlot> newest;
    for (size_t i = 0; i < kSuperblockSlots; ++i) {
        const auto page = read_page(**superblock, i);
        const auto slot = page ? decode_superblock_slot(*page) : std::unexpected(page.error());
        if (slot && slot->store_id == identity.store_id &&
            (!newest || slot->generation > newest->generation)) {
            newest = *slot;
        }
    }
    if (!newest || newest->dead_map_generation == 0) {
        return {};
    }
    const auto file = env.files->open(store + dead_map_file_name(newest->dead_map_generation),
                                      io::OpenMode::kReadOnly);
    const auto size = file ? (*file)->size_bytes() : Result<uint64_t>(0);
    if (!file || !size) {
        return {};
    }
    std::vector<std::byte> bytes(*size);
    if (!io::read_exact(**file, bytes, 0)) {
        return {};
    }
    auto map = decode_dead_map(bytes, identity.store_id, newest->dead_map_generation);
    if (!map) {
        return {};
    }
    const auto found = map->segments.find(identity.segment);
    if (found == map->segments.end()) {
        return {};
    }
    return found->second.whole ? std::vector<PageRun>{{.page = 1, .pages = kSegmentPages - 1}}
                               : std::move(found->second.runs);
}

Result<void> dump_segment(const io::Env& env, io::File& file, uint64_t size,
                          const DumpOptions& options, std::optional<uint32_t> number_by_name,
                          Report& report) {
    Identity identity{.store_id = {}, .segment = number_by_name.value_or(0)};
    STELLARIUM_ASSIGN(const auto page, read_page(file, 0));
    const auto header = load<SegmentHeader>(page);
    const auto decoded = decode_segment_header(page, header.store_id, header.segment);
    if (decoded) {
        identity = {decoded->store_id, decoded->segment};
        report.say("segment {} of store {}, made for batch {} and later", identity.segment,
                   to_hex(identity.store_id), decoded->first_sequence.get());
        report.say("{}", versions(header.read_version, header.write_version, header.features_refuse,
                                  header.features_read_only, header.features_ignore));
        if (number_by_name && *number_by_name != identity.segment) {
            report.damage("", fmt::format("the file is named as segment {}", *number_by_name));
        }
    } else {
        report.say("a segment");
        report.damage("page 0: ", decoded.error().message());
        if (decoded.error().code() == ErrorCode::kUnsupported) {
            return {};
        }
        STELLARIUM_ASSIGN(const auto by_batches, identify_by_batches(file, size / kPageBytes));
        if (!by_batches) {
            report.damage("", "no page looks like a batch either");
            return {};
        }
        identity = *by_batches;
        report.say("by its batches segment {} of store {}", identity.segment,
                   to_hex(identity.store_id));
    }
    std::vector<PageRun> dead = dead_runs_around(env, file.path(), identity);
    return SegmentDump(file, identity, size, std::move(dead), options, report).run();
}

// ---- Dead map ---------------------------------------------------------------------------------

Result<void> dump_dead_map(io::File& file, uint64_t size, Report& report) {
    report.say("dead map, {} bytes", size);
    std::vector<std::byte> bytes(size);
    STELLARIUM_TRY(io::read_exact(file, bytes, 0));
    if (size < sizeof(DeadMapHeader)) {
        report.damage("",
                      fmt::format("shorter than its header of {} bytes", sizeof(DeadMapHeader)));
        return {};
    }
    const auto header = load<DeadMapHeader>(bytes);
    report.say("number {} of store {}; {}", header.generation.get(), to_hex(header.store_id),
               versions(header.read_version, header.write_version, header.features_refuse,
                        header.features_read_only, header.features_ignore));
    const auto map = decode_dead_map(bytes, header.store_id, header.generation);
    if (!map) {
        report.damage("", map.error().message());
        return {};
    }
    const auto say_places = [&](const std::vector<EntryPlace>& places, std::string_view what) {
        for (const EntryPlace place : places) {
            report.say("  page {} offset {}: {}", place >> 16, place & 0xFFFF, what);
        }
    };
    for (const auto& [number, segment] : map->segments) {
        report.say("segment {}{}", number, segment.whole ? ": the whole of it" : "");
        for (const PageRun& run : segment.runs) {
            report.say("  pages {} to {}: freed", run.page, run.end() - 1);
        }
        say_places(segment.members, "object of a pack, dead");
        say_places(segment.damaged, "DAMAGED");
    }
    return {};
}

// ---- Index ------------------------------------------------------------------------------------

Result<void> dump_index(io::File& file, uint64_t size, Report& report) {
    report.say("index checkpoint, {} bytes", size);
    if (size < sizeof(IndexCheckpointHeader)) {
        report.damage(
            "", fmt::format("shorter than its header of {} bytes", sizeof(IndexCheckpointHeader)));
        return {};
    }
    std::vector<std::byte> bytes(sizeof(IndexCheckpointHeader));
    STELLARIUM_TRY(io::read_exact(file, bytes, 0));
    const auto header = load<IndexCheckpointHeader>(bytes);
    report.say("of store {}, holds every batch through {}", to_hex(header.store_uuid),
               header.sequence.get());
    report.say(
        "{} entries in {} shards, {} bytes; format {} (to read) and {} (to write), features "
        "{:#x} {:#x} {:#x}",
        header.entries.get(), header.shards.get(), header.file_bytes.get(),
        header.read_version.get(), header.write_version.get(), header.features_refuse.get(),
        header.features_read_only.get(), header.features_ignore.get());
    const auto opened = ChunkIndex::open_checkpoint(file, header.store_uuid);
    if (!opened) {
        report.damage("", opened.error().message());
        return {};
    }
    if (const auto verified = opened->index->verify(); !verified) {
        report.damage("", verified.error().message());
    } else {
        report.say("all shards are whole; they hold {} entries", opened->index->size());
    }
    return {};
}

enum class FileKind : uint8_t { kUnknown, kSuperblock, kSegment, kIndex, kDeadMap, kLock };

/// By content where a magic number is whole, else by name: a damaged file still has its name.
FileKind kind_of(Bytes first_page, std::string_view name) {
    const auto starts_with = [&](Bytes magic) {
        return first_page.size() >= magic.size() &&
               std::ranges::equal(first_page.first(magic.size()), magic);
    };
    if (starts_with(bytes_of(U64Le(kSuperblockMagic)))) {
        return FileKind::kSuperblock;
    }
    if (starts_with(bytes_of(U64Le(kSegmentHeaderMagic)))) {
        return FileKind::kSegment;
    }
    if (starts_with(bytes_of(IndexCheckpointHeader::kMagic))) {
        return FileKind::kIndex;
    }
    if (starts_with(bytes_of(U64Le(kDeadMapMagic)))) {
        return FileKind::kDeadMap;
    }
    if (name.starts_with("superblock")) {
        return FileKind::kSuperblock;
    }
    if (name.ends_with(".seg")) {
        return FileKind::kSegment;
    }
    if (name.starts_with("index-") && name.ends_with(".ckpt")) {
        return FileKind::kIndex;
    }
    if (name.starts_with("dead-") && name.ends_with(".map")) {
        return FileKind::kDeadMap;
    }
    return name == "lock" ? FileKind::kLock : FileKind::kUnknown;
}

}  // namespace

Result<uint64_t> dump_file(const io::Env& env, const std::string& path, const PrintLine& print,
                           const DumpOptions& options) {
    STELLARIUM_ASSIGN(const auto file, env.files->open(path, io::OpenMode::kReadOnly));
    STELLARIUM_ASSIGN(const uint64_t size, file->size_bytes());
    std::vector<std::byte> first(std::min<uint64_t>(size, kPageBytes));
    STELLARIUM_TRY(io::read_exact(*file, first, 0));
    const std::string name = path.substr(path.rfind('/') + 1);
    Report report(print);
    switch (kind_of(first, name)) {
        case FileKind::kSuperblock:
            STELLARIUM_TRY(dump_superblock(*file, size, report));
            break;
        case FileKind::kSegment:
            if (size < kPageBytes) {
                report.say("a segment");
                report.damage("", fmt::format("{} bytes are less than its header page", size));
                break;
            }
            STELLARIUM_TRY(
                dump_segment(env, *file, size, options, parse_segment_file_name(name), report));
            break;
        case FileKind::kIndex:
            STELLARIUM_TRY(dump_index(*file, size, report));
            break;
        case FileKind::kDeadMap:
            STELLARIUM_TRY(dump_dead_map(*file, size, report));
            break;
        case FileKind::kLock:
            report.say("lock of a store; taken last by process {}", leading_digits(first));
            break;
        case FileKind::kUnknown:
            return fail(
                ErrorCode::kUnsupported,
                fmt::format("{} is no file of a store: it has none of their magic numbers "
                            "and none of their names (superblock, N.seg, index-N.ckpt, dead-N.map)",
                            path));
    }
    return report.damages();
}

}  // namespace stellarium::nebula
