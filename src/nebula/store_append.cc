#include <algorithm>
#include <array>
#include <cassert>
#include <cstring>
#include <unordered_map>
#include <utility>

#include "base/units.h"
#include "nebula/store_impl.h"

namespace stellarium::nebula {
namespace {

/// From this length on a batch is not kept in the page cache: who writes so much at once rarely
/// reads it soon, and what guests read again and again stays.
constexpr uint32_t kStreamedPages = kMiB / kPageBytes;

iovec iovec_of(Bytes bytes) {
    // pwritev takes the iovec of preadv, and does not write through it.
    return {const_cast<std::byte*>(bytes.data()), bytes.size()};
}

}  // namespace

Result<void> StoreImpl::check_batch(const WriteBatch& batch, size_t& record_bytes) const {
    record_bytes = 0;
    for (const WriteBatch::Record& record : batch.records_) {
        record_bytes += sizeof(RecordHeader) + record.payload.size();
    }
    if (record_bytes > kMaxRecordBytes ||
        !fits_empty_segment(batch_header_pages(0, record_bytes), 0)) {
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("{} bytes of records in one append are more than {} or more than "
                                "fits into a segment: use several",
                                record_bytes, kMaxRecordBytes));
    }
    for (const WriteBatch::Chunk& chunk : batch.chunks_) {
        if (chunk.pages.empty() || chunk.pages.size() % kPageBytes != 0 ||
            chunk.pages.size() > kMaxChunkBytes) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("chunk {} of {} bytes is not 1 to {} whole pages",
                                    chunk.id.hex(), chunk.pages.size(), kMaxChunkPages));
        }
    }
    for (const WriteBatch::Object& object : batch.objects_) {
        if (object.content.size() + object.aux.size() > kMaxObjectBytes) {
            return fail(ErrorCode::kLimitExceeded,
                        fmt::format("object {} of {} + {} bytes is longer than {}", object.id.hex(),
                                    object.content.size(), object.aux.size(), kMaxObjectBytes));
        }
    }
    return {};
}

Plan StoreImpl::make_plan(const WriteBatch& batch) {
    // An object alone wastes half a page on average; below this length packing pays.
    constexpr size_t kMinLoneObjectBytes = kMaxChunkBytes / 2;
    Plan plan;
    plan.items.reserve(batch.chunks_.size() + batch.objects_.size());
    plan.chunk_items.reserve(batch.chunks_.size());
    std::unordered_map<ChunkId, size_t, Hash256Hasher> known;
    known.reserve(batch.chunks_.size() + batch.objects_.size());
    for (const WriteBatch::Chunk& chunk : batch.chunks_) {
        const auto [it, is_new] = known.try_emplace(chunk.id, plan.items.size());
        if (is_new) {
            plan.items.push_back({.id = chunk.id, .content = chunk.pages});
        }
        plan.chunk_items.push_back(it->second);
    }
    for (const WriteBatch::Object& object : batch.objects_) {
        if (known.try_emplace(object.id, plan.items.size()).second) {
            const bool alone = object.aux.empty() && object.content.size() >= kMinLoneObjectBytes;
            plan.items.push_back({.id = object.id,
                                  .content = object.content,
                                  .aux = object.aux,
                                  .kind = alone ? EntryKind::kObject : EntryKind::kMember});
        }
    }
    return plan;
}

Result<void> StoreImpl::probe_items(Plan& plan) {
    std::vector<ChunkId> ids;
    std::vector<size_t> items;
    for (size_t i = 0; i < plan.items.size(); ++i) {
        if (!plan.items[i].stored) {
            ids.push_back(plan.items[i].id);
            items.push_back(i);
        }
    }
    std::vector<ChunkIndex::Match> matches;
    STELLARIUM_TRY(with_index([&]() -> Result<void> {
        matches.clear();
        return index_->find_many(ids, matches);
    }));
    for (const ChunkIndex::Match& match : matches) {
        Item& item = plan.items[items[match.id_index]];
        if (item.stored) {
            continue;
        }
        const Want want = item.kind == EntryKind::kChunk ? Want::kPages : Want::kAny;
        STELLARIUM_ASSIGN(const auto found, confirm(item.id, match.address, want));
        if (found && !found->damaged) {
            item.stored = true;
            item.address = found->address();
            item.ordinal = found->ordinal;
        }
    }
    return {};
}

