#include "nebula/store.h"

#include <cassert>

#include "nebula/store_impl.h"

namespace stellarium::nebula {
namespace {

constexpr size_t kMaxWarnings = 256;

}  // namespace

// ---- WriteBatch -------------------------------------------------------------------------------

size_t WriteBatch::add_chunk(const ChunkId& id, Bytes pages) {
    assert(!pages.empty() && pages.size() % kPageBytes == 0 && pages.size() <= kMaxChunkBytes);
    assert(hash(pages) == id);
    data_bytes_ += pages.size();
    chunks_.push_back({id, pages});
    return chunks_.size() - 1;
}

void WriteBatch::add_object(const ChunkId& id, Bytes content, Bytes aux) {
    assert(content.size() + aux.size() <= kMaxObjectBytes);
    assert(hash(content) == id);
    data_bytes_ += content.size() + aux.size();
    objects_.push_back({id, content, aux});
}

void WriteBatch::add_record(uint16_t kind, Bytes payload) {
    records_.push_back({kind, {payload.begin(), payload.end()}});
}

void WriteBatch::clear() {
    chunks_.clear();
    objects_.clear();
    records_.clear();
    data_bytes_ = 0;
}

Result<void> ReplaySink::records_missing(const std::string& why) {
    return fail(ErrorCode::kCorrupt, why);
}

// ---- State ------------------------------------------------------------------------------------

Result<void> StoreImpl::check_usable() const {
    if (closed_.load()) {
        return fail(ErrorCode::kUnavailable, fmt::format("the store {} was closed", directory_));
    }
    return {};
}

Result<void> StoreImpl::check_writable() const {
    STELLARIUM_TRY(check_usable());
    if (!writable_.load()) {
        return fail(ErrorCode::kReadOnly,
                    fmt::format("the store {} cannot be written: {}", directory_,
                                read_only_reason().value_or("unknown reason")));
    }
    if (!replayed_.load()) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("the store {} must be replayed before it is written", directory_));
    }
    return {};
}

void StoreImpl::set_read_only(std::string reason) {
    const std::lock_guard guard(state_mutex_);
    writable_.store(false);
    if (!read_only_reason_) {
        read_only_reason_ = std::move(reason);
    }
}

void StoreImpl::poison(const Error& error, std::string_view what) {
    // The system may have thrown away pages that it could not write, and read older ones since.
    distrusts_files_.store(true);
    set_read_only(
        fmt::format("{} failed, so what was written since may be lost: {}; open the "
                    "store again to see what the disk holds",
                    what, error.message()));
}

void StoreImpl::warn(std::string sentence) const {
    const std::lock_guard guard(state_mutex_);
    if (warnings_.size() < kMaxWarnings) {
        warnings_.push_back(std::move(sentence));
    }
}

std::optional<std::string> StoreImpl::read_only_reason() const {
    const std::lock_guard guard(state_mutex_);
    return read_only_reason_;
}

std::vector<std::string> StoreImpl::warnings() const {
    for (std::string& sentence : segments_->take_warnings()) {
        warn(std::move(sentence));
    }
    const std::lock_guard guard(state_mutex_);
    return warnings_;
}

StoreStats StoreImpl::stats() const {
    StoreStats stats;
    {
        const std::lock_guard guard(state_mutex_);
        stats.chunks = counters_.chunks - condemned_chunks_;
        stats.unique_bytes = counters_.unique_bytes - condemned_bytes_;
        stats.stored_bytes = counters_.stored_bytes + unfreed_bytes_;
        stats.dead_bytes = reclaimable_bytes_;
        stats.appended_bytes = counters_.appended_bytes;
        stats.duplicate_bytes = counters_.duplicate_bytes + pending_duplicate_bytes_;
        stats.sequence = sequence_.load();
        stats.durable_sequence = durable_sequence_;
    }
    stats.index_bytes = index_->memory_bytes() + index_->mapped_bytes();
    const std::vector<Segment*> segments = segments_->all();
    stats.segments = segments.size();
    stats.last_segment = segments.empty() ? 0 : segments.back()->number();
    stats.index_misses_recovered = index_misses_recovered_.load();
    stats.chunks_verified = segments_->chunks_verified();
    stats.damaged_chunks = segments_->damaged_count();
    stats.records_lost = records_lost_;
    stats.reserve_bytes = reserve_.held_bytes();
    stats.full_appends = full_appends_.load();
    stats.disk_full = disk_full_.load();
    return stats;
}

uint64_t StoreImpl::bytes_since_checkpoint() const {
    const std::lock_guard guard(state_mutex_);
    return counters_.appended_bytes - checkpoint_appended_bytes_;
}

Result<void> StoreImpl::replay(ReplaySink& sink) {
    STELLARIUM_TRY(check_usable());
    assert(!replayed_.load());
    for (const BatchPosition& position : batches_) {
        if (const auto missing = missing_before_.find(position.sequence);
            missing != missing_before_.end()) {
            STELLARIUM_TRY(sink.records_missing(missing->second));
        }
        if (position.records == 0) {
            continue;
        }
        Segment* segment = segments_->find(position.segment);
        STELLARIUM_ASSIGN(const auto file, segments_->file(*segment));
        STELLARIUM_ASSIGN(const auto bytes,
                          read_batch_header(*file, store_id_, position.segment, position.page));
        STELLARIUM_ASSIGN(const BatchView view,
                          decode_batch(bytes, store_id_, position.segment, position.page));
        STELLARIUM_TRY(view.for_each_record([&](uint16_t kind, Bytes payload) {
            return sink.replay(position.sequence, kind, payload);
        }));
    }
    if (const auto missing = missing_before_.find(RecoveredLog::kNoBatch);
        missing != missing_before_.end()) {
        STELLARIUM_TRY(sink.records_missing(missing->second));
    }
    replayed_.store(true);
    return {};
}

Result<void> StoreImpl::close() {
    STELLARIUM_TRY(check_usable());
    Result<void> synced;
    if (writable_.load()) {
        synced = sync(sequence());
        if (synced) {
            synced = prove_durable();
        }
    }
    const std::lock_guard append_guard(append_mutex_);
    closed_.store(true);
    lock_.reset();
    return synced;
}

}  // namespace stellarium::nebula
