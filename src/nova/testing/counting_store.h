// A store for tests that counts and can fail what is asked of it, and passes it on.
//
// Thread rule: as nebula::Store; fail_* and the counters may be used from any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "nebula/store.h"

namespace stellarium::nova::testing {

/// Passes everything on; counts; refuses reads and appends on request.
class CountingStore : public nebula::Store {
  public:
    explicit CountingStore(std::unique_ptr<nebula::Store> store) : store_(std::move(store)) {}

    std::atomic<uint64_t> objects_read{0};
    std::atomic<uint64_t> chunks_resolved{0};
    std::atomic<uint64_t> chunk_reads{0};
    std::atomic<uint64_t> appends{0};
    std::atomic<bool> fail_reads{false};
    std::atomic<bool> fail_appends{false};

    Bytes checkpoint_payload() const override { return store_->checkpoint_payload(); }
    Result<void> replay(nebula::ReplaySink& sink) override { return store_->replay(sink); }
    Result<nebula::Appended> append(nebula::WriteBatch& batch) override {
        if (fail_appends) {
            return fail(ErrorCode::kIo, "append refused by the test");
        }
        ++appends;
        return store_->append(batch);
    }
    Result<void> sync(uint64_t sequence) override { return store_->sync(sequence); }
    uint64_t sequence() const override { return store_->sequence(); }
    Result<void> contains(std::span<const ChunkId> ids, std::span<bool> out) override {
        return store_->contains(ids, out);
    }
    Result<nebula::ChunkLocation> resolve(const ChunkId& id,
                                          std::optional<nebula::PageAddress> hint) override {
        ++chunks_resolved;
        return store_->resolve(id, hint);
    }
    Result<void> read(nebula::PageAddress address, std::span<const iovec> into,
                      IoMode mode) override {
        ++chunk_reads;
        return store_->read(address, into, mode);
    }
    Result<nebula::ObjectBytes> get_object(const ChunkId& id,
                                           std::optional<nebula::PageAddress> hint) override {
        if (fail_reads) {
            return fail(ErrorCode::kIo, "read refused by the test");
        }
        ++objects_read;
        return store_->get_object(id, hint);
    }
    std::optional<nebula::PageAddress> object_address(const ChunkId& id) override {
        return store_->object_address(id);
    }
    Result<std::shared_ptr<io::File>> lease_segment(uint32_t segment) override {
        return store_->lease_segment(segment);
    }
    void prefetch(nebula::PageAddress address, uint32_t pages) override {
        store_->prefetch(address, pages);
    }
    Result<void> checkpoint(uint64_t sequence, Bytes payload) override {
        return store_->checkpoint(sequence, payload);
    }
    uint64_t bytes_since_checkpoint() const override { return store_->bytes_since_checkpoint(); }
    Result<void> prove_durable() override { return store_->prove_durable(); }
    Result<std::unique_ptr<nebula::Collection>> begin_collection() override {
        return store_->begin_collection();
    }
    std::unique_ptr<nebula::Store> protect() override { return store_->protect(); }
    Result<nebula::ScrubStep> scrub(
        nebula::PageAddress from, uint64_t budget_bytes,
        const std::function<void(const nebula::DamagedChunk&)>& report) override {
        return store_->scrub(from, budget_bytes, report);
    }
    Result<std::vector<nebula::DamagedChunk>> damaged() override { return store_->damaged(); }
    nebula::StoreStats stats() const override { return store_->stats(); }
    const std::string& directory() const override { return store_->directory(); }
    std::array<uint8_t, 16> uuid() const override { return store_->uuid(); }
    std::optional<std::string> read_only_reason() const override {
        return store_->read_only_reason();
    }
    std::vector<std::string> warnings() const override { return store_->warnings(); }
    Result<void> close() override { return store_->close(); }

  private:
    std::unique_ptr<nebula::Store> store_;
};

}  // namespace stellarium::nova::testing