void StoreImpl::make_units(Plan& plan) const {
    plan.units.clear();
    plan.packs.clear();
    PackBuilder builder;
    std::vector<size_t> members;
    const auto finish_pack = [&] {
        if (builder.empty()) {
            return;
        }
        plan.packs.push_back(builder.finish());
        const Bytes bytes(plan.packs.back());
        plan.units.push_back({.kind = EntryKind::kPack,
                              .id = hash(bytes),
                              .bytes = bytes,
                              .members = std::exchange(members, {})});
    };
    for (size_t i = 0; i < plan.items.size(); ++i) {
        const Item& item = plan.items[i];
        if (item.stored) {
            continue;
        }
        if (item.kind != EntryKind::kMember) {
            plan.units.push_back(
                {.kind = item.kind, .id = item.id, .bytes = item.content, .item = i});
            continue;
        }
        if (!builder.add(item.id, item.content, item.aux)) {
            finish_pack();
            [[maybe_unused]] const bool fits = builder.add(item.id, item.content, item.aux);
            assert(fits);
        }
        members.push_back(i);
    }
    finish_pack();
}

bool StoreImpl::fits_empty_segment(uint32_t batch_pages, size_t footer_entries) const {
    return 1 + batch_pages + footer_pages(footer_entries) <= segment_pages_;
}

bool StoreImpl::fits_active(uint32_t batch_pages, size_t footer_entries) const {
    return active_.segment != nullptr &&
           active_.end_page + batch_pages + footer_pages(active_.entries + footer_entries) <=
               segment_pages_;
}

void StoreImpl::keep(uint32_t segment, uint32_t ordinal, MarkSet* protection) {
    if (collection_marks_ != nullptr) {
        collection_marks_->keep(segment, ordinal);
    }
    if (protection != nullptr) {
        protection->keep(segment, ordinal);
    }
}

Result<Appended> StoreImpl::append(WriteBatch& batch, MarkSet* protection) {
    STELLARIUM_TRY(check_writable());
    size_t record_bytes = 0;
    STELLARIUM_TRY(check_batch(batch, record_bytes));
    Plan plan = make_plan(batch);
    const uint64_t probed_at = sequence();
    const uint64_t condemn_epoch = condemn_epoch_.load();
    STELLARIUM_TRY(probe_items(plan));
    make_units(plan);

    const std::lock_guard guard(append_mutex_);
    STELLARIUM_TRY(check_writable());
    if (condemn_epoch_.load() != condemn_epoch) {
        // What was found may have been condemned since.
        for (Item& item : plan.items) {
            item.stored = false;
        }
        STELLARIUM_TRY(probe_items(plan));
        make_units(plan);
    } else if (sequence() != probed_at && !plan.units.empty()) {
        // Somebody appended in between, perhaps the same chunks.
        const auto missing = std::ranges::count(plan.items, false, &Item::stored);
        STELLARIUM_TRY(probe_items(plan));
        if (std::ranges::count(plan.items, false, &Item::stored) != missing) {
            make_units(plan);
        }
    }
    Appended out;
    for (const Item& item : plan.items) {
        if (item.stored) {
            keep(item.address.segment(), item.ordinal, protection);
        } else {
            out.new_bytes += item.content.size();
        }
    }
    uint64_t chunk_bytes = 0;
    for (const WriteBatch::Chunk& chunk : batch.chunks_) {
        chunk_bytes += chunk.pages.size();
    }
    for (const Item& item : plan.items) {
        if (item.kind == EntryKind::kChunk && !item.stored) {
            chunk_bytes -= item.content.size();
        }
    }
    out.duplicate_bytes = chunk_bytes;
    if (!plan.units.empty() || !batch.records_.empty()) {
        Result<void> written;
        if (!ReserveScope::active()) {
            written = reserve_.admit(out.new_bytes);
        }
        if (written) {
            written = write_plan(plan, batch, record_bytes, out.duplicate_bytes, protection);
        }
        note_space(written);
        STELLARIUM_TRY(std::move(written));
    } else {
        const std::lock_guard state_guard(state_mutex_);
        pending_duplicate_bytes_ += out.duplicate_bytes;
    }
    out.sequence = sequence();
    out.locations.reserve(plan.chunk_items.size());
    for (size_t i = 0; i < plan.chunk_items.size(); ++i) {
        const Item& item = plan.items[plan.chunk_items[i]];
        out.locations.push_back(
            {item.address, static_cast<uint8_t>(pages_for(item.content.size()))});
    }
    return out;
}

