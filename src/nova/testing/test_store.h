// A store on the simulated machine for tests of the tree.
//
// Thread rule: as nebula::Store.
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
#include "nova/testing/counting_store.h"
#include "nova/tree.h"

namespace stellarium::nova::testing {

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
