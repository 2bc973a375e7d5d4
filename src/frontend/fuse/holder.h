// The holder: a small process that mounts the directory and keeps what must outlive a daemon, so
// that files on it, and mappings of them, survive the daemon's death.
//
// It has the /dev/fuse descriptor and the table of open files (open_table.h), nothing of the store,
// and gives both to each daemon that asks (holder_protocol.h). While no daemon has them, requests
// wait in the kernel. It ends when the directory is unmounted, by whomever, or the connection has
// been aborted.
//
//     HolderOptions options{.directory = "/srv/disks", .socket = runtime + "/mount.sock"};
//     STELLARIUM_TRY(start_holder(options));     // in the daemon, before it has threads
//
//     run_holder(options, report);               // stellarium-mount-holder's main()
//
// As root it mounts by itself, else by fusermount3 (package fuse3).
//
// Thread rule: start_holder() forks, so before any thread is made.
// Errors: those of mounting, in words.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include <sys/types.h>

#include "base/error.h"

namespace stellarium::fuse {

struct HolderOptions {
    std::string directory;       ///< Absolute; exists.
    std::string socket;          ///< Where it listens; for its owner only.
    std::optional<uid_t> owner;  ///< Whose daemon may ask, besides root; nullopt: ours.
    std::optional<gid_t> group;  ///< Of the owner, for the socket.
    std::string store;           ///< What mount(8) shows as the source.
    bool allow_other = false;    ///< Users other than ours may come in; always when root mounts.
    bool stay = false;           ///< A daemon that stops does not unmount.
};

/// Mounts, listens, and serves until the directory is unmounted. `report` is called once: with ""
/// when the directory is mounted and somebody may ask, else with what went wrong.
int run_holder(const HolderOptions& options, const std::function<void(const std::string&)>& report);

/// Starts the program stellarium-mount-holder as a process of its own session, with none of our
/// descriptors, and waits until it has mounted the directory. It is looked for beside this program
/// and in ../libexec/stellarium.
Result<void> start_holder(const HolderOptions& options);

}  // namespace stellarium::fuse
