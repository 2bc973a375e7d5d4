#include "nova/import.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include <fmt/format.h>

#include "base/units.h"
#include "nova/chunk_hashing.h"

namespace stellarium::nova {
namespace {

constexpr uint64_t kPieceBytes = 2 * kMiB;
constexpr size_t kPiecesPerAppend = kCommitBytes / kPieceBytes;
static_assert(kPieceBytes >= 2 * nebula::kMaxChunkBytes, "a piece has room for what is carried");

size_t buffer_count(unsigned workers) {
    return 2 * size_t{workers} + 2 * kPiecesPerAppend;
}

}  // namespace

ImportPipeline::ImportPipeline(nebula::Store& store, Options options)
    : store_(store), options_(options), builder_(store) {
    const size_t buffers = options.workers == 0 ? 2 : buffer_count(options.workers);
    for (size_t i = 0; i < buffers; ++i) {
        spare_.push_back(std::make_unique<Piece>());
    }
    for (unsigned i = 0; i < options.workers; ++i) {
        threads_.emplace_back([this] { run_worker(); });
    }
    if (options.workers > 0) {
        threads_.emplace_back([this] { run_appender(); });
    }
}

ImportPipeline::~ImportPipeline() {
    stop();
}

void ImportPipeline::stop() {
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

void ImportPipeline::set_error(const Error& error) {
    const std::lock_guard lock(mutex_);
    if (!error_) {
        error_ = error;
    }
    changed_.notify_all();
}

/// A free piece that starts at `page`.
Result<ImportPipeline::PiecePtr> ImportPipeline::start_piece(uint64_t page) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !spare_.empty() || error_; });
    if (error_) {
        return std::unexpected(*error_);
    }
    PiecePtr piece = std::move(spare_.back());
    spare_.pop_back();
    lock.unlock();
    if (!piece->buffer) {
        piece->buffer = std::make_unique_for_overwrite<std::byte[]>(kPieceBytes);
    }
    piece->first_page = page;
    piece->filled_bytes = 0;
    piece->hashed = false;
    return piece;
}

Result<void> ImportPipeline::append(uint64_t offset_bytes, Bytes data) {
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
        const uint64_t page = offset_bytes / kPageBytes;
        if (current_) {
            const uint64_t end_page =
                current_->first_page + (current_->filled_bytes + kPageBytes - 1) / kPageBytes;
            if (page > end_page) {
                STELLARIUM_TRY(submit(/*next_page_follows=*/false));
            } else if (offset_bytes >= current_->start_bytes() + kPieceBytes) {
                STELLARIUM_TRY(submit(/*next_page_follows=*/true));
            }
        }
        if (!current_) {
            STELLARIUM_ASSIGN(current_, start_piece(page));
        }
        const uint64_t start = offset_bytes - current_->start_bytes();
        const size_t step = std::min<uint64_t>(data.size(), kPieceBytes - start);
        std::memset(current_->buffer.get() + current_->filled_bytes, 0,
                    start - current_->filled_bytes);
        std::memcpy(current_->buffer.get() + start, data.data(), step);
        current_->filled_bytes = start + step;
        data = data.subspan(step);
        offset_bytes += step;
    }
    return {};
}

