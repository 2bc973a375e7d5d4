// Checking and repairing a pool that may be damaged, and that nobody holds.
//
// On top of what nebula/check.h says of the files: whether everything that an image, a volume or a
// snapshot refers to is there, and what of them is lost where it is not. docs/internals/fsck.md
// says how.
//
//     STELLARIUM_ASSIGN(CheckReport report, check_pool(env, "/srv/pool", {.data = true}));
//     if (report.damaged()) { for (const nebula::Finding& finding : report.findings)
//     print(finding); }
//
// Nothing is written without `repair`; a lock is held meanwhile, if there is a lock file that can
// be locked without writing to it. With `repair`: see SalvagedStore::repair. What is lost stays
// lost, and reading it an error: it is never zeros or older content.
//
// Thread rule: a call runs in its thread; one at a time for a directory, which the lock ensures.
// Errors: what is wrong with the pool is no error but in the report. kBusy: somebody holds it;
// kNotFound: there is none; kUnsupported: a newer version must look; kCancelled; kIo and others of
// the system where nothing could be looked at.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "io/io.h"
#include "nebula/check.h"
#include "nova/entity.h"

namespace stellarium::nova {

struct PoolCheckOptions {
    /// read_only is set as needed.
    nebula::StoreOptions store{};
    bool repair = false;
    nebula::CheckOptions check{};
};

/// Bytes of an image, volume or snapshot that cannot be read.
struct LostRange {
    std::string source;  ///< Its name; of a snapshot VOLUME@SNAPSHOT.
    EntityKind kind = EntityKind::kVolume;
    uint64_t offset_bytes = 0;
    uint64_t length_bytes = 0;
};

struct CheckReport {
    std::vector<nebula::Finding> findings;  ///< What is wrong now, after a repair.
    std::vector<LostRange> lost;            ///< Merged, by name and offset.
    std::vector<std::string> unknown;       ///< Volumes and snapshots whose content is not known.
    nebula::CheckCounts counts;
    uint64_t images = 0;
    uint64_t volumes = 0;
    uint64_t snapshots = 0;
    uint64_t nodes = 0;   ///< Distinct tree nodes read.
    uint64_t chunks = 0;  ///< References to chunks looked up, each distinct node's once.
    /// False: what images and volumes there are could not be found out, nor repaired.
    bool usable = true;
    /// With `repair`: what was wrong before, and what was done about it.
    std::vector<nebula::Finding> repaired;
    std::optional<nebula::RepairReport> repair;

    /// Something is wrong that is not harmless.
    bool damaged() const;
    /// And some of it is such that a repair has something to do.
    bool repairable() const;
};

Result<CheckReport> check_pool(const io::Env& env, const std::string& directory,
                               const PoolCheckOptions& options);

}  // namespace stellarium::nova