Result<void> StoreImpl::append_copies(std::vector<Item> items) {
    Plan plan;
    plan.items = std::move(items);
    make_units(plan);
    const std::lock_guard guard(append_mutex_);
    STELLARIUM_TRY(check_writable());
    uint64_t bytes = 0;
    for (const Item& item : plan.items) {
        bytes += item.content.size();
    }
    STELLARIUM_TRY(reserve_.admit(bytes));
    return write_plan(plan, WriteBatch(), 0, 0, nullptr);
}

void StoreImpl::note_space(const Result<void>& appended) {
    if (appended) {
        if (!ReserveScope::active() && disk_full_.load(std::memory_order_relaxed)) {
            disk_full_ = false;
        }
    } else if (appended.error().code() == ErrorCode::kNoSpace) {
        ++full_appends_;
        disk_full_ = true;
    }
}

Result<void> StoreImpl::write_plan(Plan& plan, const WriteBatch& batch, size_t record_bytes,
                                   uint64_t duplicate_bytes, MarkSet* protection) {
    std::span<const Unit> rest(plan.units);
    bool records_written = batch.records_.empty();
    while (!rest.empty() || !records_written) {
        size_t take = 0;
        uint32_t data_pages = 0;
        size_t footer_entries = 0;
        for (; take < rest.size(); ++take) {
            const uint32_t more_pages = data_pages + rest[take].pages();
            const size_t more_entries = footer_entries + rest[take].footer_entries();
            if (more_pages > kMaxBatchDataPages ||
                !fits_empty_segment(batch_header_pages(take + 1, 0) + more_pages, more_entries)) {
                break;
            }
            data_pages = more_pages;
            footer_entries = more_entries;
        }
        if (take == 0 && !rest.empty()) {
            return fail(
                ErrorCode::kLimitExceeded,
                fmt::format("a pack with {} objects does not fit into a segment of {}",
                            rest.front().members.size(), format_size(options_.segment_bytes)));
        }
        const bool with_records =
            take == rest.size() && !records_written &&
            fits_empty_segment(batch_header_pages(take, record_bytes) + data_pages, footer_entries);
        const uint32_t pages =
            batch_header_pages(take, with_records ? record_bytes : 0) + data_pages;
        if (!fits_active(pages, footer_entries)) {
            STELLARIUM_TRY(with_reserve([&] { return start_segment(); }));
        }
        STELLARIUM_TRY(with_reserve([&] {
            return write_batch(plan, rest.first(take), with_records ? &batch : nullptr,
                               with_records ? record_bytes : 0, duplicate_bytes, protection);
        }));
        duplicate_bytes = 0;
        rest = rest.subspan(take);
        records_written = records_written || with_records;
    }
    return {};
}

