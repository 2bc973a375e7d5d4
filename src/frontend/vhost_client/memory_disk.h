// A disk in memory, or in a mapped file, that can be told to misbehave: for tests of the frontend.
//
// Thread rule: that of BlockDevice; the switches may be turned from any thread at any time.
//
//     auto disk = MemoryDisk::create(64 * kMiB);
//     disk->hold();      // Requests that may wait now wait, flushes are not answered.
//     disk->release();
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/block_device.h"
#include "base/bytes.h"

namespace stellarium::vhost {

class MemoryDisk : public BlockDevice {
  public:
    /// Zeros, in memory.
    static Result<std::shared_ptr<MemoryDisk>> create(uint64_t size_bytes);
    /// The content of a file, mapped shared: writes survive the death of this process.
    static Result<std::shared_ptr<MemoryDisk>> open(const std::string& path);
    ~MemoryDisk() override;

    uint64_t size_bytes() const override { return size_bytes_.load(); }
    bool read_only() const override { return read_only_; }
    std::string serial() const override { return serial_; }
    Result<void> read(uint64_t offset_bytes, std::span<const iovec> into, IoMode mode) override;
    Result<void> write(uint64_t offset_bytes, std::span<const iovec> from, IoMode mode) override;
    Result<void> discard(uint64_t offset_bytes, uint64_t length_bytes, IoMode mode) override;
    Result<void> write_zeroes(uint64_t offset_bytes, uint64_t length_bytes, IoMode mode) override;
    void flush_async(std::function<void(Result<void>)> done) override;
    void set_resize_listener(std::function<void(uint64_t new_size_bytes)> listener) override;

    // ---- Before it is attached -----------------------------------------------------------------
    void set_read_only(bool read_only) { read_only_ = read_only; }
    void set_serial(std::string serial) { serial_ = std::move(serial); }

    // ---- Switches ------------------------------------------------------------------------------
    /// kNoWait calls answer kWouldBlock.
    void set_would_block(bool on) { would_block_ = on; }
    /// Every call fails with this; nullptr: no more.
    void set_failure(std::shared_ptr<const Error> failure);
    /// From now on calls that may wait do so, kNoWait calls answer kWouldBlock, and flushes are
    /// not answered, until release().
    void hold();
    void release();
    /// Calls and flushes that wait because of hold().
    size_t held() const;
    /// Blocks until held() is at least `count`.
    void wait_until_held(size_t count);
    /// Within the capacity it was made with.
    void resize(uint64_t size_bytes);

    /// The content now, read under the locks that writes take.
    std::vector<std::byte> content(uint64_t offset_bytes, uint64_t length_bytes);
    void fill(std::byte value);
    uint64_t flushes() const { return flushes_.load(); }
    uint64_t writes() const { return writes_.load(); }

  private:
    MemoryDisk() = default;
    Result<void> admit(uint64_t offset_bytes, uint64_t length_bytes, IoMode mode);
    Result<void> zero(uint64_t offset_bytes, uint64_t length_bytes, IoMode mode);
    /// Runs `part(disk pointer, length)` page by page under that page's lock.
    template <typename Part>
    void each_page(uint64_t offset_bytes, uint64_t length_bytes, Part part);

    std::byte* data_ = nullptr;
    uint64_t capacity_bytes_ = 0;
    std::atomic<uint64_t> size_bytes_{0};
    bool read_only_ = false;
    std::string serial_ = "memory-disk";
    std::array<std::mutex, 64> page_locks_;
    std::atomic<bool> would_block_{false};
    std::atomic<uint64_t> flushes_{0};
    std::atomic<uint64_t> writes_{0};

    mutable std::mutex mutex_;  ///< Guards the rest.
    mutable std::condition_variable changed_;
    std::shared_ptr<const Error> failure_;
    bool holding_ = false;
    size_t waiting_ = 0;
    std::vector<std::function<void(Result<void>)>> held_flushes_;
    std::function<void(uint64_t)> resize_listener_;
};

}  // namespace stellarium::vhost
