#include <algorithm>
#include <cstring>
#include <utility>

#include "base/units.h"
#include "nebula/store_impl.h"

namespace stellarium::nebula {
namespace {

/// However small the index is compared with the log, opening inserts no more than this adds.
constexpr uint64_t kMaxLogBytesBeyondIndex = 16 * kGiB;

}  // namespace

Result<void> StoreImpl::sync(uint64_t sequence) {
    STELLARIUM_TRY(check_usable());
    std::unique_lock lock(state_mutex_);
    if (sequence > sequence_.load()) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("batch {} was never appended: the last one is {}", sequence,
                                sequence_.load()));
    }
    while (durable_sequence_ < sequence) {
        if (!writable_.load()) {
            return fail(ErrorCode::kReadOnly,
                        fmt::format("batch {} cannot be made durable: {}", sequence,
                                    read_only_reason_.value_or("the store is read-only")));
        }
        if (sync_running_) {
            sync_done_.wait(lock);
            continue;
        }
        // This thread syncs for everybody who waits by now.
        sync_running_ = true;
        const uint64_t through = sequence_.load();
        const uint64_t created = segments_created_;
        const bool sync_names = created != segments_created_synced_;
        const std::vector<Unsynced> unsynced = unsynced_;
        lock.unlock();
        Result<void> done;
        for (const Unsynced& segment : unsynced) {
            done = segment.file->datasync();
            if (!done) {
                break;
            }
        }
        if (done && sync_names) {
            done = files_.sync_directory(join_path(directory_, kSegmentsName));
        }
        if (!done) {
            poison(done.error(), "a sync of the log");
        }
        lock.lock();
        sync_running_ = false;
        if (done) {
            durable_sequence_ = through;
            segments_created_synced_ = created;
            std::erase_if(unsynced_, [through](const Unsynced& segment) {
                return segment.last_sequence <= through;
            });
        }
        sync_done_.notify_all();
        if (!done) {
            return std::unexpected(done.error().with_context(
                fmt::format("batch {} cannot be made durable", sequence)));
        }
    }
    return {};
}

/// Footers are derived: on a full disk they wait for the next checkpoint.
Result<void> StoreImpl::sync_footers() {
    std::vector<PendingFooter> footers;
    {
        const std::lock_guard guard(state_mutex_);
        footers = pending_footers_;
    }
    std::vector<uint32_t> done;
    for (const PendingFooter& footer : footers) {
        if (auto written = write_footer(footer); !written) {
            if (written.error().code() == ErrorCode::kNoSpace) {
                continue;
            }
            return written;
        }
        if (auto synced = footer.file->datasync(); !synced) {
            poison(synced.error(), "a sync of the log");
            return synced;
        }
        done.push_back(footer.segment->number());
    }
    const std::lock_guard guard(state_mutex_);
    std::erase_if(pending_footers_, [&done](const PendingFooter& footer) {
        return std::ranges::find(done, footer.segment->number()) != done.end();
    });
    return {};
}

/// Writes the index anew when it is time to, and says so in `slot`.
Result<void> StoreImpl::write_index(SuperblockSlot& slot, bool all_is_recorded,
                                    uint64_t dead_pairs) {
    uint64_t appended = 0;
    uint32_t first_segment_beyond = 0;
    uint64_t last_sequence = 0;
    bool condemned = false;
    {
        const std::lock_guard append_guard(append_mutex_);
        const std::lock_guard guard(state_mutex_);
        appended = counters_.appended_bytes;
        last_sequence = sequence_.load();
        condemned = condemned_chunks_ > 0 || condemning_;
        // The entries of all segments below the active one are in the index by now.
        first_segment_beyond =
            active_.segment != nullptr ? active_.segment->number() : last_segment_ + 1;
    }
    if (condemned && !all_is_recorded) {
        // A crash brings back what is not recorded: an index without it would miss something.
        return {};
    }
    const uint64_t grown = appended - slot.index_appended_bytes;
    const uint64_t enough =
        std::min(kMaxLogBytesBeyondIndex, index_bytes_written_ * options_.index_rewrite_factor);
    const bool much_is_dead = dead_pairs > index_->size() / 4;
    if (!much_is_dead && (grown == 0 || grown < enough)) {
        return {};
    }
    const uint32_t generation = slot.index_generation + 1;
    const std::string path = join_path(directory_, index_file_name(generation));
    uint64_t bytes = 0;
    auto written = with_index([&]() -> Result<void> {
        STELLARIUM_ASSIGN(const auto file, files_.open(path, io::OpenMode::kCreate));
        STELLARIUM_TRY(
            index_->write_checkpoint(*file, {.store_uuid = store_id_, .sequence = last_sequence}));
        STELLARIUM_ASSIGN(bytes, file->size_bytes());
        return files_.sync_directory(directory_);
    });
    if (!written) {
        [[maybe_unused]] const auto best_effort = files_.remove(path);
        // The old index and the footers hold the same: a full disk must not stop checkpoints.
        return written.error().code() == ErrorCode::kNoSpace ? Result<void>() : written;
    }
    slot.index_generation = generation;
    slot.index_segment = first_segment_beyond;
    slot.index_appended_bytes = appended;
    index_bytes_written_ = bytes;
    return {};
}

