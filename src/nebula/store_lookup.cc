#include <algorithm>
#include <cassert>

#include "nebula/store_impl.h"

namespace stellarium::nebula {

Result<void> StoreImpl::insert_entries(uint32_t segment, std::span<const Entry> entries,
                                       const std::vector<bool>* only_shards) {
    std::vector<ChunkIndex::Entry> pairs;
    pairs.reserve(entries.size());
    for (const Entry& entry : entries) {
        if (entry.entry_kind() == EntryKind::kPack ||
            (only_shards != nullptr && !(*only_shards)[ChunkIndex::shard_of(entry.id)])) {
            continue;
        }
        pairs.push_back({entry.id, PageAddress::make(segment, entry.page.get())});
    }
    return index_->insert_many(pairs);
}

Result<void> StoreImpl::repair_index() {
    const std::lock_guard guard(repair_mutex_);
    while (true) {
        const std::vector<uint32_t> damaged = index_->clear_damaged();
        if (damaged.empty()) {
            return {};
        }
        warn(
            fmt::format("{}: {} damaged shards of the index (the first is {}) are rebuilt from the "
                        "segments",
                        directory_, damaged.size(), damaged.front()));
        std::vector<bool> shards(kIndexShards, false);
        for (const uint32_t shard : damaged) {
            shards[shard] = true;
        }
        for (Segment* segment : segments_->all()) {
            Result<void> inserted;
            STELLARIUM_TRY(segments_->visit_live(*segment, [&](std::span<const Entry> entries) {
                inserted = insert_entries(segment->number(), entries, &shards);
            }));
            STELLARIUM_TRY(std::move(inserted));
        }
    }
}

Result<std::optional<StoreImpl::Found>> StoreImpl::confirm(const ChunkId& id, PageAddress address,
                                                           Want want) {
    Segment* segment = address ? segments_->find(address.segment()) : nullptr;
    if (segment == nullptr) {
        return std::nullopt;
    }
    STELLARIUM_ASSIGN(const auto found, segments_->entry_at(*segment, address.page(), id));
    if (!found || (want == Want::kPages && !found->entry.page_addressable())) {
        return std::nullopt;
    }
    return Found{segment, found->entry, found->ordinal, found->damaged};
}

/// A copy that is known to be damaged is the answer only when there is no other.
Result<std::optional<StoreImpl::Found>> StoreImpl::probe(const ChunkId& id, Want want) {
    std::vector<PageAddress> candidates;
    while (true) {
        const uint64_t epoch = condemn_epoch_.load();
        STELLARIUM_TRY(with_index([&]() -> Result<void> {
            candidates.clear();
            return index_->candidates(id, candidates);
        }));
        std::optional<Found> damaged;
        for (const PageAddress address : candidates) {
            STELLARIUM_ASSIGN(auto found, confirm(id, address, want));
            if (found && !found->damaged) {
                return found;
            }
            if (found) {
                damaged = found;
            }
        }
        // The only candidate may have been condemned in between, and its copy be newer than the
        // list.
        if (condemn_epoch_.load() == epoch) {
            return damaged;
        }
    }
}

Result<StoreImpl::Found> StoreImpl::find(const ChunkId& id, std::optional<PageAddress> hint,
                                         Want want) {
    if (hint) {
        STELLARIUM_ASSIGN(auto found, confirm(id, *hint, want));
        if (found && !found->damaged) {
            return *found;
        }
    }
    STELLARIUM_ASSIGN(auto found, probe(id, want));
    if (!found && !index_audited_.load()) {
        STELLARIUM_TRY(with_index([&] { return audit_index(); }));
        STELLARIUM_ASSIGN(found, probe(id, want));
    }
    if (!found && salvage_ != Salvage::kNone) {
        STELLARIUM_ASSIGN(found, find_in_gaps(id));
    }
    if (found) {
        return *found;
    }
    // A segment whose entries could not all be read may have held it.
    for (Segment* segment : segments_->all()) {
        if (const std::string damage = segments_->metadata_damage(*segment); !damage.empty()) {
            return fail(ErrorCode::kCorrupt,
                        fmt::format("chunk {} is not stored, or was lost in a damaged segment: {}",
                                    id.hex(), damage));
        }
    }
    return fail(ErrorCode::kNotFound, fmt::format("chunk {} is not stored", id.hex()));
}

/// The index should have every entry of every segment. A miss makes us look once, through all of
/// them, and put in what is missing; afterwards a miss is an answer.
Result<void> StoreImpl::audit_index() {
    const std::lock_guard guard(repair_mutex_);
    if (index_audited_.load()) {
        return {};
    }
    uint64_t recovered = 0;
    for (Segment* segment : segments_->all()) {
        Result<void> inserted;
        STELLARIUM_TRY(segments_->visit_live(*segment, [&](std::span<const Entry> entries) {
            for (const Entry& entry : entries) {
                if (entry.entry_kind() == EntryKind::kPack) {
                    continue;
                }
                const auto added = index_->insert(
                    entry.id, PageAddress::make(segment->number(), entry.page.get()));
                if (!added) {
                    inserted = std::unexpected(added.error());
                    return;
                }
                recovered += *added ? 1 : 0;
            }
        }));
        STELLARIUM_TRY(std::move(inserted));
    }
    if (recovered > 0) {
        index_misses_recovered_.fetch_add(recovered);
        warn(fmt::format("{} chunks were missing in the index and were found in the segments",
                         recovered));
    }
    index_audited_.store(true);
    return {};
}

Result<void> StoreImpl::find_stored(std::span<const ChunkId> ids,
                                    const std::function<void(size_t, const Found&)>& found) {
    std::vector<ChunkIndex::Match> matches;
    std::vector<bool> done(ids.size(), false);
    std::vector<SegmentSet::Sought> sought;
    std::vector<std::optional<LocatedEntry>> entries;
    while (true) {
        const uint64_t epoch = condemn_epoch_.load();
        STELLARIUM_TRY(with_index([&]() -> Result<void> {
            matches.clear();
            return index_->find_many(ids, matches);
        }));
        // What one segment may have is confirmed together, in the order of its entries.
        std::ranges::sort(matches, {}, [](const auto& match) { return match.address.value(); });
        for (auto first = matches.begin(); first != matches.end();) {
            const uint32_t number = first->address.segment();
            const auto end = std::find_if(first, matches.end(), [number](const auto& match) {
                return match.address.segment() != number;
            });
            const auto group = std::span(first, end);
            first = end;
            Segment* segment = segments_->find(number);
            if (segment == nullptr) {
                continue;
            }
            sought.clear();
            sought.reserve(group.size());
            for (const ChunkIndex::Match& match : group) {
                sought.push_back({.page = match.address.page(), .id = &ids[match.id_index]});
            }
            entries.assign(group.size(), std::nullopt);
            STELLARIUM_TRY(segments_->entries_at(*segment, sought, entries));
            for (size_t i = 0; i < group.size(); ++i) {
                const size_t which = group[i].id_index;
                const std::optional<LocatedEntry>& entry = entries[i];
                if (entry && !entry->damaged && !done[which]) {
                    done[which] = true;
                    found(which, {segment, entry->entry, entry->ordinal, false});
                }
            }
        }
        // See probe().
        if (condemn_epoch_.load() == epoch) {
            return {};
        }
    }
}

Result<void> StoreImpl::contains(std::span<const ChunkId> ids, std::span<bool> out) {
    assert(ids.size() == out.size());
    STELLARIUM_TRY(check_usable());
    std::ranges::fill(out, false);
    return find_stored(ids, [&](size_t i, const Found&) { out[i] = true; });
}

Result<ChunkLocation> StoreImpl::resolve(const ChunkId& id, std::optional<PageAddress> hint) {
    STELLARIUM_TRY(check_usable());
    STELLARIUM_ASSIGN(const Found found, find(id, hint, Want::kPages));
    return ChunkLocation{found.address(), static_cast<uint8_t>(found.entry.pages())};
}

Result<void> StoreImpl::read(PageAddress address, std::span<const iovec> into, IoMode mode) {
    STELLARIUM_TRY(check_usable());
    const ReaderGate::Pin pin = gate_.enter();
    Segment* segment = segments_->find(address.segment());
    if (segment == nullptr) {
        return fail(ErrorCode::kStale,
                    fmt::format("there is no segment {} (any more): look the chunk up by its id",
                                address.segment()));
    }
    const bool check_again = options_.verify_always || distrusts_files_.load();
    auto done = segments_->read_pages(*segment, address.page(), into,
                                      check_again ? ReadCheck::kAlways : ReadCheck::kFirst, mode);
    if (!done && done.error().code() == ErrorCode::kCorrupt) {
        return healed_or(std::move(done), *segment, address.page(), into);
    }
    return done;
}

/// When the damaged chunks have all been stored again since, the address is stale, no more.
Result<void> StoreImpl::healed_or(Result<void> error, Segment& segment, uint32_t page,
                                  std::span<const iovec> into) {
    size_t bytes = 0;
    for (const iovec& part : into) {
        bytes += part.iov_len;
    }
    const auto damaged =
        segments_->damaged_entries(segment, page, static_cast<uint32_t>(bytes / kPageBytes));
    if (!damaged || damaged->empty()) {
        return error;
    }
    for (const Entry& entry : *damaged) {
        const auto other = probe(entry.id, Want::kPages);
        if (!other || !*other || (*other)->damaged) {
            return error;
        }
    }
    return fail(ErrorCode::kStale, fmt::format("{}; it was stored again: look it up by its id",
                                               error.error().message()));
}

Result<ObjectBytes> StoreImpl::get_object(const ChunkId& id, std::optional<PageAddress> hint) {
    STELLARIUM_TRY(check_usable());
    const ReaderGate::Pin pin = gate_.enter();
    STELLARIUM_ASSIGN(const Found found, find(id, hint, Want::kAny));
    ObjectBytes out;
    STELLARIUM_TRY(segments_->read_object(*found.segment, found.entry, out.content, out.aux));
    return out;
}

std::optional<PageAddress> StoreImpl::object_address(const ChunkId& id) {
    if (!check_usable()) {
        return std::nullopt;
    }
    const auto found = probe(id, Want::kAny);
    return found && *found ? std::optional((*found)->address()) : std::nullopt;
}

void StoreImpl::prefetch(PageAddress address, uint32_t pages) {
    Segment* segment = closed_.load() ? nullptr : segments_->find(address.segment());
    if (segment == nullptr) {
        return;
    }
    if (const auto file = segments_->file(*segment)) {
        (*file)->read_ahead(address.offset_bytes(), uint64_t{pages} * kPageBytes);
    }
}

}  // namespace stellarium::nebula
