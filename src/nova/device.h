// A volume, image or snapshot as a BlockDevice, open for one frontend.
//
// Thread rule and durability: base/block_device.h.
// Ownership: the owner (the pool) outlives its devices and is told when one goes.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "base/block_device.h"
#include "nova/committer.h"
#include "nova/volume.h"

namespace stellarium::nova {

class Device;

class DeviceOwner {
  public:
    virtual ~DeviceOwner() = default;
    /// Flushes and forgets a device that is being destroyed.
    virtual void close_device(const std::shared_ptr<Volume>& volume, const Device& device) = 0;
    virtual void flush_device(const std::shared_ptr<Volume>& volume,
                              std::function<void(Result<void>)> done) = 0;

    /// Reads of guests that wait for the disk now, over all devices.
    uint32_t waiting_reads() const { return waiting_reads_.load(std::memory_order_relaxed); }

  private:
    friend class Device;
    std::atomic<uint32_t> waiting_reads_{0};
};

class Device final : public BlockDevice {
  public:
    Device(DeviceOwner& owner, std::shared_ptr<Volume> volume, bool read_only, std::string label,
           std::string serial)
        : owner_(owner),
          volume_(std::move(volume)),
          read_only_(read_only),
          label_(std::move(label)),
          serial_(std::move(serial)) {}
    ~Device() override { owner_.close_device(volume_, *this); }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    uint64_t size_bytes() const override { return volume_->size_bytes(); }
    bool read_only() const override { return read_only_; }
    std::string serial() const override { return serial_; }
    const std::string& label() const { return label_; }
    const std::shared_ptr<Volume>& volume() const { return volume_; }

    Result<void> read(uint64_t offset_bytes, std::span<const iovec> into, IoMode mode) override {
        // A read that is tried again, and waits this time, is told twice.
        volume_->tell_observer(offset_bytes, into);
        if (mode == IoMode::kNoWait) {
            return volume_->read(offset_bytes, into, mode);
        }
        owner_.waiting_reads_.fetch_add(1, std::memory_order_relaxed);
        auto done = volume_->read(offset_bytes, into, mode);
        owner_.waiting_reads_.fetch_sub(1, std::memory_order_relaxed);
        return done;
    }
    Result<void> write(uint64_t offset_bytes, std::span<const iovec> from, IoMode mode) override {
        STELLARIUM_TRY(check_writable());
        return volume_->write(offset_bytes, from, mode);
    }
    Result<void> discard(uint64_t offset_bytes, uint64_t length_bytes, IoMode mode) override {
        STELLARIUM_TRY(check_writable());
        return volume_->discard(offset_bytes, length_bytes, mode);
    }
    Result<void> write_zeroes(uint64_t offset_bytes, uint64_t length_bytes, IoMode mode) override {
        return discard(offset_bytes, length_bytes, mode);
    }
    void flush_async(std::function<void(Result<void>)> done) override {
        if (read_only_) {
            done({});
            return;
        }
        owner_.flush_device(volume_, std::move(done));
    }

    void set_resize_listener(std::function<void(uint64_t new_size_bytes)> listener) override {
        const std::lock_guard lock(listener_mutex_);
        listener_ = std::move(listener);
    }
    /// Tells the listener. Held off by, and holding off, set_resize_listener().
    void size_changed(uint64_t new_size_bytes) {
        const std::lock_guard lock(listener_mutex_);
        if (listener_) {
            listener_(new_size_bytes);
        }
    }

  private:
    Result<void> check_writable() const {
        if (read_only_) {
            return fail(ErrorCode::kReadOnly, "the device is attached read-only");
        }
        return {};
    }

    DeviceOwner& owner_;
    const std::shared_ptr<Volume> volume_;
    const bool read_only_;
    const std::string label_;
    const std::string serial_;
    std::mutex listener_mutex_;
    std::function<void(uint64_t)> listener_;  ///< Guarded by listener_mutex_.
};

}  // namespace stellarium::nova
