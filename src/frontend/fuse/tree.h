// The folders and names of a mounted directory, and what stat(2) says of them.
//
//     /images/NAME   /volumes/NAME   /snapshots/VOLUME@NAME   /boot/NAME/vmlinuz, initrd
//
// A file's node number is its entity's id plus kFirstFile. Ids are never used again, so a node is
// the same file for ever, in this daemon and the next: nothing of it has to be remembered, and what
// the kernel holds stays true over a restart.
//
// Kernel and initrd of a boot manifest are images. Below /boot they are further names of the same
// nodes, as hard links are: all machines that boot them share the pages.
//
//     Tree tree(pool, {.uid = geteuid(), .gid = getegid()});
//     STELLARIUM_ASSIGN(NodeStat found, tree.lookup(kVolumesFolder, "vm-1"));
//     for (const Entry& entry : *tree.list(kVolumesFolder, handle)) ...     // ascending by node
//
// Thread rule: any thread.
// Errors: kNotFound; those of nova/pool.h.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <sys/stat.h>
#include <sys/types.h>

#include "base/error.h"
#include "nova/pool.h"

namespace stellarium::fuse {

inline constexpr uint64_t kRoot = 1;
inline constexpr uint64_t kImagesFolder = 2;
inline constexpr uint64_t kVolumesFolder = 3;
inline constexpr uint64_t kSnapshotsFolder = 4;
inline constexpr uint64_t kBootFolder = 5;
inline constexpr uint64_t kFirstFile = 16;
/// /boot/NAME, with the id of NAME. It fits into an off_t, as a place in a listing must.
inline constexpr uint64_t kBootMark = uint64_t{1} << 61;

/// Is there as long as the directory is.
constexpr bool is_fixed_folder(uint64_t node) {
    return node < kFirstFile;
}
constexpr bool is_folder(uint64_t node) {
    return is_fixed_folder(node) || (node & kBootMark) != 0;
}
constexpr uint64_t entity_of(uint64_t node) {
    return (node & ~kBootMark) - kFirstFile;
}
constexpr uint64_t node_of(uint64_t entity) {
    return entity + kFirstFile;
}

/// Below the directory: "volumes/vm-1".
std::string path_of(const nova::EntityInfo& info);

/// Names of the images that hold what a boot needs beside its disk; "": there is none.
struct BootImages {
    std::string kernel;
    std::string initrd;
};

/// What is known of boots; src/boot has it.
struct BootSource {
    /// kNotFound: `source` has no manifest.
    std::function<Result<BootImages>(std::string_view source)> images{};
    /// The images and volumes for which images() names any, with their ids.
    std::function<std::vector<nova::EntityInfo>()> all{};
};

struct TreeOptions {
    uid_t uid = 0;           ///< Whose everything is.
    gid_t gid = 0;           ///< And whose group.
    bool for_group = false;  ///< Members of the group may do what the owner may.
    BootSource boots{};      ///< Without functions /boot is empty.
};

struct NodeStat {
    struct stat attributes{};
    bool immutable = false;  ///< Will be the same for as long as it is there.
};

/// What readdir(3) gives, in the order of nodes.
struct Entry {
    uint64_t node = 0;
    std::string name;
    mode_t type = 0;  ///< S_IFDIR or S_IFREG.
};
using Listing = std::vector<Entry>;

class Tree {
  public:
    Tree(nova::Pool& pool, const TreeOptions& options);

    Result<NodeStat> lookup(uint64_t folder, std::string_view name);
    Result<NodeStat> stat(uint64_t node);

    /// What `folder` holds now. Kept under `handle` until forget(), so that a reader who comes
    /// again and again costs one listing; where it is not kept (any more, or by another daemon) it
    /// is made anew, and a reader who goes on behind the node that it had last misses nothing that
    /// was there all the time. kNotFound: no folder.
    Result<std::shared_ptr<const Listing>> list(uint64_t folder, uint64_t handle);
    void forget(uint64_t handle);

  private:
    struct Kept {
        uint64_t handle = 0;
        uint64_t folder = 0;
        std::shared_ptr<const Listing> listing;
    };

    NodeStat stat_folder(uint64_t node) const;
    NodeStat stat_entity(const nova::EntityInfo& info);
    /// Kernel and initrd, those that there are, of what a folder below /boot belongs to.
    Result<std::vector<std::pair<std::string, nova::EntityInfo>>> boot_files(uint64_t entity) const;

    nova::Pool& pool_;
    const TreeOptions options_;
    std::mutex mutex_;
    std::deque<Kept> kept_;  ///< Oldest first. Guarded by mutex_.
};

}  // namespace stellarium::fuse
