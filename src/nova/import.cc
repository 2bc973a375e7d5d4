#include "nova/import.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include <fmt/format.h>

#include "nova/chunk_hashing.h"

namespace stellarium::nova {
namespace {

constexpr size_t kLeavesPerAppend = kCommitBytes / kLeafBytes;

size_t buffer_count(unsigned workers) {
    return 2 * size_t{workers} + 2 * kLeavesPerAppend;
}

}  // namespace

LeafPipeline::LeafPipeline(nebula::Store& store, Options options)
    : store_(store), options_(options), builder_(store) {
    const size_t buffers = options.workers == 0 ? 1 : buffer_count(options.workers);
    for (size_t i = 0; i < buffers; ++i) {
        spare_.push_back(std::make_unique<Leaf>());
    }
    for (unsigned i = 0; i < options.workers; ++i) {
        threads_.emplace_back([this] { run_worker(); });
    }
    if (options.workers > 0) {
        threads_.emplace_back([this] { run_appender(); });
    }
}

LeafPipeline::~LeafPipeline() {
    stop();
}

void LeafPipeline::stop() {
    {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
        changed_.notify_all();
    }
    for (std::thread& thread : threads_) {
        thread.join();
    }
    threads_.clear();
}

void LeafPipeline::set_error(const Error& error) {
    const std::lock_guard lock(mutex_);
    if (!error_) {
        error_ = error;
    }
    changed_.notify_all();
}

/// nullptr: an error stopped the pipeline.
LeafPipeline::LeafPtr LeafPipeline::take_buffer() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !spare_.empty() || error_; });
    if (error_) {
        return nullptr;
    }
    LeafPtr leaf = std::move(spare_.back());
    spare_.pop_back();
    lock.unlock();
    if (!leaf->buffer) {
        leaf->buffer = std::make_unique_for_overwrite<std::byte[]>(kLeafBytes);
    }
    leaf->filled_bytes = 0;
    leaf->hashed = false;
    return leaf;
}

Result<void> LeafPipeline::append(uint64_t offset_bytes, Bytes data) {
    if (offset_bytes < end_bytes_) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("import: offset {} comes after offset {}: offsets must ascend",
                                offset_bytes, end_bytes_));
    }
    if (offset_bytes > kMaxVolumeBytes || data.size() > kMaxVolumeBytes - offset_bytes) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("import: {} bytes at offset {} reach beyond the largest size of "
                                "{} bytes",
                                data.size(), offset_bytes, kMaxVolumeBytes));
    }
    bytes_ += data.size();
    end_bytes_ = offset_bytes + data.size();
    while (!data.empty()) {
        const uint64_t number = offset_bytes / kLeafBytes;
        if (current_ && current_->number != number) {
            STELLARIUM_TRY(submit());
        }
        if (!current_) {
            current_ = take_buffer();
            if (!current_) {
                const std::lock_guard lock(mutex_);
                return std::unexpected(*error_);
            }
            current_->number = number;
        }
        const uint64_t start = offset_bytes % kLeafBytes;
        const size_t step = std::min<uint64_t>(data.size(), kLeafBytes - start);
        std::memset(current_->buffer.get() + current_->filled_bytes, 0,
                    start - current_->filled_bytes);
        std::memcpy(current_->buffer.get() + start, data.data(), step);
        current_->filled_bytes = start + step;
        data = data.subspan(step);
        offset_bytes += step;
    }
    return {};
}

