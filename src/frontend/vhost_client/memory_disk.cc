#include "frontend/vhost_client/memory_disk.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace stellarium::vhost {

namespace {
constexpr uint64_t kPageBytes = 4096;
}

Result<std::shared_ptr<MemoryDisk>> MemoryDisk::create(uint64_t size_bytes) {
    void* data = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) {
        return std::unexpected(Error::from_errno(errno, "mmap of a memory disk"));
    }
    std::shared_ptr<MemoryDisk> disk(new MemoryDisk());
    disk->data_ = static_cast<std::byte*>(data);
    disk->capacity_bytes_ = size_bytes;
    disk->size_bytes_ = size_bytes;
    return disk;
}

Result<std::shared_ptr<MemoryDisk>> MemoryDisk::open(const std::string& path) {
    int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    struct stat st = {};
    if (fd < 0 || ::fstat(fd, &st) != 0) {
        return std::unexpected(Error::from_errno(errno, fmt::format("open {}", path)));
    }
    auto size_bytes = static_cast<uint64_t>(st.st_size) / 512 * 512;
    void* data = ::mmap(nullptr, std::max<uint64_t>(size_bytes, 1), PROT_READ | PROT_WRITE,
                        MAP_SHARED, fd, 0);
    int error = errno;
    ::close(fd);
    if (data == MAP_FAILED) {
        return std::unexpected(Error::from_errno(error, fmt::format("mmap {}", path)));
    }
    std::shared_ptr<MemoryDisk> disk(new MemoryDisk());
    disk->data_ = static_cast<std::byte*>(data);
    disk->capacity_bytes_ = size_bytes;
    disk->size_bytes_ = size_bytes;
    return disk;
}

MemoryDisk::~MemoryDisk() {
    if (data_ != nullptr) {
        ::munmap(data_, std::max<uint64_t>(capacity_bytes_, 1));
    }
}

Result<void> MemoryDisk::admit(uint64_t offset_bytes, uint64_t length_bytes, IoMode mode) {
    uint64_t size = size_bytes();
    if (offset_bytes % 512 != 0 || length_bytes % 512 != 0 || offset_bytes > size ||
        length_bytes > size - offset_bytes) {
        return fail(ErrorCode::kInvalidArgument, fmt::format("{} bytes at {} of a disk of {}",
                                                             length_bytes, offset_bytes, size));
    }
    if (mode == IoMode::kNoWait && would_block_) {
        return fail(ErrorCode::kWouldBlock, "told to");
    }
    std::unique_lock lock(mutex_);
    if (holding_ && mode == IoMode::kNoWait) {
        return fail(ErrorCode::kWouldBlock, "held");
    }
    if (holding_) {
        ++waiting_;
        changed_.notify_all();
        changed_.wait(lock, [&] { return !holding_; });
        --waiting_;
    }
    if (failure_ != nullptr) {
        return std::unexpected(*failure_);
    }
    return {};
}

template <typename Part>
void MemoryDisk::each_page(uint64_t offset_bytes, uint64_t length_bytes, Part part) {
    while (length_bytes > 0) {
        uint64_t page = offset_bytes / kPageBytes;
        uint64_t length = std::min(length_bytes, (page + 1) * kPageBytes - offset_bytes);
        std::lock_guard lock(page_locks_[page % page_locks_.size()]);
        part(data_ + offset_bytes, length);
        offset_bytes += length;
        length_bytes -= length;
    }
}

Result<void> MemoryDisk::read(uint64_t offset_bytes, std::span<const iovec> into, IoMode mode) {
    uint64_t total = 0;
    for (const iovec& segment : into) {
        total += segment.iov_len;
    }
    STELLARIUM_TRY(admit(offset_bytes, total, mode));
    for (const iovec& segment : into) {
        auto* to = static_cast<std::byte*>(segment.iov_base);
        each_page(offset_bytes, segment.iov_len, [&](const std::byte* at, uint64_t length) {
            std::memcpy(to, at, length);
            to += length;
        });
        offset_bytes += segment.iov_len;
    }
    return {};
}

