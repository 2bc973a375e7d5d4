#include "nebula/segment.h"

#include <algorithm>
#include <cassert>
#include <charconv>
#include <cstring>
#include <deque>
#include <iterator>
#include <utility>

#include <fmt/format.h>

namespace stellarium::nebula {
namespace {

constexpr int kMaxInterruptionsInARow = 1024;

uint64_t page_offset(uint32_t page) {
    return uint64_t{page} * kPageBytes;
}

/// Places in a list of entries, both inside it.
struct Window {
    size_t low;
    size_t high;
};

/// Entries on either side of where one is guessed to be; fewer than four windows are not worth it.
constexpr size_t kGuessWindow = 4;
constexpr size_t kFewEntries = 4 * kGuessWindow;

/// Around where the entry at `page` should be among [begin, end), which has two at least: entries
/// lie about evenly over a segment. nullopt: before the second or after the last of them.
std::optional<Window> guess_window(std::span<const Entry> entries, size_t begin, size_t end,
                                   uint32_t page) {
    const uint32_t first = entries[begin].page.get();
    const uint32_t last = entries[end - 1].page.get();
    if (page <= first || page > last) {
        return std::nullopt;
    }
    const size_t guess = begin + uint64_t{page - first} * (end - 1 - begin) / (last - first);
    return Window{.low = guess - std::min(guess - begin, kGuessWindow),
                  .high = std::min(guess + kGuessWindow, end - 1)};
}

/// First entry at or after `page`. Each round narrows the range to the window where it should be,
/// or to one side of it. A plain bisection of a full segment touches some ten cache lines that
/// nobody has read lately; this touches three or four.
std::span<const Entry>::iterator first_at(std::span<const Entry> entries, uint32_t page) {
    constexpr int kRounds = 3;
    size_t begin = 0;
    size_t end = entries.size();
    for (int round = 0; round < kRounds && end - begin > kFewEntries; ++round) {
        const auto window = guess_window(entries, begin, end, page);
        if (!window) {
            begin = page <= entries[begin].page.get() ? begin : end;
            end = begin;
        } else if (entries[window->high].page.get() < page) {
            begin = window->high + 1;
        } else if (entries[window->low].page.get() >= page) {
            end = window->low;
        } else {
            begin = window->low + 1;
            end = window->high;
        }
    }
    return std::partition_point(entries.begin() + static_cast<ptrdiff_t>(begin),
                                entries.begin() + static_cast<ptrdiff_t>(end),
                                [page](const Entry& entry) { return entry.page.get() < page; });
}

/// Fetches what first_at() will look at first.
void prefetch_at(std::span<const Entry> entries, uint32_t page) {
    if (entries.size() <= kFewEntries) {
        return;
    }
    if (const auto window = guess_window(entries, 0, entries.size(), page)) {
        constexpr ptrdiff_t kLineBytes = 64;
        const Bytes bytes =
            std::as_bytes(entries.subspan(window->low, window->high + 1 - window->low));
        for (auto line = bytes.begin(); line < bytes.end(); line += kLineBytes) {
            __builtin_prefetch(std::to_address(line));
        }
    }
}

/// The page-addressable entry that covers `page`, or null.
const Entry* entry_covering(std::span<const Entry> entries, uint32_t page) {
    const auto after = first_at(entries, page + 1);
    if (after == entries.begin()) {
        return nullptr;
    }
    const Entry& entry = *(after - 1);
    return entry.page_addressable() && page < entry.page.get() + entry.pages() ? &entry : nullptr;
}

/// Copies `from` into the scattered buffers, starting `skip` bytes into them.
void scatter(Bytes from, std::span<const iovec> into, size_t skip) {
    for (const iovec& part : into) {
        if (from.empty()) {
            return;
        }
        if (skip >= part.iov_len) {
            skip -= part.iov_len;
            continue;
        }
        const size_t length = std::min(part.iov_len - skip, from.size());
        std::memcpy(static_cast<std::byte*>(part.iov_base) + skip, from.data(), length);
        from = from.subspan(length);
        skip = 0;
    }
}

size_t total_bytes(std::span<const iovec> buffers) {
    size_t total = 0;
    for (const iovec& buffer : buffers) {
        total += buffer.iov_len;
    }
    return total;
}

std::string mismatch(const std::string& path, const Entry& entry, const Hash256& found) {
    return fmt::format("{} at offset {}: {} {} of {} bytes is damaged: its bytes hash to {}", path,
                       entry.offset_bytes(), to_string(entry.entry_kind()), entry.id.hex(),
                       entry.length.get(), found.hex());
}

}  // namespace

std::string segment_file_name(uint32_t segment) {
    return fmt::format("segments/{:07}.seg", segment);
}

std::optional<uint32_t> parse_segment_file_name(std::string_view name) {
    constexpr std::string_view kSuffix = ".seg";
    if (!name.ends_with(kSuffix)) {
        return std::nullopt;
    }
    const std::string_view digits = name.substr(0, name.size() - kSuffix.size());
    uint32_t number = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
    if (error != std::errc() || end != digits.data() + digits.size() || number == 0 ||
        number > PageAddress::kMaxSegment ||
        segment_file_name(number) != fmt::format("segments/{}", name)) {
        return std::nullopt;
    }
    return number;
}

Result<void> read_exact_into(io::File& file, std::span<const iovec> into, uint64_t offset_bytes,
                             IoMode mode) {
    std::vector<iovec> rest_storage;
    std::span<const iovec> rest = into;
    size_t left = total_bytes(into);
    int interruptions = 0;
    while (left > 0) {
        const auto got = file.preadv(rest, offset_bytes, mode);
        if (!got) {
            if (got.error().code() == ErrorCode::kInterrupted &&
                ++interruptions < kMaxInterruptionsInARow) {
                continue;
            }
            return std::unexpected(got.error());
        }
        if (*got == 0) {
            return fail(ErrorCode::kCorrupt,
                        fmt::format("{} ends at offset {}, where {} more bytes were expected: the "
                                    "file is truncated",
                                    file.path(), offset_bytes, left));
        }
        interruptions = 0;
        left -= *got;
        offset_bytes += *got;
        if (left == 0) {
            break;
        }
        // A short read: go on behind it.
        std::vector<iovec> shorter;
        size_t skip = *got;
        for (const iovec& part : rest) {
            if (skip >= part.iov_len) {
                skip -= part.iov_len;
                continue;
            }
            shorter.push_back({static_cast<std::byte*>(part.iov_base) + skip, part.iov_len - skip});
            skip = 0;
        }
        rest_storage = std::move(shorter);
        rest = rest_storage;
    }
    return {};
}

// ---- Reading the log --------------------------------------------------------------------------

Result<std::vector<std::byte>> read_batch_header(io::File& file, const StoreId& store_id,
                                                 uint32_t segment, uint32_t page) {
    const auto with_place = [&](const Error& error) {
        return std::unexpected(
            error.with_context(fmt::format("{} at offset {}", file.path(), page_offset(page))));
    };
    if (page >= kSegmentPages) {
        return fail(ErrorCode::kCorrupt, fmt::format("{}: no batch starts at page {}, the end of a "
                                                     "segment",
                                                     file.path(), page));
    }
    std::vector<std::byte> bytes(kPageBytes);
    STELLARIUM_TRY(io::read_exact(file, bytes, page_offset(page)));
    const auto pages = peek_header_pages(bytes, store_id, segment, page);
    if (!pages) {
        return with_place(pages.error());
    }
    bytes.resize(*pages * kPageBytes);
    if (*pages > 1) {
        STELLARIUM_TRY(
            io::read_exact(file, MutableBytes(bytes).subspan(kPageBytes), page_offset(page + 1)));
    }
    if (const auto batch = decode_batch(bytes, store_id, segment, page); !batch) {
        return with_place(batch.error());
    }
    return bytes;
}

Result<ScannedBatch> read_batch(io::File& file, const StoreId& store_id, uint32_t segment,
                                uint32_t page, DataCheck check, std::span<const PageRun> dead) {
    STELLARIUM_ASSIGN(const std::vector<std::byte> header_bytes,
                      read_batch_header(file, store_id, segment, page));
    STELLARIUM_ASSIGN(const BatchView view, decode_batch(header_bytes, store_id, segment, page));
    ScannedBatch batch;
    batch.page = page;
    batch.end_page = view.end_page();
    batch.sequence = view.header->sequence;
    batch.previous_sequence = view.header->previous_sequence;
    batch.durable_through = view.header->durable_through;
    batch.duplicate_bytes = view.header->duplicate_bytes;
    batch.records = view.header->records;
    batch.entries.reserve(view.entries.size());

    // The members of packs stand in the packs only. Without checking the data, packs alone are
    // read. Where the file ends too early they are read as if zeros followed, as they do once a
    // repair has put something behind them: what is left of a pack leads to what is left in it.
    std::vector<std::byte> data;
    std::deque<std::vector<std::byte>> packs;
    std::vector<Bytes> contents(view.entries.size());
    const auto read_or_note_end = [&](MutableBytes into, uint32_t from_page) -> Result<bool> {
        auto read = io::read_exact(file, into, page_offset(from_page));
        if (!read && read.error().code() == ErrorCode::kCorrupt) {
            batch.damage.push_back(read.error().message());
            return false;
        }
        STELLARIUM_TRY(std::move(read));
        return true;
    };
    if (check == DataCheck::kHashes) {
        const uint32_t data_page = page + view.header->header_pages.get();
        data.resize(size_t{batch.end_page - data_page} * kPageBytes);
        STELLARIUM_ASSIGN(const bool complete, read_or_note_end(data, data_page));
        for (size_t i = 0; i < view.entries.size(); ++i) {
            if (skip_dead(dead, view.entries[i].page) != view.entries[i].page ||
                (!complete && view.entries[i].entry_kind() != EntryKind::kPack)) {
                continue;
            }
            contents[i] = Bytes(data).subspan(
                view.entries[i].offset_bytes() - page_offset(data_page), view.entries[i].length);
        }
    } else {
        for (size_t i = 0; i < view.entries.size(); ++i) {
            if (view.entries[i].entry_kind() != EntryKind::kPack ||
                skip_dead(dead, view.entries[i].page) != view.entries[i].page) {
                continue;
            }
            packs.emplace_back(view.entries[i].length);
            STELLARIUM_TRY(read_or_note_end(packs.back(), view.entries[i].page));
            contents[i] = packs.back();
        }
    }
    std::vector<Bytes> inputs;
    for (const Bytes content : contents) {
        if (!content.empty()) {
            inputs.push_back(content);
        }
    }
    std::vector<Hash256> hashes(inputs.size());
    hash_many(inputs, hashes);

    size_t next_hash = 0;
    for (size_t i = 0; i < view.entries.size(); ++i) {
        const Entry& entry = view.entries[i];
        batch.entries.push_back(entry);
        if (contents[i].empty()) {
            continue;
        }
        const Hash256& found = hashes[next_hash++];
        if (found != entry.id) {
            batch.damage.push_back(mismatch(file.path(), entry, found));
        }
        if (entry.entry_kind() != EntryKind::kPack) {
            continue;
        }
        if (found != entry.id) {
            batch.damaged_packs.push_back(entry.page);
        }
        // A damaged pack may still lead to members that are whole: each is checked when read.
        const auto pack = decode_pack(contents[i]);
        if (pack) {
            append_member_entries(*pack, entry.page, batch.entries);
        } else {
            batch.damage.push_back(fmt::format("{} at offset {}: {}", file.path(),
                                               entry.offset_bytes(), pack.error().message()));
            batch.lost_members = batch.damage.back();
        }
    }
    return batch;
}

Result<std::optional<uint32_t>> find_batch(io::File& file, const StoreId& store_id,
                                           uint32_t segment, uint32_t page) {
    constexpr uint32_t kStepPages = 256;
    STELLARIUM_ASSIGN(const uint64_t size, file.size_bytes());
    const auto end = static_cast<uint32_t>(std::min<uint64_t>(size / kPageBytes, kSegmentPages));
    std::vector<std::byte> bytes(kStepPages * kPageBytes);
    for (uint32_t at = page; at < end; at += kStepPages) {
        const uint32_t count = std::min(kStepPages, end - at);
        const MutableBytes step = MutableBytes(bytes).first(count * kPageBytes);
        STELLARIUM_TRY(io::read_exact(file, step, page_offset(at)));
        for (uint32_t i = 0; i < count; ++i) {
            if (!looks_like_batch(step.subspan(i * kPageBytes, kPageBytes), store_id, segment,
                                  at + i)) {
                continue;
            }
            const auto header = read_batch_header(file, store_id, segment, at + i);
            if (header) {
                return at + i;
            }
            if (header.error().code() != ErrorCode::kCorrupt) {
                return std::unexpected(header.error());
            }
        }
    }
    return std::nullopt;
}

// ---- Segment ----------------------------------------------------------------------------------

Segment::~Segment() {
    delete[] verified_.load();
    delete[] dead_.load();
}

Segment::PageBits* Segment::bits_of(std::atomic<PageBits*>& bits) {
    PageBits* words = bits.load(std::memory_order_acquire);
    if (words == nullptr) {
        auto fresh = std::make_unique<PageBits[]>(kPageWords);
        if (bits.compare_exchange_strong(words, fresh.get())) {
            words = fresh.release();
        }
    }
    return words;
}

bool Segment::is_verified(uint32_t page, uint32_t pages) const {
    const PageBits* words = verified_.load(std::memory_order_acquire);
    if (words == nullptr) {
        return false;
    }
    for (uint32_t at = page; at < page + pages; ++at) {
        const uint64_t word = words[at / 64].load(std::memory_order_acquire);
        if ((word >> (at % 64) & 1) == 0) {
            return false;
        }
    }
    return true;
}

void Segment::set_verified(uint32_t page, uint32_t pages) {
    PageBits* words = bits_of(verified_);
    for (uint32_t at = page; at < page + pages; ++at) {
        words[at / 64].fetch_or(uint64_t{1} << (at % 64), std::memory_order_release);
    }
}

void Segment::clear_verified(uint32_t page, uint32_t pages) {
    PageBits* words = bits_of(verified_);
    for (uint32_t at = page; at < page + pages; ++at) {
        words[at / 64].fetch_and(~(uint64_t{1} << (at % 64)), std::memory_order_release);
    }
}

bool Segment::any_dead(uint32_t page, uint32_t pages) const {
    // Sequentially consistent: see reader_gate.h.
    if (is_gone()) {
        return true;
    }
    const PageBits* words = dead_.load(std::memory_order_seq_cst);
    if (words == nullptr) {
        return false;
    }
    for (uint32_t at = page; at < page + pages; ++at) {
        if ((words[at / 64].load(std::memory_order_seq_cst) >> (at % 64) & 1) != 0) {
            return true;
        }
    }
    return false;
}

bool Segment::is_dead(const Entry& entry) const {
    return any_dead(entry.page, 1) || (entry.entry_kind() == EntryKind::kMember &&
                                       std::ranges::binary_search(dead_members_, place_of(entry)));
}

bool Segment::is_damaged(const Entry& entry) const {
    return !damaged_.empty() && std::ranges::binary_search(damaged_, place_of(entry));
}

// ---- SegmentSet -------------------------------------------------------------------------------

SegmentSet::SegmentSet(io::FileSystem& files, std::string directory, const StoreId& store_id,
                       size_t mapped_footers)
    : files_(files),
      directory_(std::move(directory)),
      store_id_(store_id),
      most_mapped_footers_(mapped_footers),
      blocks_(std::make_unique<std::array<std::atomic<Block*>, kBlocks>>()) {}

SegmentSet::~SegmentSet() {
    for (const auto& block : *blocks_) {
        delete block.load();
    }
}

Segment* SegmentSet::find(uint32_t number) const {
    const size_t block_number = number / kBlockSegments;
    if (block_number >= kBlocks) {
        return nullptr;
    }
    const Block* block = (*blocks_)[block_number].load(std::memory_order_acquire);
    return block == nullptr
               ? nullptr
               : block->segments[number % kBlockSegments].load(std::memory_order_acquire);
}

Segment& SegmentSet::add(uint32_t number) {
    assert(number > 0 && number <= PageAddress::kMaxSegment);
    const std::lock_guard guard(list_mutex_);
    std::atomic<Block*>& block_slot = (*blocks_)[number / kBlockSegments];
    Block* block = block_slot.load(std::memory_order_acquire);
    if (block == nullptr) {
        block = std::make_unique<Block>().release();  // Owned by blocks_, see the destructor.
        block_slot.store(block, std::memory_order_release);
    }
    assert(block->segments[number % kBlockSegments].load() == nullptr);
    list_.push_back(std::make_unique<Segment>(number));
    Segment& segment = *list_.back();
    take_dead_parts(segment);
    block->segments[number % kBlockSegments].store(&segment, std::memory_order_release);
    return segment;
}

std::vector<PageRun> SegmentSet::known_dead_runs(uint32_t number) const {
    const auto found = dead_map_.segments.find(number);
    return found == dead_map_.segments.end() ? std::vector<PageRun>() : found->second.runs;
}

void SegmentSet::take_dead_parts(Segment& segment) {
    const auto found = dead_map_.segments.find(segment.number());
    if (found == dead_map_.segments.end()) {
        return;
    }
    const DeadSegment& parts = found->second;
    set_dead(segment, {}, parts.runs);
    const std::unique_lock lock(segment.mutex_);
    segment.dead_members_ = parts.members;
    segment.damaged_ = parts.damaged;
}

std::vector<Segment*> SegmentSet::all() const {
    std::vector<Segment*> out;
    {
        const std::lock_guard guard(list_mutex_);
        out.reserve(list_.size());
        for (const auto& segment : list_) {
            if (!segment->is_gone()) {
                out.push_back(segment.get());
            }
        }
    }
    std::ranges::sort(out, {}, &Segment::number);
    return out;
}

size_t SegmentSet::count() const {
    const std::lock_guard guard(list_mutex_);
    return static_cast<size_t>(
        std::ranges::count_if(list_, [](const auto& segment) { return !segment->is_gone(); }));
}

Segment& SegmentSet::add_in_memory(uint32_t number, std::shared_ptr<io::File> file,
                                   std::vector<Entry> entries) {
    Segment* segment = find(number);
    if (segment == nullptr) {
        segment = &add(number);
    }
    bool opened = false;
    {
        const std::unique_lock lock(segment->mutex_);
        opened = segment->file_ == nullptr;
        segment->file_ = std::move(file);
        segment->header_checked_ = true;
        segment->entries_ = std::move(entries);
        segment->in_memory_ = true;
    }
    if (opened) {
        note_file_opened(*segment);
    }
    return *segment;
}

void SegmentSet::append_entries(Segment& segment, std::span<const Entry> entries) {
    const std::unique_lock lock(segment.mutex_);
    assert(segment.in_memory_);
    segment.entries_.insert(segment.entries_.end(), entries.begin(), entries.end());
}

Result<void> SegmentSet::insert_entry(Segment& segment, const Entry& entry) {
    std::vector<Entry> entries;
    STELLARIUM_TRY(with_entries(segment, [&](std::span<const Entry> present) {
        entries.assign(present.begin(), present.end());
    }));
    const std::unique_lock lock(segment.mutex_);
    // A pack stands before its members, which lie in its first page or later ones.
    entries.insert(std::ranges::upper_bound(entries, place_of(entry), {}, place_of), entry);
    segment.entries_ = std::move(entries);
    segment.in_memory_ = true;
    return {};
}

void SegmentSet::set_entries(Segment& segment, std::vector<Entry> entries) {
    const std::unique_lock lock(segment.mutex_);
    segment.entries_ = std::move(entries);
    segment.in_memory_ = true;
    segment.footer_ = nullptr;
    segment.footer_entries_ = {};
}

std::vector<Entry> SegmentSet::entries_in_memory(const Segment& segment) const {
    const std::shared_lock lock(segment.mutex_);
    return segment.entries_;
}

bool SegmentSet::use_footer(Segment& segment, uint32_t footer_page) {
    const auto open_file = file(segment);
    {
        const std::unique_lock lock(segment.mutex_);
        if (!segment.in_memory_) {
            return true;
        }
        if (!open_file || !map_footer(segment, **open_file)) {
            return false;
        }
        const auto mapped_pages = segment.footer_->bytes().size() / kPageBytes;
        const auto size = (*open_file)->size_bytes();
        if (!size || *size / kPageBytes - mapped_pages != footer_page ||
            segment.footer_entries_.size() != segment.entries_.size()) {
            segment.footer_ = nullptr;
            segment.footer_entries_ = {};
            return false;
        }
        segment.in_memory_ = false;
        segment.entries_ = {};
    }
    note_footer_mapped(segment);
    return true;
}

std::string SegmentSet::path(uint32_t number) const {
    return fmt::format("{}/{}", directory_, segment_file_name(number));
}

std::unexpected<Error> SegmentSet::stale(const Segment& segment, uint32_t page) const {
    return fail(ErrorCode::kStale,
                fmt::format("{} at offset {}: garbage collection has freed or moved what was here; "
                            "look it up by its id",
                            path(segment.number()), page_offset(page)));
}

Result<std::shared_ptr<io::File>> SegmentSet::open_locked(Segment& segment) {
    if (segment.is_gone()) {
        return stale(segment, 0);
    }
    STELLARIUM_ASSIGN(std::shared_ptr<io::File> file,
                      files_.open(path(segment.number()), io::OpenMode::kReadOnly));
    if (!segment.header_checked_) {
        std::vector<std::byte> page(kPageBytes);
        Result<void> header = io::read_exact(*file, page, 0);
        if (header) {
            const auto decoded = decode_segment_header(page, store_id_, segment.number());
            if (!decoded) {
                header = std::unexpected(decoded.error().with_context(file->path()));
            }
        }
        if (!header && header.error().code() != ErrorCode::kCorrupt) {
            return std::unexpected(header.error());
        }
        segment.header_checked_ = true;
        if (!header) {
            // Batches name store, segment and page themselves, and data is checked by its ids.
            warn(header.error().message() + "; reading its batches all the same");
        }
    }
    segment.file_ = file;
    return file;
}

Result<std::shared_ptr<io::File>> SegmentSet::file(Segment& segment) {
    {
        const std::shared_lock lock(segment.mutex_);
        if (segment.file_ != nullptr) {
            segment.file_used_.store(true, std::memory_order_relaxed);
            return segment.file_;
        }
    }
    std::shared_ptr<io::File> file;
    {
        const std::unique_lock lock(segment.mutex_);
        if (segment.file_ != nullptr) {
            return segment.file_;
        }
        STELLARIUM_ASSIGN(file, open_locked(segment));
    }
    note_file_opened(segment);
    return file;
}

bool SegmentSet::has_open_file(Segment& segment) const {
    const std::shared_lock lock(segment.mutex_);
    return segment.file_ != nullptr;
}

void SegmentSet::note_file_opened(Segment& segment) {
    const std::lock_guard guard(cache_mutex_);
    open_files_.push_back(&segment);
    // Second chance: what was used since the last look goes to the end of the queue once.
    for (size_t looks = 2 * open_files_.size();
         open_files_.size() > kMaxOpenSegmentFiles && looks > 0; --looks) {
        Segment* oldest = open_files_.front();
        open_files_.pop_front();
        if (oldest == &segment || oldest->file_used_.exchange(false, std::memory_order_relaxed)) {
            open_files_.push_back(oldest);
            continue;
        }
        const std::unique_lock lock(oldest->mutex_);
        oldest->file_ = nullptr;
    }
}

void SegmentSet::note_footer_mapped(Segment& segment) {
    const std::lock_guard guard(cache_mutex_);
    mapped_footers_.push_back(&segment);
    for (size_t looks = 2 * mapped_footers_.size();
         mapped_footers_.size() > most_mapped_footers_ && looks > 0; --looks) {
        Segment* oldest = mapped_footers_.front();
        mapped_footers_.pop_front();
        if (oldest == &segment || oldest->footer_used_.exchange(false, std::memory_order_relaxed)) {
            mapped_footers_.push_back(oldest);
            continue;
        }
        const std::unique_lock lock(oldest->mutex_);
        oldest->footer_ = nullptr;
        oldest->footer_entries_ = {};
    }
}

void SegmentSet::warn(std::string sentence) {
    const std::lock_guard guard(warnings_mutex_);
    warnings_.push_back(std::move(sentence));
}

std::vector<std::string> SegmentSet::take_warnings() {
    const std::lock_guard guard(warnings_mutex_);
    return std::exchange(warnings_, {});
}

Result<void> SegmentSet::map_footer(Segment& segment, io::File& file) {
    STELLARIUM_ASSIGN(const uint64_t size, file.size_bytes());
    const auto with_path = [&](const Error& error) {
        return std::unexpected(error.with_context(file.path()));
    };
    if (size < 2 * kPageBytes || size % kPageBytes != 0) {
        return fail(
            ErrorCode::kCorrupt,
            fmt::format("{}: {} bytes are not whole pages with a footer", file.path(), size));
    }
    const uint64_t pages = size / kPageBytes;
    std::vector<std::byte> last(kPageBytes);
    STELLARIUM_TRY(io::read_exact(file, last, size - kPageBytes));
    const auto trailer = decode_footer_trailer(last, store_id_, segment.number(), pages);
    if (!trailer) {
        return with_path(trailer.error());
    }
    const uint64_t start = page_offset(trailer->footer_page);
    STELLARIUM_ASSIGN(auto mapped, file.map(start, size - start));
    const auto footer = decode_footer(mapped->bytes(), store_id_, segment.number(), pages);
    if (!footer) {
        return with_path(footer.error());
    }
    segment.footer_ = std::move(mapped);
    segment.footer_entries_ = footer->entries;
    segment.was_mapped_ = true;
    return {};
}

Result<void> SegmentSet::load_entries(Segment& segment, std::unique_lock<std::shared_mutex>& lock) {
    assert(lock.owns_lock());
    std::shared_ptr<io::File> file = segment.file_;
    bool opened = false;
    if (file == nullptr) {
        STELLARIUM_ASSIGN(file, open_locked(segment));
        opened = true;
    }
    const auto mapped = map_footer(segment, *file);
    if (!mapped && mapped.error().code() != ErrorCode::kCorrupt) {
        return mapped;
    }
    if (!mapped) {
        // The footer is derived: the same entries stand in the batches.
        std::vector<Entry> entries;
        size_t gaps = 0;
        uint32_t page = 1;
        const std::vector<PageRun> dead = dead_runs(segment);
        while (true) {
            page = skip_dead(dead, page);
            auto batch =
                read_batch(*file, store_id_, segment.number(), page, DataCheck::kNone, dead);
            if (batch) {
                entries.insert(entries.end(), batch->entries.begin(), batch->entries.end());
                if (!batch->lost_members.empty()) {
                    ++gaps;
                    segment.metadata_damage_ = batch->lost_members;
                }
                page = batch->end_page;
                continue;
            }
            if (batch.error().code() != ErrorCode::kCorrupt) {
                return std::unexpected(batch.error());
            }
            STELLARIUM_ASSIGN(const auto next,
                              find_batch(*file, store_id_, segment.number(), page));
            if (!next) {
                break;
            }
            ++gaps;
            segment.metadata_damage_ = batch.error().message();
            page = *next;
        }
        if (entries.empty() && dead.empty()) {
            segment.metadata_damage_ = mapped.error().message();
        }
        warn(fmt::format("{}; {} entries were read from the segment's batches instead{}",
                         mapped.error().message(), entries.size(),
                         gaps == 0 ? std::string()
                                   : fmt::format(", but {} stretches of it are unreadable: {}",
                                                 gaps, segment.metadata_damage_)));
        if (segment.was_mapped_) {
            segment.renumbered_.store(renumberings_.fetch_add(1) + 1, std::memory_order_seq_cst);
        }
        segment.entries_ = std::move(entries);
        segment.in_memory_ = true;
    }
    lock.unlock();
    if (opened) {
        note_file_opened(segment);
    }
    if (mapped) {
        note_footer_mapped(segment);
    }
    return {};
}

template <typename Visit>
Result<void> SegmentSet::with_entries(Segment& segment, Visit&& visit) {
    while (true) {
        {
            const std::shared_lock lock(segment.mutex_);
            if (segment.is_gone()) {
                visit(std::span<const Entry>());
                return {};
            }
            if (segment.in_memory_) {
                visit(std::span<const Entry>(segment.entries_));
                return {};
            }
            if (segment.footer_ != nullptr) {
                segment.footer_used_.store(true, std::memory_order_relaxed);
                visit(segment.footer_entries_);
                return {};
            }
        }
        std::unique_lock lock(segment.mutex_);
        if (!segment.is_gone() && !segment.in_memory_ && segment.footer_ == nullptr) {
            STELLARIUM_TRY(load_entries(segment, lock));
        }
    }
}

Result<std::optional<LocatedEntry>> SegmentSet::entry_at(Segment& segment, uint32_t page,
                                                         const ChunkId& id) {
    const Sought sought{.page = page, .id = &id};
    std::optional<LocatedEntry> found;
    STELLARIUM_TRY(entries_at(segment, std::span(&sought, 1), std::span(&found, 1)));
    return found;
}

Result<void> SegmentSet::entries_at(Segment& segment, std::span<const Sought> sought,
                                    std::span<std::optional<LocatedEntry>> found) {
    assert(sought.size() == found.size());
    constexpr size_t kAhead = 8;
    return with_entries(segment, [&](std::span<const Entry> entries) {
        for (size_t i = 1; i < std::min(kAhead, sought.size()); ++i) {
            prefetch_at(entries, sought[i].page);
        }
        for (size_t i = 0; i < sought.size(); ++i) {
            if (i + kAhead < sought.size()) {
                prefetch_at(entries, sought[i + kAhead].page);
            }
            const auto [page, id] = sought[i];
            found[i].reset();
            for (auto it = first_at(entries, page); it != entries.end() && it->page.get() == page;
                 ++it) {
                if (it->id == *id && it->entry_kind() != EntryKind::kPack &&
                    !segment.is_dead(*it)) {
                    found[i] = {.entry = *it,
                                .ordinal = static_cast<uint32_t>(it - entries.begin()),
                                .damaged = segment.is_damaged(*it)};
                    break;
                }
            }
        }
    });
}

Result<void> SegmentSet::visit_entries(Segment& segment,
                                       const std::function<void(std::span<const Entry>)>& visit) {
    return with_entries(segment, visit);
}

Result<void> SegmentSet::visit_live(Segment& segment,
                                    const std::function<void(std::span<const Entry>)>& visit) {
    std::vector<Entry> live;
    bool all = false;
    STELLARIUM_TRY(with_entries(segment, [&](std::span<const Entry> entries) {
        all = segment.dead_.load() == nullptr && segment.dead_members_.empty();
        if (all) {
            visit(entries);
            return;
        }
        std::ranges::copy_if(entries, std::back_inserter(live),
                             [&](const Entry& entry) { return !segment.is_dead(entry); });
    }));
    if (!all) {
        visit(live);
    }
    return {};
}

Result<void> SegmentSet::visit_each(
    Segment& segment, uint32_t first,
    const std::function<bool(uint32_t ordinal, const Entry& entry, bool is_dead)>& visit) {
    return with_entries(segment, [&](std::span<const Entry> entries) {
        for (size_t i = first; i < entries.size(); ++i) {
            if (!visit(static_cast<uint32_t>(i), entries[i], segment.is_dead(entries[i]))) {
                return;
            }
        }
    });
}

void SegmentSet::set_dead(Segment& segment, std::span<const Entry> entries,
                          std::span<const PageRun> runs) {
    const std::unique_lock lock(segment.mutex_);
    Segment::PageBits* words = Segment::bits_of(segment.dead_);
    const auto set_pages = [words](uint32_t page, uint32_t end) {
        for (uint32_t at = page; at < end; ++at) {
            words[at / 64].fetch_or(uint64_t{1} << (at % 64), std::memory_order_seq_cst);
        }
    };
    for (const PageRun& run : runs) {
        set_pages(run.page, run.end());
    }
    std::vector<EntryPlace> members;
    for (const Entry& entry : entries) {
        if (entry.entry_kind() == EntryKind::kMember) {
            members.push_back(place_of(entry));
        } else {
            set_pages(entry.page, entry.page.get() + entry.pages());
        }
    }
    if (!members.empty()) {
        segment.dead_members_.insert(segment.dead_members_.end(), members.begin(), members.end());
        std::ranges::sort(segment.dead_members_);
        const auto repeated = std::ranges::unique(segment.dead_members_);
        segment.dead_members_.erase(repeated.begin(), repeated.end());
    }
    // What lies in dead pages need not be listed one by one.
    const auto in_dead_page = [&segment](EntryPlace place) {
        return segment.any_dead(place >> 16, 1);
    };
    std::erase_if(segment.dead_members_, in_dead_page);
    std::erase_if(segment.damaged_, [&](EntryPlace place) {
        return in_dead_page(place) || std::ranges::binary_search(segment.dead_members_, place);
    });
}

DeadSegment SegmentSet::dead_parts(Segment& segment) {
    const std::shared_lock lock(segment.mutex_);
    return {.whole = false,
            .runs = dead_runs(segment),
            .members = segment.dead_members_,
            .damaged = segment.damaged_};
}

std::vector<PageRun> SegmentSet::dead_runs(const Segment& segment) {
    std::vector<PageRun> runs;
    const Segment::PageBits* words = segment.dead_.load(std::memory_order_seq_cst);
    if (words == nullptr) {
        return runs;
    }
    for (uint32_t page = 0; page < kSegmentPages; ++page) {
        const uint64_t word = words[page / 64].load(std::memory_order_seq_cst);
        if (word == 0) {
            page += 63 - page % 64;
            continue;
        }
        if ((word >> (page % 64) & 1) == 0) {
            continue;
        }
        if (!runs.empty() && runs.back().end() == page) {
            ++runs.back().pages;
        } else {
            runs.push_back({page, 1});
        }
    }
    return runs;
}

void SegmentSet::set_gone(Segment& segment) {
    {
        const std::unique_lock lock(segment.mutex_);
        segment.gone_.store(true, std::memory_order_seq_cst);
        segment.file_ = nullptr;
        segment.footer_ = nullptr;
        segment.footer_entries_ = {};
        segment.entries_ = {};
        segment.in_memory_ = false;
        segment.dead_members_ = {};
        segment.damaged_ = {};
        segment.metadata_damage_.clear();
    }
    const std::lock_guard guard(cache_mutex_);
    std::erase(open_files_, &segment);
    std::erase(mapped_footers_, &segment);
}

void SegmentSet::add_damaged(Segment& segment, const Entry& entry) {
    const std::unique_lock lock(segment.mutex_);
    segment.clear_verified(entry.page, entry.pages());
    const EntryPlace place = place_of(entry);
    const auto at = std::ranges::lower_bound(segment.damaged_, place);
    if (!segment.is_dead(entry) && (at == segment.damaged_.end() || *at != place)) {
        segment.damaged_.insert(at, place);
        damage_version_.fetch_add(1, std::memory_order_acq_rel);
    }
}

Result<std::vector<Entry>> SegmentSet::damaged_entries(Segment& segment, uint32_t page,
                                                       uint32_t pages) {
    std::vector<Entry> out;
    STELLARIUM_TRY(with_entries(segment, [&](std::span<const Entry> entries) {
        for (const EntryPlace place : segment.damaged_) {
            if ((place >> 16) >= page + pages) {
                break;
            }
            for (auto it = first_at(entries, place >> 16);
                 it != entries.end() && it->page.get() == place >> 16; ++it) {
                if (place_of(*it) == place && it->page.get() + it->pages() > page) {
                    out.push_back(*it);
                }
            }
        }
    }));
    return out;
}

uint64_t SegmentSet::damaged_count() const {
    uint64_t count = 0;
    for (const Segment* segment : all()) {
        const std::shared_lock lock(segment->mutex_);
        count += segment->damaged_.size();
    }
    return count;
}

void SegmentSet::add_metadata_damage(Segment& segment, std::string sentence) {
    const std::unique_lock lock(segment.mutex_);
    segment.metadata_damage_ = std::move(sentence);
}

std::string SegmentSet::metadata_damage(Segment& segment) {
    const std::shared_lock lock(segment.mutex_);
    return segment.metadata_damage_;
}

Result<void> SegmentSet::read_pages(Segment& segment, uint32_t page, std::span<const iovec> into,
                                    ReadCheck check, IoMode mode) {
    const size_t bytes = total_bytes(into);
    assert(bytes % kPageBytes == 0);
    const size_t pages = bytes / kPageBytes;
    if (page + pages > kSegmentPages) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("{}: {} pages from page {} on reach past a segment's end",
                                path(segment.number()), pages, page));
    }
    if (segment.any_dead(page, static_cast<uint32_t>(pages))) {
        return stale(segment, page);
    }
    const bool checked =
        check == ReadCheck::kFirst && segment.is_verified(page, static_cast<uint32_t>(pages));
    if (mode == IoMode::kNoWait && (!checked || !has_open_file(segment))) {
        return fail(ErrorCode::kWouldBlock,
                    fmt::format("{}: pages from {} on are not checked yet, or the file is not open",
                                path(segment.number()), page));
    }
    if (checked) {
        STELLARIUM_ASSIGN(const auto open_file, file(segment));
        return read_exact_into(*open_file, into, page_offset(page), mode);
    }
    return read_checked(segment, page, into, mode);
}

