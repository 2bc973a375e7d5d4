#include <algorithm>
#include <utility>

#include "nebula/store_impl.h"

namespace stellarium::nebula {
namespace {

/// Entries that are collected before the segment's lock is let go.
constexpr size_t kEntriesAtOnce = 1024;

/// Entries that share pages: a chunk or object, or the live members of a pack.
struct ScrubUnit {
    uint32_t page = 0;
    size_t first = 0;  ///< In the list of entries.
};

PageAddress address_of(const Segment& segment, const Entry& entry) {
    return PageAddress::make(segment.number(), entry.page.get());
}

}  // namespace

/// There is another copy that is not known to be damaged.
Result<bool> StoreImpl::is_stored_whole(const Entry& entry) {
    const auto want = entry.entry_kind() == EntryKind::kChunk ? Want::kPages : Want::kAny;
    STELLARIUM_ASSIGN(const auto other, probe(entry.id, want));
    return other && !other->damaged;
}

Result<void> StoreImpl::scrub_unit(Segment& segment, std::span<const Entry> entries,
                                   ScrubStep& step,
                                   const std::function<void(const DamagedChunk&)>& report) {
    const ReaderGate::Pin pin = gate_.enter();
    uint64_t start = UINT64_MAX;
    uint64_t end = 0;
    std::vector<Entry> alive;
    for (const Entry& entry : entries) {
        // A collection may have condemned it since it was listed.
        STELLARIUM_ASSIGN(const auto found, segments_->entry_at(segment, entry.page, entry.id));
        if (found) {
            start = std::min(start, uint64_t{entry.page} * kPageBytes);
            end = std::max(end, uint64_t{entry.page.get() + entry.pages()} * kPageBytes);
            alive.push_back(entry);
        }
    }
    if (alive.empty()) {
        return {};
    }
    STELLARIUM_ASSIGN(const auto file, segments_->file(segment));
    std::vector<std::byte> bytes(end - start);
    const iovec into{bytes.data(), bytes.size()};
    // What was cached stays so afterwards, and what was not does not push out what is.
    const bool was_cached =
        read_exact_into(*file, std::span(&into, 1), start, IoMode::kNoWait).has_value();
    file->drop_cache(start, bytes.size());
    const auto read = io::read_exact(*file, bytes, start);
    if (!was_cached) {
        file->drop_cache(start, bytes.size());
    }
    step.bytes += bytes.size();
    for (const Entry& entry : alive) {
        ++step.entries;
        const size_t prefix =
            entry.entry_kind() == EntryKind::kMember ? sizeof(PackMember) : size_t{0};
        std::string wrong;
        if (!read) {
            wrong = read.error().message();
        } else if (const Hash256 found = hash(Bytes(bytes).subspan(
                       entry.offset_bytes() + prefix - start, entry.length.get()));
                   found != entry.id) {
            wrong = fmt::format("its bytes hash to {}", found.hex());
        }
        if (!wrong.empty()) {
            segments_->add_damaged(segment, entry);
            STELLARIUM_ASSIGN(const bool elsewhere, is_stored_whole(entry));
            if (elsewhere) {
                continue;
            }
            ++step.damaged;
            report({.id = entry.id,
                    .address = address_of(segment, entry),
                    .file = file->path(),
                    .offset_bytes = entry.offset_bytes(),
                    .reason = fmt::format("{} at offset {}: {} {} of {} bytes is damaged: {}",
                                          file->path(), entry.offset_bytes(),
                                          to_string(entry.entry_kind()), entry.id.hex(),
                                          entry.length.get(), wrong)});
        }
    }
    return {};
}

Result<ScrubStep> StoreImpl::scrub(PageAddress from, uint64_t budget_bytes,
                                   const std::function<void(const DamagedChunk&)>& report) {
    STELLARIUM_TRY(check_usable());
    ScrubStep step{.next = from};
    const std::vector<Segment*> segments = segments_->all();
    auto at = std::ranges::lower_bound(segments, from.segment(), {}, &Segment::number);
    while (at != segments.end()) {
        Segment& segment = **at;
        // Live entries from here on, ending with a whole unit: a pack's members are read together.
        const uint32_t first_page = step.next.segment() == segment.number() ? step.next.page() : 0;
        std::vector<Entry> entries;
        std::vector<ScrubUnit> units;
        bool more = false;
        STELLARIUM_TRY(
            segments_->visit_each(segment, 0, [&](uint32_t, const Entry& entry, bool is_dead) {
                const bool is_member = entry.entry_kind() == EntryKind::kMember;
                if (!is_member && entries.size() >= kEntriesAtOnce) {
                    more = true;
                    return false;
                }
                // A member belongs to where its pack begins.
                if (!is_member && entry.page.get() >= first_page) {
                    units.push_back({.page = entry.page, .first = entries.size()});
                }
                if (!units.empty() && !is_dead && entry.entry_kind() != EntryKind::kPack) {
                    entries.push_back(entry);
                }
                return true;
            }));
        for (size_t i = 0; i < units.size(); ++i) {
            const size_t end = i + 1 < units.size() ? units[i + 1].first : entries.size();
            const auto unit = std::span(entries).subspan(units[i].first, end - units[i].first);
            if (unit.empty()) {
                continue;
            }
            if (step.bytes > 0 && step.bytes >= budget_bytes) {
                step.next = PageAddress::make(segment.number(), units[i].page);
                return step;
            }
            STELLARIUM_TRY(scrub_unit(segment, unit, step, report));
        }
        if (more) {
            step.next = PageAddress::make(segment.number(), entries.back().page.get() + 1U);
        } else {
            ++at;
        }
    }
    step.next = {};
    return step;
}

Result<std::vector<DamagedChunk>> StoreImpl::damaged() {
    STELLARIUM_TRY(check_usable());
    std::vector<DamagedChunk> out;
    for (Segment* segment : segments_->all()) {
        STELLARIUM_ASSIGN(const auto entries,
                          segments_->damaged_entries(*segment, 0, kSegmentPages));
        for (const Entry& entry : entries) {
            STELLARIUM_ASSIGN(const bool elsewhere, is_stored_whole(entry));
            if (!elsewhere) {
                out.push_back(
                    {.id = entry.id,
                     .address = address_of(*segment, entry),
                     .file = segments_->path(segment->number()),
                     .offset_bytes = entry.offset_bytes(),
                     .reason = fmt::format("{} at offset {}: {} {} of {} bytes is "
                                           "damaged",
                                           segments_->path(segment->number()), entry.offset_bytes(),
                                           to_string(entry.entry_kind()), entry.id.hex(),
                                           entry.length.get())});
            }
        }
    }
    return out;
}

}  // namespace stellarium::nebula
