// A store on the simulated machine for tests of the tree, that counts and can fail what the tree
// asks of it.
//
// Thread rule: as nebula::Store; fail_* and the counters may be used from any thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "io/simulated.h"
#include "nebula/store.h"
#include "nova/tree.h"

namespace stellarium::nova::testing {

/// Passes everything on; counts; refuses reads and appends on request.
class CountingStore final : public nebula::Store {
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
                      bool no_wait) override {
        ++chunk_reads;
        return store_->read(address, into, no_wait);
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
    void prefetch(nebula::PageAddress address, uint32_t pages) override {
        store_->prefetch(address, pages);
    }
    Result<void> checkpoint(uint64_t sequence, Bytes payload) override {
        return store_->checkpoint(sequence, payload);
    }
    uint64_t bytes_since_checkpoint() const override { return store_->bytes_since_checkpoint(); }
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

/// The value, or an abort that shows the error: for steps of a test that must not fail.
template <typename T>
T must(Result<T> result) {
    if (!result) {
        ADD_FAILURE() << result.error().message();
        std::abort();
    }
    if constexpr (!std::is_void_v<T>) {
        return *std::move(result);
    }
}

/// A fresh store on a fresh simulated machine.
class TestStore {
  public:
    explicit TestStore(uint64_t seed = 1) : machine_(seed) {
        must(nebula::Store::create(machine_.env(), kDirectory, {}));
        open();
    }
    /// A new handle on the same store, as after a restart.
    void reopen() {
        must(store_->close());
        open();
    }
    CountingStore& store() { return *store_; }

    /// Stores a chunk of `pages` pages whose content depends on `tag` and each page's number alone.
    Extent add_chunk(uint64_t tag, uint32_t pages) { return add_chunk(chunk_content(tag, pages)); }
    Extent add_chunk(const std::vector<std::byte>& content) {
        nebula::WriteBatch batch;
        Extent whole;
        whole.id = hash(content);
        whole.pages = static_cast<uint16_t>(content.size() / nebula::kPageBytes);
        batch.add_chunk(whole.id, content);
        whole.chunk_address = must(store_->append(batch)).locations.at(0).address;
        return whole;
    }
    static std::vector<std::byte> chunk_content(uint64_t tag, uint32_t pages) {
        std::vector<std::byte> content(pages * nebula::kPageBytes);
        for (uint32_t page = 0; page < pages; ++page) {
            const std::string text = fmt::format("chunk {} page {}", tag, page);
            const Bytes bytes = bytes_of(std::string_view(text));
            std::copy(bytes.begin(), bytes.end(),
                      content.begin() + static_cast<std::ptrdiff_t>(page * nebula::kPageBytes));
        }
        return content;
    }

  private:
    static constexpr const char* kDirectory = "/pool";
    class NoRecords final : public nebula::ReplaySink {
      public:
        Result<void> replay(uint64_t, uint16_t, Bytes) override { return {}; }
    };
    void open() {
        store_ = std::make_unique<CountingStore>(
            must(nebula::Store::open(machine_.env(), kDirectory, {})));
        NoRecords sink;
        must(store_->replay(sink));
    }

    io::SimulatedMachine machine_;
    std::unique_ptr<CountingStore> store_;
};

/// `whole` (from add_chunk) placed at page `first_page` of a leaf.
inline Extent placed(Extent whole, uint32_t first_page) {
    whole.first_page = static_cast<uint16_t>(first_page);
    return whole;
}

inline Extent hole(uint32_t first_page, uint32_t pages) {
    Extent extent;
    extent.first_page = static_cast<uint16_t>(first_page);
    extent.pages = static_cast<uint16_t>(pages);
    extent.hole = true;
    return extent;
}

}  // namespace stellarium::nova::testing