/// Where the first batch after `sequence` is, or will be, and the counters before it.
void StoreImpl::fill_position(SuperblockSlot& slot, uint64_t sequence) {
    const std::lock_guard append_guard(append_mutex_);
    const std::lock_guard guard(state_mutex_);
    const auto after = std::ranges::find_if(
        batches_, [sequence](const BatchPosition& batch) { return batch.sequence > sequence; });
    if (after != batches_.begin()) {
        slot.sequence = (after - 1)->sequence;
    }
    if (after == batches_.end()) {
        counters_.duplicate_bytes += std::exchange(pending_duplicate_bytes_, 0);
    }
    const Counters& counters = after == batches_.end() ? counters_ : after->before;
    slot.chunks = counters.chunks;
    slot.unique_bytes = counters.unique_bytes;
    slot.stored_bytes = counters.stored_bytes;
    slot.appended_bytes = counters.appended_bytes;
    slot.duplicate_bytes = counters.duplicate_bytes;
    if (after != batches_.end()) {
        slot.log_segment = after->segment;
        slot.log_page = after->page;
    } else if (active_.segment != nullptr) {
        slot.log_segment = active_.segment->number();
        slot.log_page = active_.end_page;
    } else {
        slot.log_segment = last_segment_ + 1;
        slot.log_page = 1;
    }
    slot.durable_sequence = durable_sequence_;
    slot.highest_sequence = highest_sequence_;
    slot.last_segment = last_segment_;
}

/// Writes both copies of the slot's generation over the pair that does not hold the newest one.
Result<void> StoreImpl::write_superblock(const SuperblockSlot& slot) {
    std::vector<std::byte> pair(2 * kPageBytes);
    std::ranges::copy(bytes_of(slot), pair.begin());
    std::ranges::copy(bytes_of(slot), pair.begin() + kPageBytes);
    const uint64_t offset = 2 * (slot.generation % 2) * kPageBytes;
    STELLARIUM_TRY(io::write_all(*superblock_file_, Bytes(pair), offset));
    if (auto synced = superblock_file_->datasync(); !synced) {
        poison(synced.error(), "a sync of the superblock");
        return synced;
    }
    return {};
}

Result<void> StoreImpl::publish(SuperblockSlot& slot, const DeadRecord* record) {
    const SuperblockSlot old = superblock_;
    const bool other_map = old.dead_map_generation != slot.dead_map_generation;
    for (int i = 0; i < (other_map ? 2 : 1); ++i) {
        slot.generation = superblock_.generation + 1;
        seal(slot);
        STELLARIUM_TRY(write_superblock(slot));
        superblock_ = slot;
        if (record != nullptr && i == 0) {
            apply(*record);
        }
    }
    // Left behind, they cost space until the next open.
    if (old.index_generation != 0 && old.index_generation != slot.index_generation) {
        [[maybe_unused]] const auto best_effort =
            files_.remove(join_path(directory_, index_file_name(old.index_generation)));
    }
    if (old.dead_map_generation != 0 && other_map) {
        [[maybe_unused]] const auto best_effort =
            files_.remove(join_path(directory_, dead_map_file_name(old.dead_map_generation)));
    }
    return {};
}

Result<void> StoreImpl::prove_durable() {
    STELLARIUM_TRY(check_writable());
    reserve_.hold();
    const std::lock_guard checkpoint_guard(checkpoint_mutex_);
    SuperblockSlot slot = superblock_;
    {
        const std::lock_guard guard(state_mutex_);
        if (durable_sequence_ <= slot.durable_sequence.get()) {
            return {};
        }
        slot.durable_sequence = durable_sequence_;
        slot.highest_sequence = highest_sequence_;
    }
    return publish(slot, nullptr);
}

Result<void> StoreImpl::checkpoint(uint64_t sequence, Bytes payload) {
    STELLARIUM_TRY(check_writable());
    if (payload.size() > kMaxCheckpointPayload) {
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("a checkpoint payload of {} bytes is longer than {}",
                                payload.size(), kMaxCheckpointPayload));
    }
    const std::lock_guard checkpoint_guard(checkpoint_mutex_);
    if (sequence > this->sequence() || sequence < superblock_.sequence) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("a checkpoint at batch {} is not between the last checkpoint ({}) "
                                "and the last batch ({})",
                                sequence, superblock_.sequence.get(), this->sequence()));
    }
    SuperblockSlot slot = superblock_;
    STELLARIUM_TRY(sync(this->sequence()));
    STELLARIUM_TRY(sync_footers());
    std::optional<DeadRecord> record;
    if (!sweep_running_ && has_unrecorded()) {
        auto written = write_dead_map(slot);
        if (written) {
            record = *std::move(written);
        } else if (written.error().code() != ErrorCode::kNoSpace) {
            return std::unexpected(std::move(written).error());
        }
        // A full disk must not stop checkpoints: a later one will record it.
    }
    STELLARIUM_TRY(write_index(slot, record.has_value(), 0));
    fill_position(slot, sequence);
    if (record) {
        record->take_off(slot);
    }
    slot.payload = {};
    slot.payload_bytes = static_cast<uint32_t>(payload.size());
    if (!payload.empty()) {
        std::memcpy(slot.payload.data(), payload.data(), payload.size());
    }
    STELLARIUM_TRY(publish(slot, record ? &*record : nullptr));
    const std::lock_guard guard(state_mutex_);
    checkpoint_appended_bytes_ = slot.appended_bytes;
    while (!batches_.empty() && batches_.front().sequence <= sequence) {
        batches_.pop_front();
    }
    return {};
}

}  // namespace stellarium::nebula