Result<void> SegmentSet::read_checked(Segment& segment, uint32_t page, std::span<const iovec> into,
                                      IoMode mode) {
    const auto end = page + static_cast<uint32_t>(total_bytes(into) / kPageBytes);
    STELLARIUM_ASSIGN(const auto open_file, file(segment));
    std::vector<std::byte> buffer;
    std::vector<Entry> chunks;
    std::vector<Bytes> inputs;
    std::vector<Hash256> hashes;
    for (uint32_t at = page; at < end;) {
        // A run of chunks without gaps, which begins and ends at chunk borders.
        chunks.clear();
        STELLARIUM_TRY(with_entries(segment, [&](std::span<const Entry> entries) {
            uint32_t next = at;
            while (next < end &&
                   (chunks.empty() || next - chunks.front().page.get() < kMaxCheckedReadPages)) {
                const Entry* entry = entry_covering(entries, next);
                if (entry == nullptr) {
                    break;
                }
                chunks.push_back(*entry);
                next = entry->page.get() + entry->pages();
            }
        }));
        if (chunks.empty()) {
            const std::string damage = metadata_damage(segment);
            return fail(damage.empty() ? ErrorCode::kInvalidArgument : ErrorCode::kCorrupt,
                        fmt::format("{} at offset {}: no chunk lies here{}{}", open_file->path(),
                                    page_offset(at), damage.empty() ? "" : "; ", damage));
        }
        const uint32_t run_start = chunks.front().page;
        const uint32_t run_end = chunks.back().page.get() + chunks.back().pages();
        // Checked in memory of ours: a guest could change its own buffers while they are hashed,
        // and have bad bytes pass as good for everybody.
        buffer.resize(size_t{run_end - run_start} * kPageBytes);
        const iovec whole{.iov_base = buffer.data(), .iov_len = buffer.size()};
        if (auto read = read_exact_into(*open_file, {&whole, 1}, page_offset(run_start), mode);
            !read) {
            return std::unexpected(
                read.error().with_context(fmt::format("chunk {}", chunks.front().id.hex())));
        }
        inputs.clear();
        for (const Entry& chunk : chunks) {
            inputs.push_back(
                Bytes(buffer).subspan(page_offset(chunk.page.get() - run_start), chunk.length));
        }
        hashes.resize(inputs.size());
        hash_many(inputs, hashes);
        for (size_t i = 0; i < chunks.size(); ++i) {
            if (hashes[i] != chunks[i].id) {
                add_damaged(segment, chunks[i]);
                return fail(ErrorCode::kCorrupt, mismatch(open_file->path(), chunks[i], hashes[i]));
            }
            segment.set_verified(chunks[i].page, chunks[i].pages());
        }
        chunks_verified_.fetch_add(chunks.size(), std::memory_order_relaxed);
        const uint32_t copy_end = std::min(run_end, end);
        scatter(Bytes(buffer).subspan(page_offset(at - run_start), page_offset(copy_end - at)),
                into, page_offset(at - page));
        at = copy_end;
    }
    return {};
}