/// Hands the current buffer on.
Result<void> LeafPipeline::submit() {
    const uint64_t padded = (current_->filled_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    std::memset(current_->buffer.get() + current_->filled_bytes, 0,
                padded - current_->filled_bytes);
    current_->filled_bytes = padded;
    if (options_.workers == 0) {
        cut_and_hash(*current_);
        std::vector<LeafPtr> leaves;
        leaves.push_back(std::move(current_));
        auto done = append_leaves(leaves);
        spare_.push_back(std::move(leaves.front()));
        if (!done) {
            set_error(done.error());
        }
        return done;
    }
    const std::lock_guard lock(mutex_);
    if (error_) {
        return std::unexpected(*error_);
    }
    to_hash_.push_back(current_.get());
    in_order_.push_back(std::move(current_));
    changed_.notify_all();
    return {};
}

void LeafPipeline::cut_and_hash(Leaf& leaf) const {
    const Bytes pages(leaf.buffer.get(), leaf.filled_bytes);
    leaf.cuts.clear();
    nebula::cut_block_data(pages, 0, leaf.cuts);
    std::vector<Bytes> chunks;
    chunks.reserve(leaf.cuts.size());
    for (const nebula::Cut& cut : leaf.cuts) {
        chunks.push_back(pages.subspan(cut.first_page * kPageBytes, cut.pages * kPageBytes));
    }
    leaf.ids.resize(chunks.size());
    hash_chunks(chunks, leaf.ids);
}

/// Appends consecutive leaves as one batch and adds them to the tree.
Result<void> LeafPipeline::append_leaves(std::vector<LeafPtr>& leaves) {
    nebula::WriteBatch batch;
    uint64_t data_bytes = 0;
    for (const LeafPtr& leaf : leaves) {
        uint64_t mapped_bytes = 0;
        for (size_t i = 0; i < leaf->cuts.size(); ++i) {
            const Bytes pages(leaf->buffer.get() + leaf->cuts[i].first_page * kPageBytes,
                              leaf->cuts[i].pages * kPageBytes);
            batch.add_chunk(leaf->ids[i], pages);
            mapped_bytes += pages.size();
        }
        zero_bytes_ += leaf->filled_bytes - mapped_bytes;
        data_bytes += mapped_bytes;
    }
    if (data_bytes == 0) {
        return {};
    }
    STELLARIUM_ASSIGN(const nebula::Appended appended, store_.append(batch));
    size_t ordinal = 0;
    for (const LeafPtr& leaf : leaves) {
        Extents extents;
        for (size_t i = 0; i < leaf->cuts.size(); ++i) {
            append_merged(extents, {.first_page = static_cast<uint16_t>(leaf->cuts[i].first_page),
                                    .pages = static_cast<uint16_t>(leaf->cuts[i].pages),
                                    .first_in_chunk = 0,
                                    .hole = false,
                                    .id = leaf->ids[i],
                                    .chunk_address = appended.locations[ordinal++].address});
        }
        STELLARIUM_TRY(builder_.add_leaf(leaf->number, extents));
    }
    new_bytes_ += appended.new_bytes;
    duplicate_bytes_ += appended.duplicate_bytes;
    data_bytes_ += data_bytes;
    return {};
}

void LeafPipeline::run_worker() {
    std::unique_lock lock(mutex_);
    while (true) {
        changed_.wait(lock, [this] { return !to_hash_.empty() || stopping_ || error_; });
        if (stopping_ || error_) {
            return;
        }
        Leaf* leaf = to_hash_.front();
        to_hash_.pop_front();
        lock.unlock();
        cut_and_hash(*leaf);
        lock.lock();
        leaf->hashed = true;
        changed_.notify_all();
    }
}

void LeafPipeline::run_appender() {
    std::unique_lock lock(mutex_);
    while (true) {
        changed_.wait(lock, [this] {
            return (!in_order_.empty() && in_order_.front()->hashed) || stopping_ || error_;
        });
        if (stopping_ || error_) {
            return;
        }
        std::vector<LeafPtr> leaves;
        while (!in_order_.empty() && in_order_.front()->hashed &&
               leaves.size() < kLeavesPerAppend) {
            leaves.push_back(std::move(in_order_.front()));
            in_order_.pop_front();
        }
        appending_ = true;
        lock.unlock();
        const auto done = append_leaves(leaves);
        lock.lock();
        appending_ = false;
        if (!done && !error_) {
            error_ = done.error();
        }
        std::move(leaves.begin(), leaves.end(), std::back_inserter(spare_));
        changed_.notify_all();
    }
}

Result<ImportedTree> LeafPipeline::finish() {
    if (current_) {
        STELLARIUM_TRY(submit());
    }
    {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return (in_order_.empty() && !appending_) || error_; });
        if (error_) {
            return std::unexpected(*error_);
        }
    }
    stop();
    ImportedTree tree{.root = {}, .end_bytes = end_bytes_, .data_bytes = data_bytes_};
    STELLARIUM_ASSIGN(tree.root, builder_.finish());
    return tree;
}

ImageImport::Progress LeafPipeline::progress() const {
    return {.bytes = bytes_,
            .new_bytes = new_bytes_,
            .duplicate_bytes = duplicate_bytes_,
            .zero_bytes = zero_bytes_};
}

}  // namespace stellarium::nova