/// Cuts the current piece and hands it on. With `next_page_follows`, a new current piece begins
/// with the pages that the next one may still join.
Result<void> ImportPipeline::submit(bool next_page_follows) {
    PiecePtr piece = std::move(current_);
    const uint64_t padded = (piece->filled_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    std::memset(piece->buffer.get() + piece->filled_bytes, 0, padded - piece->filled_bytes);
    const Bytes pages(piece->buffer.get(), padded);
    piece->cuts.clear();
    nebula::cut_block_data(pages, piece->first_page, piece->cuts);
    const uint32_t open =
        next_page_follows ? nebula::open_pages(pages, piece->first_page, piece->cuts) : 0;
    piece->filled_bytes = padded - open * kPageBytes;
    if (open > 0) {
        piece->cuts.pop_back();
        STELLARIUM_ASSIGN(PiecePtr next,
                          start_piece(piece->first_page + piece->filled_bytes / kPageBytes));
        next->filled_bytes = open * kPageBytes;
        std::memcpy(next->buffer.get(), pages.data() + piece->filled_bytes, next->filled_bytes);
        current_ = std::move(next);
    }
    return hand_on(std::move(piece));
}

Result<void> ImportPipeline::hand_on(PiecePtr piece) {
    if (options_.workers == 0) {
        hash(*piece);
        std::vector<PiecePtr> pieces;
        pieces.push_back(std::move(piece));
        auto done = append_pieces(pieces);
        spare_.push_back(std::move(pieces.front()));
        if (!done) {
            set_error(done.error());
        }
        return done;
    }
    const std::lock_guard lock(mutex_);
    if (error_) {
        return std::unexpected(*error_);
    }
    to_hash_.push_back(piece.get());
    in_order_.push_back(std::move(piece));
    changed_.notify_all();
    return {};
}

void ImportPipeline::hash(Piece& piece) {
    std::vector<Bytes> chunks;
    chunks.reserve(piece.cuts.size());
    for (const nebula::Cut& cut : piece.cuts) {
        chunks.push_back(piece.pages_of(cut));
    }
    piece.ids.resize(chunks.size());
    hash_chunks(chunks, piece.ids);
}

/// Leaves come in order; one is complete when the next one begins.
Result<void> ImportPipeline::add_extent(uint64_t leaf, const Extent& extent) {
    if (leaf != leaf_) {
        STELLARIUM_TRY(builder_.add_leaf(leaf_, leaf_extents_));
        leaf_extents_.clear();
        leaf_ = leaf;
    }
    append_merged(leaf_extents_, extent);
    return {};
}

/// Appends the chunks of consecutive pieces as one batch and adds them to the tree.
Result<void> ImportPipeline::append_pieces(std::vector<PiecePtr>& pieces) {
    nebula::WriteBatch batch;
    uint64_t data_bytes = 0;
    for (const PiecePtr& piece : pieces) {
        uint64_t mapped_bytes = 0;
        for (size_t i = 0; i < piece->cuts.size(); ++i) {
            const Bytes pages = piece->pages_of(piece->cuts[i]);
            batch.add_chunk(piece->ids[i], pages);
            mapped_bytes += pages.size();
        }
        zero_bytes_ += piece->filled_bytes - mapped_bytes;
        data_bytes += mapped_bytes;
    }
    if (data_bytes == 0) {
        return {};
    }
    STELLARIUM_ASSIGN(const nebula::Appended appended, store_.append(batch));
    size_t ordinal = 0;
    for (const PiecePtr& piece : pieces) {
        for (size_t i = 0; i < piece->cuts.size(); ++i) {
            const nebula::PageAddress address = appended.locations[ordinal++].address;
            Result<void> added;
            nebula::split_at_leaves(piece->cuts[i], [&](const nebula::LeafPart& part) {
                if (!added) {
                    return;
                }
                added = add_extent(
                    part.first_page / kPagesPerLeaf,
                    {.first_page = static_cast<uint16_t>(part.first_page % kPagesPerLeaf),
                     .pages = static_cast<uint16_t>(part.pages),
                     .first_in_chunk = static_cast<uint8_t>(part.first_page_in_chunk),
                     .hole = false,
                     .id = piece->ids[i],
                     .chunk_address = address});
            });
            STELLARIUM_TRY(std::move(added));
        }
    }
    new_bytes_ += appended.new_bytes;
    duplicate_bytes_ += appended.duplicate_bytes;
    data_bytes_ += data_bytes;
    return {};
}

void ImportPipeline::run_worker() {
    std::unique_lock lock(mutex_);
    while (true) {
        changed_.wait(lock, [this] { return !to_hash_.empty() || stopping_ || error_; });
        if (stopping_ || error_) {
            return;
        }
        Piece* piece = to_hash_.front();
        to_hash_.pop_front();
        lock.unlock();
        hash(*piece);
        lock.lock();
        piece->hashed = true;
        changed_.notify_all();
    }
}

void ImportPipeline::run_appender() {
    std::unique_lock lock(mutex_);
    while (true) {
        changed_.wait(lock, [this] {
            return (!in_order_.empty() && in_order_.front()->hashed) || stopping_ || error_;
        });
        if (stopping_ || error_) {
            return;
        }
        std::vector<PiecePtr> pieces;
        while (!in_order_.empty() && in_order_.front()->hashed &&
               pieces.size() < kPiecesPerAppend) {
            pieces.push_back(std::move(in_order_.front()));
            in_order_.pop_front();
        }
        appending_ = true;
        lock.unlock();
        const auto done = append_pieces(pieces);
        lock.lock();
        appending_ = false;
        if (!done && !error_) {
            error_ = done.error();
        }
        std::move(pieces.begin(), pieces.end(), std::back_inserter(spare_));
        changed_.notify_all();
    }
}

Result<ImportedTree> ImportPipeline::finish() {
    if (current_) {
        STELLARIUM_TRY(submit(/*next_page_follows=*/false));
    }
    {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return (in_order_.empty() && !appending_) || error_; });
        if (error_) {
            return std::unexpected(*error_);
        }
    }
    stop();
    STELLARIUM_TRY(builder_.add_leaf(leaf_, leaf_extents_));
    ImportedTree tree{.root = {}, .end_bytes = end_bytes_, .data_bytes = data_bytes_};
    STELLARIUM_ASSIGN(tree.root, builder_.finish());
    return tree;
}

ImageImport::Progress ImportPipeline::progress() const {
    return {.bytes = bytes_,
            .new_bytes = new_bytes_,
            .duplicate_bytes = duplicate_bytes_,
            .zero_bytes = zero_bytes_};
}

}  // namespace stellarium::nova