Result<void> SegmentSet::read_object(Segment& segment, const Entry& entry,
                                     std::vector<std::byte>& content, std::vector<std::byte>& aux) {
    // Enough for the aux bytes of most objects, so that one read gets all.
    constexpr size_t kAuxGuessBytes = 512;
    STELLARIUM_ASSIGN(const auto open_file, file(segment));
    const uint64_t offset = entry.offset_bytes();
    const size_t length = entry.length;
    content.clear();
    aux.clear();
    const auto check = [&](Bytes bytes) -> Result<void> {
        if (const Hash256 found = hash(bytes); found != entry.id) {
            add_damaged(segment, entry);
            return fail(ErrorCode::kCorrupt, mismatch(open_file->path(), entry, found));
        }
        chunks_verified_.fetch_add(1, std::memory_order_relaxed);
        return {};
    };
    if (entry.entry_kind() != EntryKind::kMember) {
        content.resize(length);
        STELLARIUM_TRY(io::read_exact(*open_file, content, offset));
        return check(content);
    }

    // A batch's data ends at a page's end, so reading up to the end of the last page is safe.
    const size_t least = sizeof(PackMember) + length;
    const size_t to_page_end =
        (entry.offset.get() + least + kPageBytes - 1) / kPageBytes * kPageBytes -
        entry.offset.get();
    std::vector<std::byte> stored(std::min(to_page_end, least + kAuxGuessBytes));
    STELLARIUM_TRY(io::read_exact(*open_file, stored, offset));
    STELLARIUM_TRY(check(Bytes(stored).subspan(sizeof(PackMember), length)));
    content.assign(stored.begin() + sizeof(PackMember),
                   stored.begin() + static_cast<std::ptrdiff_t>(least));
    const auto prefix = load<PackMember>(stored);
    const size_t aux_bytes = prefix.aux_bytes;
    if (prefix.content_bytes != length || length + aux_bytes > kMaxObjectBytes) {
        return {};  // The content is good; its prefix is not, so there are no hints.
    }
    if (stored.size() < least + aux_bytes) {
        const size_t have = stored.size();
        stored.resize(least + aux_bytes);
        auto rest = io::read_exact(*open_file, MutableBytes(stored).subspan(have), offset + have);
        if (!rest && rest.error().code() == ErrorCode::kCorrupt) {
            return {};
        }
        STELLARIUM_TRY(std::move(rest));
    }
    const Bytes hints = Bytes(stored).subspan(least, aux_bytes);
    if (static_cast<uint32_t>(checksum64(hints)) == prefix.aux_checksum) {
        aux.assign(hints.begin(), hints.end());
    }
    return {};
}

}  // namespace stellarium::nebula
