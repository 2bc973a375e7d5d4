// What the NBD server offers: names, and a device behind each. The daemon puts a pool behind it,
// tests a disk in memory.
//
//     class Volumes final : public nbd::ExportSource { ... };
//
// Thread rule: every function may be called from any thread at the same time, and may wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/block_device.h"
#include "base/error.h"
#include "frontend/nbd/turn_pool.h"

namespace stellarium::nbd {

/// What a client is told of an export before it opens it.
struct ExportInfo {
    uint64_t size_bytes = 0;  ///< A multiple of 512.
    bool read_only = false;
    std::string description;  ///< For a person; may be empty.
};

/// Which parts of an export hold data, as of one moment.
class AllocationMap {
  public:
    virtual ~AllocationMap() = default;
    /// First range of data at or after `offset_bytes`, as (offset, length); nullopt: holes follow,
    /// to the end.
    virtual Result<std::optional<std::pair<uint64_t, uint64_t>>> next_data(
        uint64_t offset_bytes) = 0;
};

/// An export in use, by all clients that chose it: what one of them has written the others read,
/// and a flush of one covers what any of them was told is written.
class Export {
  public:
    Export() = default;
    /// Called on a thread that may wait, when the last client has gone: makes durable what they
    /// wrote.
    virtual ~Export() = default;
    Export(const Export&) = delete;
    Export& operator=(const Export&) = delete;

    virtual BlockDevice& device() = 0;
    /// Holds every write completed before the call.
    virtual Result<std::shared_ptr<AllocationMap>> allocation() = 0;

    // The server's own: whose turn it is.
    const std::shared_ptr<TurnPool::Turns> reading_turns = std::make_shared<TurnPool::Turns>();
    const std::shared_ptr<TurnPool::Turns> writing_turns = std::make_shared<TurnPool::Turns>();
};

class ExportSource {
  public:
    virtual ~ExportSource() = default;
    /// The first `at_most` names after `after`, ascending; "" begins. Fewer: there are no more.
    virtual Result<std::vector<std::string>> list(std::string_view after, size_t at_most) = 0;
    /// Opens nothing. kNotFound says how to find out what there is.
    virtual Result<ExportInfo> find(std::string_view name) = 0;
    /// The same Export for the same thing, whoever has it open. kBusy: something else writes to it.
    virtual Result<std::shared_ptr<Export>> open(std::string_view name) = 0;
};

}  // namespace stellarium::nbd
