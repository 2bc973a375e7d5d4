// Where an export goes: a file, a block device, or a pipe.
//
// A file is written under a temporary name beside its own, sparse, synced, and only then given its
// name; on any failure nothing is left. It fails before the first byte when the file system cannot
// hold a file of the size, or has less room than the data needs. An existing file is refused, and
// so is a block device, unless `force`.
//
//     STELLARIUM_ASSIGN(auto target, ExportTarget::open(path, {.size_bytes = s, .data_bytes = d}));
//     STELLARIUM_TRY(target->write_all(source));     // to the end of the source, and published
//
// Errors: kAlreadyExists, kLimitExceeded (no file of that size), kNoSpace, and the system's.
// Durability: when write_all returned success the file, its name included, is on disk.
// Thread rule: one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/error.h"
#include "cli/file_handle.h"
#include "control/sparse_stream.h"

namespace stellarium::cli {

struct ExportOptions {
    uint64_t size_bytes = 0;
    uint64_t data_bytes = 0;  ///< Of it, not holes.
    bool force = false;
};

class ExportTarget {
  public:
    /// `path` "-" is standard output.
    static Result<std::unique_ptr<ExportTarget>> open(const std::string& path,
                                                      const ExportOptions& options);
    virtual ~ExportTarget() = default;
    virtual Result<void> write_all(control::SparseSource& source) = 0;
};

}  // namespace stellarium::cli
