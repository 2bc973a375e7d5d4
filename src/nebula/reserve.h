// Room that is kept on the disk for what frees room: removals, checkpoints, garbage collection.
//
// A preallocated file, `reserve` in the store's directory. Where such work finds the disk full, the
// file goes, and the work has its room; nobody else is given that room: until the file is there
// again, other appends fail (kNoSpace) while less than the reserve is free. It is made again as
// soon as twice its size is free. docs/internals/crash-model.md has the whole of it.
//
//     const ReserveScope scope;                 // what this thread appends now may take it
//     STELLARIUM_TRY(store.append(removal));
//
// Thread rule: a ReserveScope belongs to its thread; Reserve from any thread.
// Durability: none is needed. A file that a crash takes away is made again.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>

#include "base/error.h"
#include "io/io.h"

namespace stellarium::nebula {

/// What stellariumd and stellarctl keep, unless that is more than one part in kReserveShare of the
/// file system.
inline constexpr uint64_t kReserveBytes = uint64_t{64} << 20;
inline constexpr uint64_t kReserveShare = 64;
inline constexpr const char* kReserveName = "reserve";

/// While one lives, what its thread appends may take the reserve.
class ReserveScope {
  public:
    ReserveScope() { ++depth; }
    ~ReserveScope() { --depth; }
    ReserveScope(const ReserveScope&) = delete;
    ReserveScope& operator=(const ReserveScope&) = delete;
    static bool active() { return depth > 0; }

  private:
    static thread_local unsigned depth;
};

class Reserve {
  public:
    /// Keeps at most `wanted_bytes` in `directory`; 0: nothing, and every call does nothing.
    Reserve(io::FileSystem& files, std::string directory, uint64_t wanted_bytes);

    /// Makes the file, or finds it, when it is not held and there is plenty of room. Best effort.
    void hold();
    /// Gives the room up for work that frees room. False: there was nothing to give.
    bool release();
    /// kNoSpace while the reserve is not held, cannot be, and less than it is free.
    Result<void> admit(uint64_t bytes);

    uint64_t held_bytes() const { return held_bytes_.load(); }

  private:
    std::string path() const;
    /// Of the file, in whole pages; nullopt: there is none.
    Result<std::optional<uint64_t>> size_there();
    Result<void> allocate(uint64_t bytes);

    io::FileSystem& files_;
    const std::string directory_;
    const uint64_t wanted_bytes_;
    std::mutex mutex_;
    std::atomic<uint64_t> held_bytes_{0};
};

}  // namespace stellarium::nebula