Result<void> StoreImpl::write_batch(Plan& plan, std::span<const Unit> units,
                                    const WriteBatch* records, size_t record_bytes,
                                    uint64_t duplicate_bytes, MarkSet* protection) {
    static constexpr std::array<std::byte, kPageBytes> kZeroPage{};
    const uint32_t header_pages = batch_header_pages(units.size(), record_bytes);
    std::vector<std::byte> header_bytes(header_pages * kPageBytes);
    BatchHeader header{};
    header.store_id = store_id_;
    header.segment = active_.segment->number();
    header.page = active_.end_page;
    header.header_pages = header_pages;
    header.entries = static_cast<uint32_t>(units.size());
    header.record_bytes = static_cast<uint32_t>(record_bytes);
    {
        const std::lock_guard guard(state_mutex_);
        header.previous_sequence = sequence_.load();
        header.sequence = highest_sequence_ + 1;
        header.durable_through = durable_sequence_;
        header.duplicate_bytes = pending_duplicate_bytes_ + duplicate_bytes;
    }

    std::vector<iovec> buffers{iovec_of(header_bytes)};
    std::vector<Entry> entries;       // With members, for the segment's table and the index.
    std::vector<PageAddress> placed;  // Of the units.
    uint32_t page = active_.end_page + header_pages;
    size_t at = sizeof(BatchHeader);
    for (const Unit& unit : units) {
        Entry entry{};
        entry.id = unit.id;
        entry.page = static_cast<uint16_t>(page);
        entry.length = static_cast<uint32_t>(unit.bytes.size());
        entry.kind = static_cast<uint8_t>(unit.kind);
        std::memcpy(header_bytes.data() + at, &entry, sizeof(entry));
        at += sizeof(entry);
        entries.push_back(entry);
        if (unit.kind == EntryKind::kPack) {
            const auto pack = decode_pack(unit.bytes);
            assert(pack && pack->entries.size() == unit.members.size());
            append_member_entries(*pack, page, entries);
        }
        placed.push_back(PageAddress::make(active_.segment->number(), page));
        buffers.push_back(iovec_of(unit.bytes));
        const size_t padding = unit.pages() * kPageBytes - unit.bytes.size();
        if (padding > 0) {
            buffers.push_back(iovec_of(Bytes(kZeroPage).first(padding)));
        }
        page += unit.pages();
    }
    const uint32_t end_page = page;
    header.data_pages = end_page - active_.end_page - header_pages;
    if (records != nullptr) {
        header.records = static_cast<uint32_t>(records->records_.size());
        for (const WriteBatch::Record& record : records->records_) {
            RecordHeader record_header{};
            record_header.kind = record.kind;
            record_header.length = static_cast<uint32_t>(record.payload.size());
            std::memcpy(header_bytes.data() + at, &record_header, sizeof(record_header));
            at += sizeof(record_header);
            if (!record.payload.empty()) {
                std::memcpy(header_bytes.data() + at, record.payload.data(), record.payload.size());
            }
            at += record.payload.size();
        }
    }
    std::memcpy(header_bytes.data(), &header, sizeof(header));
    seal_batch(header_bytes);

    const uint64_t offset = uint64_t{active_.end_page} * kPageBytes;
    const auto caching =
        end_page - active_.end_page < kStreamedPages ? io::Caching::kKeep : io::Caching::kStream;
    if (auto written = io::write_all(*active_.file, std::move(buffers), offset, caching);
        !written) {
        // The batch is not there. Its bytes go now if they can; else the next batch of this segment
        // goes over them. Whatever takes its number, there or in the next segment, is acknowledged
        // only when that is durable: after a loss of power they would look like the log's last
        // batch.
        active_.has_remains = !active_.file->truncate(offset).has_value();
        const std::lock_guard guard(state_mutex_);
        note_unsynced(header.sequence);
        return written;
    }
    active_.has_remains = false;

    // Visible from here on: entries first, then the index that leads to them.
    for (size_t i = 0; i < entries.size(); ++i) {
        keep(active_.segment->number(), static_cast<uint32_t>(active_.entries + i), protection);
    }
    segments_->append_entries(*active_.segment, entries);
    for (const Entry& entry : entries) {
        if (entry.entry_kind() != EntryKind::kMember) {
            active_.segment->set_verified(entry.page, entry.pages());
        }
    }
    STELLARIUM_TRY(
        with_index([&] { return insert_entries(active_.segment->number(), entries, nullptr); }));
    for (size_t i = 0; i < units.size(); ++i) {
        if (units[i].kind != EntryKind::kPack) {
            plan.items[units[i].item].stored = true;
            plan.items[units[i].item].address = placed[i];
        }
        for (const size_t member : units[i].members) {
            plan.items[member].stored = true;
        }
    }
    active_.entries += entries.size();
    if (active_.first_sequence == 0) {
        active_.first_sequence = header.sequence;
    }
    active_.last_sequence = header.sequence;

    const std::lock_guard guard(state_mutex_);
    batches_.push_back({.sequence = header.sequence,
                        .segment = active_.segment->number(),
                        .page = active_.end_page,
                        .records = header.records,
                        .before = counters_});
    if (active_.end_page == 1) {
        counters_.add_pages(1);
    }
    counters_.add_batch(end_page - active_.end_page, entries, header.duplicate_bytes);
    pending_duplicate_bytes_ = 0;
    note_unsynced(header.sequence);
    active_.end_page = end_page;
    highest_sequence_ = header.sequence;
    sequence_.store(header.sequence, std::memory_order_release);
    return {};
}

