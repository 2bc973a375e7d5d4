// Sparse bytes in pages of 4 KiB that are cheap to copy: copies share pages until one is written.
// The storage behind the simulated machine's files; not for use outside src/io.
//
// Thread rule: none for one object; copies that share pages may be used on different threads.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "base/bytes.h"

namespace stellarium::io {

/// A reference-counted value that is copied when a sharer changes it. Not std::shared_ptr, because
/// its use_count() does not order the last reader's accesses before ours.
template <typename T>
class CopyOnWrite {
  public:
    CopyOnWrite() = default;
    CopyOnWrite(const CopyOnWrite& other) : node_(other.node_) {
        if (node_ != nullptr) {
            node_->references.fetch_add(1, std::memory_order_relaxed);
        }
    }
    CopyOnWrite(CopyOnWrite&& other) noexcept : node_(std::exchange(other.node_, nullptr)) {}
    CopyOnWrite& operator=(CopyOnWrite other) noexcept {
        std::swap(node_, other.node_);
        return *this;
    }
    ~CopyOnWrite() { reset(); }

    bool has_value() const { return node_ != nullptr; }
    const T& operator*() const { return node_->value; }
    const T* operator->() const { return &node_->value; }
    bool shares_with(const CopyOnWrite& other) const { return node_ == other.node_; }

    /// A value of our own: made when there is none, copied when it is shared.
    T& mutate() {
        if (node_ == nullptr) {
            node_ = new Node();
        } else if (node_->references.load(std::memory_order_acquire) != 1) {
            *this = CopyOnWrite(new Node(node_->value));
        }
        return node_->value;
    }
    void reset() {
        Node* node = std::exchange(node_, nullptr);
        if (node != nullptr && node->references.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            delete node;
        }
    }

  private:
    struct Node {
        Node() = default;
        explicit Node(const T& from) : value(from) {}
        std::atomic<uint32_t> references{1};
        T value{};
    };
    explicit CopyOnWrite(Node* node) : node_(node) {}

    Node* node_ = nullptr;
};

class SparsePages {
  public:
    static constexpr uint64_t kPageBytes = 4096;
    using Page = std::array<std::byte, kPageBytes>;
    using PageRef = CopyOnWrite<Page>;

    /// Holes read as zeros.
    void read(MutableBytes into, uint64_t offset_bytes) const;
    void write(Bytes from, uint64_t offset_bytes);
    /// The same for bytes that lie in one page; gives that page as it is now.
    PageRef write_in_page(Bytes from, uint64_t offset_bytes);
    void set_page(uint64_t page, PageRef content);
    /// Whole pages become holes, the rest zeros.
    void zero(uint64_t offset_bytes, uint64_t length_bytes);
    void zero_from(uint64_t offset_bytes) { zero(offset_bytes, UINT64_MAX - offset_bytes); }

    /// Gives a hole space of its own; it still reads as zeros and counts as a hole.
    void allocate(uint64_t page);
    bool is_allocated(uint64_t page) const;
    uint64_t allocated_pages() const { return allocated_pages_; }
    /// The allocated pages that lie in the range, even in part; ascending.
    std::vector<uint64_t> allocated_in(uint64_t offset_bytes, uint64_t length_bytes) const;
    /// The first run of written pages at or after the offset, cut at `end_bytes`: (offset, length).
    std::optional<std::pair<uint64_t, uint64_t>> next_data(uint64_t offset_bytes,
                                                           uint64_t end_bytes) const;

  private:
    static constexpr uint64_t kPagesPerLeaf = 512;
    using Leaf = std::array<PageRef, kPagesPerLeaf>;
    using Table = std::vector<std::pair<uint64_t, CopyOnWrite<Leaf>>>;  // Sorted by leaf number.

    const PageRef* find(uint64_t page) const;
    PageRef& slot(uint64_t page);

    CopyOnWrite<Table> table_;
    uint64_t allocated_pages_ = 0;
};

}  // namespace stellarium::io
