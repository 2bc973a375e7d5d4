// Files that are open while no daemon runs: for whoever opens the store without one.
//
// The holder of the mounted directory (holder.h) knows them. A program that has the store to itself
// attaches each before it changes anything, so that what is open, or mapped by a guest, is neither
// removed nor shrunk nor rolled back, as if a daemon had it. It need not look again: nobody serves
// the files as long as it has the store, and so none is opened or closed.
//
//     STELLARIUM_ASSIGN(auto held, hold_open_files(*pool, {runtime_directory}));
//
// Thread rule: one thread.
// Errors: those of holder_protocol.h, when there is a holder and it does not answer; those of
// nova/pool.h.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/block_device.h"
#include "base/error.h"
#include "nova/pool.h"

namespace stellarium::fuse {

/// Where the holder listens, in the daemon's runtime directory.
std::string holder_socket(const std::string& runtime_directory);

/// Devices of all that is open below the directory of the first holder that is found in one of the
/// runtime directories, and shows this store; none when nobody holds one. They go before the pool
/// does. What cannot be attached, because it is damaged, is left out.
Result<std::vector<std::shared_ptr<BlockDevice>>> hold_open_files(
    nova::Pool& pool, std::span<const std::string> runtime_directories);

}  // namespace stellarium::fuse