void StoreImpl::note_unsynced(uint64_t sequence) {
    if (unsynced_.empty() || unsynced_.back().segment != active_.segment->number()) {
        unsynced_.push_back({.file = active_.file, .segment = active_.segment->number()});
    }
    unsynced_.back().last_sequence = sequence;
}

Result<void> StoreImpl::start_segment() {
    if (active_.has_remains) {
        // Left behind, the batch would compete with the one that takes its number.
        const auto cut = active_.file->truncate(uint64_t{active_.end_page} * kPageBytes);
        if (!cut) {
            return std::unexpected(cut.error().with_context(
                "what an append that failed has left at the end of a segment cannot be cut off"));
        }
        active_.has_remains = false;
    }
    if (last_segment_ >= PageAddress::kMaxSegment) {
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("the store {} has used all {} segment numbers", directory_,
                                PageAddress::kMaxSegment));
    }
    if (std::exchange(segments_missing_, false)) {
        STELLARIUM_TRY(files_.make_directory(join_path(directory_, kSegmentsName)));
        STELLARIUM_TRY(files_.sync_directory(directory_));
    }
    const uint32_t number = last_segment_ + 1;
    const std::string path = segments_->path(number);
    // kCreate: the remains of an attempt that failed may be there.
    STELLARIUM_ASSIGN(std::shared_ptr<io::File> file, files_.open(path, io::OpenMode::kCreate));
    STELLARIUM_TRY(file->truncate(0));
    const SegmentHeader header = make_segment_header(store_id_, number, highest_sequence_ + 1);
    if (auto written = io::write_all(*file, bytes_of(header), 0); !written) {
        // Best effort: an empty segment file is removed by the next open otherwise.
        [[maybe_unused]] const auto best_effort = files_.remove(path);
        return written;
    }
    last_segment_ = number;

    std::optional<PendingFooter> footer;
    if (active_.segment != nullptr && active_.first_sequence != 0) {
        footer = {.file = active_.file,
                  .segment = active_.segment,
                  .end_page = active_.end_page,
                  .first_sequence = active_.first_sequence,
                  .last_sequence = active_.last_sequence};
        // Derived data: when the disk is full it stays in memory, and is tried again later.
        [[maybe_unused]] const auto best_effort = write_footer(*footer);
    }
    const size_t closed_entries = active_.entries;
    active_ = {.segment = &segments_->add_in_memory(number, file, {}), .file = file, .end_page = 1};

    const std::lock_guard guard(state_mutex_);
    ++segments_created_;
    if (footer) {
        pending_footers_.push_back(*footer);
        counters_.add_pages(footer_pages(closed_entries));
    }
    return {};
}

Result<void> StoreImpl::write_footer(const PendingFooter& footer) {
    if (segments_->use_footer(*footer.segment, footer.end_page)) {
        return {};
    }
    const std::vector<Entry> entries = segments_->entries_in_memory(*footer.segment);
    const std::vector<std::byte> bytes =
        encode_footer(store_id_, footer.segment->number(), footer.end_page, entries,
                      footer.first_sequence, footer.last_sequence);
    const uint64_t offset = uint64_t{footer.end_page} * kPageBytes;
    // A footer is found from the file's end, so nothing may lie behind it.
    STELLARIUM_TRY(footer.file->truncate(offset));
    if (auto written = io::write_all(*footer.file, Bytes(bytes), offset); !written) {
        [[maybe_unused]] const auto best_effort = footer.file->truncate(offset);
        return written;
    }
    [[maybe_unused]] const auto best_effort =
        segments_->use_footer(*footer.segment, footer.end_page);
    return {};
}

}  // namespace stellarium::nebula