Result<void> MemoryDisk::write(uint64_t offset_bytes, std::span<const iovec> from, IoMode mode) {
    uint64_t total = 0;
    for (const iovec& segment : from) {
        total += segment.iov_len;
    }
    STELLARIUM_TRY(admit(offset_bytes, total, mode));
    for (const iovec& segment : from) {
        const auto* source = static_cast<const std::byte*>(segment.iov_base);
        each_page(offset_bytes, segment.iov_len, [&](std::byte* at, uint64_t length) {
            std::memcpy(at, source, length);
            source += length;
        });
        offset_bytes += segment.iov_len;
    }
    writes_.fetch_add(1);
    return {};
}

std::vector<std::byte> MemoryDisk::content(uint64_t offset_bytes, uint64_t length_bytes) {
    std::vector<std::byte> copy(length_bytes);
    std::byte* to = copy.data();
    each_page(offset_bytes, length_bytes, [&](const std::byte* at, uint64_t length) {
        std::memcpy(to, at, length);
        to += length;
    });
    return copy;
}

void MemoryDisk::fill(std::byte value) {
    each_page(0, size_bytes(), [&](std::byte* at, uint64_t length) {
        std::memset(at, static_cast<int>(value), length);
    });
}

Result<void> MemoryDisk::zero(uint64_t offset_bytes, uint64_t length_bytes, IoMode mode) {
    STELLARIUM_TRY(admit(offset_bytes, length_bytes, mode));
    each_page(offset_bytes, length_bytes,
              [](std::byte* at, uint64_t length) { std::memset(at, 0, length); });
    return {};
}

Result<void> MemoryDisk::discard(uint64_t offset_bytes, uint64_t length_bytes, IoMode mode) {
    return zero(offset_bytes, length_bytes, mode);
}

Result<void> MemoryDisk::write_zeroes(uint64_t offset_bytes, uint64_t length_bytes, IoMode mode) {
    return zero(offset_bytes, length_bytes, mode);
}

void MemoryDisk::flush_async(std::function<void(Result<void>)> done) {
    flushes_.fetch_add(1);
    std::shared_ptr<const Error> failure;
    {
        std::lock_guard lock(mutex_);
        if (holding_) {
            held_flushes_.push_back(std::move(done));
            changed_.notify_all();
            return;
        }
        failure = failure_;
    }
    done(failure != nullptr ? Result<void>(std::unexpected(*failure)) : Result<void>());
}

void MemoryDisk::set_resize_listener(std::function<void(uint64_t new_size_bytes)> listener) {
    std::lock_guard lock(mutex_);
    resize_listener_ = std::move(listener);
}

void MemoryDisk::set_failure(std::shared_ptr<const Error> failure) {
    std::lock_guard lock(mutex_);
    failure_ = std::move(failure);
}

void MemoryDisk::hold() {
    std::lock_guard lock(mutex_);
    holding_ = true;
}

void MemoryDisk::release() {
    std::vector<std::function<void(Result<void>)>> flushes;
    {
        std::lock_guard lock(mutex_);
        holding_ = false;
        flushes.swap(held_flushes_);
    }
    changed_.notify_all();
    for (const auto& done : flushes) {
        done({});
    }
}

size_t MemoryDisk::held() const {
    std::lock_guard lock(mutex_);
    return waiting_ + held_flushes_.size();
}

void MemoryDisk::wait_until_held(size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return waiting_ + held_flushes_.size() >= count; });
}

void MemoryDisk::resize(uint64_t size_bytes) {
    size_bytes_ = std::min(size_bytes, capacity_bytes_);
    // Called under the lock: set_resize_listener({}) must not return while it runs.
    std::lock_guard lock(mutex_);
    if (resize_listener_) {
        resize_listener_(size_bytes_);
    }
}

}  // namespace stellarium::vhost
