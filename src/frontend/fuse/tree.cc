#include "frontend/fuse/tree.h"

#include <algorithm>
#include <array>
#include <chrono>

#include <fmt/format.h>

#include "frontend/fuse/limits.h"

namespace stellarium::fuse {
namespace {

using nova::EntityInfo;
using nova::EntityKind;

constexpr uint64_t kStatBlockBytes = 512;
constexpr blksize_t kPreferredBytes = 64 << 10;

struct Folder {
    uint64_t node;
    std::string_view name;
    EntityKind kind;
};
/// Beside these there is kBootFolder, which holds folders.
constexpr std::array kFolders = {Folder{kImagesFolder, "images", EntityKind::kImage},
                                 Folder{kVolumesFolder, "volumes", EntityKind::kVolume},
                                 Folder{kSnapshotsFolder, "snapshots", EntityKind::kSnapshot}};

const Folder* folder_of(uint64_t node) {
    const auto found = std::ranges::find(kFolders, node, &Folder::node);
    return found == kFolders.end() ? nullptr : found;
}

std::unexpected<Error> nothing_there() {
    return fail(ErrorCode::kNotFound, "there is no such file");
}

constexpr std::string_view kBootName = "boot";

}  // namespace

std::string path_of(const EntityInfo& info) {
    const auto* const folder = std::ranges::find(kFolders, info.kind, &Folder::kind);
    return fmt::format("{}/{}", folder->name, info.name);
}

Tree::Tree(nova::Pool& pool, const TreeOptions& options) : pool_(pool), options_(options) {}

NodeStat Tree::stat_folder(uint64_t node) const {
    NodeStat result{.attributes = {}, .immutable = is_fixed_folder(node)};
    result.attributes.st_ino = node;
    result.attributes.st_mode = S_IFDIR | (options_.for_group ? 0550 : 0500);
    result.attributes.st_nlink = node == kRoot ? 2 + kFolders.size() + 1 : 2;
    result.attributes.st_uid = options_.uid;
    result.attributes.st_gid = options_.gid;
    return result;
}

NodeStat Tree::stat_entity(const EntityInfo& info) {
    NodeStat result;
    struct stat& attributes = result.attributes;
    const bool writable = info.kind == EntityKind::kVolume;
    result.immutable = !writable;
    attributes.st_ino = node_of(info.id);
    attributes.st_mode = S_IFREG | (writable ? 0600 : 0400);
    if (options_.for_group) {
        attributes.st_mode |= writable ? 0060 : 0040;
    }
    attributes.st_nlink = 1;
    attributes.st_uid = options_.uid;
    attributes.st_gid = options_.gid;
    attributes.st_size = static_cast<off_t>(info.size_bytes);
    attributes.st_blksize = kPreferredBytes;
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(info.created);
    attributes.st_mtim = {.tv_sec = seconds.count(), .tv_nsec = (info.created - seconds).count()};
    attributes.st_atim = attributes.st_mtim;
    attributes.st_ctim = attributes.st_mtim;
    // Of what is damaged nobody knows how much there is.
    const auto mapped = pool_.mapped_bytes(info.id);
    attributes.st_blocks = static_cast<blkcnt_t>(mapped ? *mapped / kStatBlockBytes : 0);
    return result;
}

Result<std::vector<std::pair<std::string, EntityInfo>>> Tree::boot_files(uint64_t entity) const {
    std::vector<std::pair<std::string, EntityInfo>> files;
    if (!options_.boots.images) {
        return files;
    }
    STELLARIUM_ASSIGN(const EntityInfo info, pool_.find(entity));
    if (info.kind == EntityKind::kSnapshot) {
        return files;
    }
    const auto images = options_.boots.images(info.name);
    if (!images) {
        if (images.error().code() == ErrorCode::kNotFound) {
            return files;
        }
        return std::unexpected(images.error());
    }
    for (const auto& [name, image] :
         {std::pair("initrd", images->initrd), std::pair("vmlinuz", images->kernel)}) {
        // One that has just been removed is not there.
        if (const auto found = image.empty() ? nothing_there() : pool_.find(image); found) {
            files.emplace_back(name, *found);
        }
    }
    return files;
}

Result<NodeStat> Tree::lookup(uint64_t folder, std::string_view name) {
    if (folder == kRoot && name == kBootName) {
        return stat_folder(kBootFolder);
    }
    if (folder == kBootFolder) {
        STELLARIUM_ASSIGN(const EntityInfo info, pool_.find(name));
        STELLARIUM_ASSIGN(const auto files, boot_files(info.id));
        return files.empty() ? nothing_there()
                             : Result<NodeStat>(stat_folder(node_of(info.id) | kBootMark));
    }
    if (!is_fixed_folder(folder) && is_folder(folder)) {
        STELLARIUM_ASSIGN(const auto files, boot_files(entity_of(folder)));
        const auto found = std::ranges::find(
            files, name, [](const auto& file) { return std::string_view(file.first); });
        return found == files.end() ? nothing_there()
                                    : Result<NodeStat>(stat_entity(found->second));
    }
    if (folder == kRoot) {
        const auto found = std::ranges::find(kFolders, name, &Folder::name);
        return found == kFolders.end() ? nothing_there()
                                       : Result<NodeStat>(stat_folder(found->node));
    }
    const Folder* const place = folder_of(folder);
    if (place == nullptr) {
        return nothing_there();
    }
    STELLARIUM_ASSIGN(const EntityInfo info, pool_.find(name));
    return info.kind == place->kind ? Result<NodeStat>(stat_entity(info)) : nothing_there();
}

Result<NodeStat> Tree::stat(uint64_t node) {
    if (is_fixed_folder(node)) {
        return node == kRoot || node == kBootFolder || folder_of(node) != nullptr
                   ? Result<NodeStat>(stat_folder(node))
                   : nothing_there();
    }
    if (is_folder(node)) {
        STELLARIUM_TRY(pool_.find(entity_of(node)));
        return stat_folder(node);
    }
    STELLARIUM_ASSIGN(const EntityInfo info, pool_.find(entity_of(node)));
    return stat_entity(info);
}

Result<std::shared_ptr<const Listing>> Tree::list(uint64_t folder, uint64_t handle) {
    {
        const std::lock_guard lock(mutex_);
        const auto found = std::ranges::find_if(kept_, [&](const Kept& kept) {
            // Another daemon's handle may be equal to one of ours, for another folder.
            return kept.handle == handle && kept.folder == folder;
        });
        if (found != kept_.end()) {
            return found->listing;
        }
    }
    auto listing = std::make_shared<Listing>();
    if (folder == kRoot) {
        for (const Folder& each : kFolders) {
            listing->push_back({each.node, std::string(each.name), S_IFDIR});
        }
        listing->push_back({kBootFolder, std::string(kBootName), S_IFDIR});
    } else if (folder == kBootFolder) {
        for (EntityInfo& info :
             options_.boots.all ? options_.boots.all() : std::vector<EntityInfo>()) {
            listing->push_back({node_of(info.id) | kBootMark, std::move(info.name), S_IFDIR});
        }
        std::ranges::sort(*listing, {}, &Entry::node);
    } else if (!is_fixed_folder(folder) && is_folder(folder)) {
        STELLARIUM_ASSIGN(const auto files, boot_files(entity_of(folder)));
        for (const auto& [name, image] : files) {
            listing->push_back({node_of(image.id), name, S_IFREG});
        }
        std::ranges::sort(*listing, {}, &Entry::node);
    } else {
        const Folder* const place = folder_of(folder);
        if (place == nullptr) {
            return nothing_there();
        }
        std::vector<EntityInfo> infos;
        if (place->kind == EntityKind::kSnapshot) {
            STELLARIUM_ASSIGN(infos, pool_.snapshots(""));
        } else {
            infos = place->kind == EntityKind::kImage ? pool_.images() : pool_.volumes();
        }
        listing->reserve(infos.size());
        for (EntityInfo& info : infos) {
            listing->push_back({node_of(info.id), std::move(info.name), S_IFREG});
        }
        std::ranges::sort(*listing, {}, &Entry::node);
    }
    const std::lock_guard lock(mutex_);
    if (kept_.size() >= kMaxListings) {
        kept_.pop_front();
    }
    kept_.push_back({.handle = handle, .folder = folder, .listing = listing});
    return listing;
}

void Tree::forget(uint64_t handle) {
    const std::lock_guard lock(mutex_);
    std::erase_if(kept_, [&](const Kept& kept) { return kept.handle == handle; });
}

}  // namespace stellarium::fuse
