// Writes a guest's RAM over what the volume holds from the snapshot before, and only what differs.
//
// Pages come in ascending order, round after round. A block of them at a time is in memory: read
// from the volume at its first page, compared page by page, and written back in runs of changed
// pages when the next block begins. So it makes no difference what the volume held, or whether an
// earlier attempt was broken off: afterwards it holds the RAM.
//
//     RamWriter writer(fd, "DIR/volumes/vm-ram", memory_bytes, {.empty = true});
//     STELLARIUM_TRY(writer.page(7, bytes));
//     STELLARIUM_TRY(writer.finish());                      // written and durable
//
// Thread rule: one thread.
// Durability: that of the file after finish().
// Errors: kIo, kNoSpace and others of the system, naming the file and the offset.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "vm/migration_stream.h"

namespace stellarium::vm {

/// Longest read and write, and what the pages of one are compared with.
inline constexpr uint64_t kRamBlockBytes = uint64_t{1} << 20;
inline constexpr uint64_t kPagesPerRamBlock = kRamBlockBytes / kGuestPageBytes;

struct RamWriterOptions {
    /// All of the file is a hole: nothing needs to be read.
    bool empty = false;
};

struct RamFigures {
    uint64_t pages = 0;          ///< Received, some of them several times.
    uint64_t changed_bytes = 0;  ///< Written because they differ and are not zero.
    uint64_t zeroed_bytes = 0;   ///< Made holes of.
    uint64_t writes = 0;
};

class RamWriter final : public PageSink {
  public:
    /// `fd`, opened for reading and writing, with O_DIRECT or without, stays the caller's and
    /// outlives this. `size_bytes`: of the file, whole pages.
    RamWriter(int fd, std::string path, uint64_t size_bytes, RamWriterOptions options);
    ~RamWriter() override;

    Result<void> page(uint64_t number, Bytes data) override;
    Result<void> zero_page(uint64_t number) override;
    Result<void> finish();

    const RamFigures& figures() const { return figures_; }

  private:
    enum class Change : uint8_t { kNone, kData, kZero };
    static constexpr uint64_t kNoBlock = ~uint64_t{0};

    Result<void> enter(uint64_t block);
    Result<void> leave();
    Result<void> write_run(uint64_t first, uint64_t pages, Change change);
    MutableBytes page_of(uint64_t number);

    const int fd_;
    const std::string path_;
    const uint64_t size_bytes_;
    std::vector<bool> holds_data_;  ///< Blocks that may hold anything but zeros.
    struct Free {
        void operator()(std::byte* memory) const;
    };
    std::unique_ptr<std::byte, Free> buffer_;  ///< The block, aligned for O_DIRECT.
    std::vector<Change> changes_;              ///< Of its pages.
    uint64_t block_ = kNoBlock;
    RamFigures figures_;
};

}  // namespace stellarium::vm
