#include "vm/ram_writer.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cerrno>
#include <cstdlib>
#include <new>

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include "vm/files.h"

namespace stellarium::vm {
namespace {

constexpr std::array<std::byte, kGuestPageBytes> kZeroPage{};

std::byte* allocate_block() {
    void* const memory = std::aligned_alloc(kGuestPageBytes, kRamBlockBytes);
    if (memory == nullptr) {
        throw std::bad_alloc();
    }
    return static_cast<std::byte*>(memory);
}

}  // namespace

void RamWriter::Free::operator()(std::byte* memory) const {
    std::free(memory);
}

RamWriter::RamWriter(int fd, std::string path, uint64_t size_bytes, RamWriterOptions options)
    : fd_(fd),
      path_(std::move(path)),
      size_bytes_(size_bytes),
      holds_data_((size_bytes + kRamBlockBytes - 1) / kRamBlockBytes, !options.empty),
      buffer_(allocate_block()),
      changes_(kPagesPerRamBlock, Change::kNone) {
    assert(size_bytes % kGuestPageBytes == 0);
}

RamWriter::~RamWriter() = default;

MutableBytes RamWriter::page_of(uint64_t number) {
    return {buffer_.get() + number % kPagesPerRamBlock * kGuestPageBytes, kGuestPageBytes};
}

Result<void> RamWriter::page(uint64_t number, Bytes data) {
    assert(data.size() == kGuestPageBytes && number < size_bytes_ / kGuestPageBytes);
    ++figures_.pages;
    STELLARIUM_TRY(enter(number / kPagesPerRamBlock));
    const MutableBytes present = page_of(number);
    if (std::memcmp(present.data(), data.data(), kGuestPageBytes) != 0) {
        std::memcpy(present.data(), data.data(), kGuestPageBytes);
        changes_[number % kPagesPerRamBlock] = Change::kData;
    }
    return {};
}

Result<void> RamWriter::zero_page(uint64_t number) {
    assert(number < size_bytes_ / kGuestPageBytes);
    const uint64_t block = number / kPagesPerRamBlock;
    ++figures_.pages;
    if (block != block_ && !holds_data_[block]) {
        return {};
    }
    STELLARIUM_TRY(enter(block));
    const MutableBytes present = page_of(number);
    if (std::memcmp(present.data(), kZeroPage.data(), kGuestPageBytes) != 0) {
        std::memset(present.data(), 0, kGuestPageBytes);
        changes_[number % kPagesPerRamBlock] = Change::kZero;
    }
    return {};
}

Result<void> RamWriter::enter(uint64_t block) {
    if (block == block_) {
        return {};
    }
    STELLARIUM_TRY(leave());
    if (!holds_data_[block]) {
        std::memset(buffer_.get(), 0, kRamBlockBytes);
        block_ = block;
        return {};
    }
    const uint64_t start = block * kRamBlockBytes;
    const uint64_t length = std::min(kRamBlockBytes, size_bytes_ - start);
    STELLARIUM_TRY(read_at(fd_, path_, start, {buffer_.get(), length}));
    block_ = block;
    return {};
}

Result<void> RamWriter::leave() {
    if (block_ == kNoBlock) {
        return {};
    }
    for (uint64_t first = 0; first < kPagesPerRamBlock;) {
        const Change change = changes_[first];
        uint64_t end = first + 1;
        while (end < kPagesPerRamBlock && changes_[end] == change) {
            ++end;
        }
        if (change != Change::kNone) {
            STELLARIUM_TRY(write_run(first, end - first, change));
        }
        first = end;
    }
    std::ranges::fill(changes_, Change::kNone);
    block_ = kNoBlock;
    return {};
}

Result<void> RamWriter::write_run(uint64_t first, uint64_t pages, Change change) {
    const uint64_t start = block_ * kRamBlockBytes + first * kGuestPageBytes;
    const uint64_t length = pages * kGuestPageBytes;
    ++figures_.writes;
    if (change == Change::kZero) {
        if (fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(start),
                      static_cast<off_t>(length)) != 0) {
            return std::unexpected(
                Error::from_errno(errno, fmt::format("make a hole in {} at {}", path_, start)));
        }
        figures_.zeroed_bytes += length;
        return {};
    }
    holds_data_[block_] = true;
    STELLARIUM_TRY(write_at(fd_, path_, start, {buffer_.get() + first * kGuestPageBytes, length}));
    figures_.changed_bytes += length;
    return {};
}

Result<void> RamWriter::finish() {
    STELLARIUM_TRY(leave());
    if (fsync(fd_) != 0) {
        return std::unexpected(Error::from_errno(errno, "sync " + path_));
    }
    return {};
}

}  // namespace stellarium::vm
