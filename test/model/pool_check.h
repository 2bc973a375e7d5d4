// Compares a pool with its shadow.
//
//     PoolCheck check;
//     check.everything(*pool, shadow, /*after_crash=*/true);   // ADD_FAILUREs say what differs.
//
// Thread rule: one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/block_device.h"
#include "io/simulated.h"
#include "nova/pool.h"
#include "test/model/pool_shadow.h"

namespace stellarium::nova::model {

class PoolCheck {
  public:
    PoolCheck() : actual_(kPieceBytes), expected_(kPieceBytes) {}

    /// Names, lineage, attachments and every byte, through read-only devices. `after_crash` (a loss
    /// of power, or of the arena) allows what was overwritten since the last flush. Afterwards the
    /// shadow is what the pool is. Throws when something cannot be read.
    void everything(Pool& pool, Shadow& shadow, bool after_crash);

    /// Compares a device with `expected`, piece by piece. `volume`: whose present content that is,
    /// of which some sectors may be another version; null for what never changes. Afterwards the
    /// shadow is what the device is. False, and a failure, when it differs. Throws when something
    /// cannot be read.
    bool content(const std::string& source, const Content& expected, BlockDevice& device,
                 ShadowVolume* volume, bool after_crash);

    /// Bytes compared since it was made.
    uint64_t bytes() const { return bytes_; }

  private:
    static constexpr size_t kPieceBytes = size_t{1} << 20;
    using Versions = std::map<uint64_t, std::vector<Sector>>;

    bool sectors(const std::string& source, uint64_t offset_bytes, size_t length,
                 ShadowVolume* volume, const Versions& uncertain, bool after_crash);

    std::vector<std::byte> actual_;
    std::vector<std::byte> expected_;
    uint64_t bytes_ = 0;
};

/// What fsck says of the pool on this disk, which a process that died now would leave. Fails the
/// test for everything that is not harmless; where the pool was not opened after a loss of power,
/// copies of the superblock may be torn.
void check_structure(const io::SimulatedFileSystem& files, bool recovered, bool data = false);

}  // namespace stellarium::nova::model
