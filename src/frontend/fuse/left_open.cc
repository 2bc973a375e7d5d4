#include "frontend/fuse/left_open.h"

#include <set>
#include <utility>

#include <fmt/format.h>

#include "frontend/fuse/holder_protocol.h"
#include "frontend/fuse/open_table.h"
#include "frontend/fuse/tree.h"

namespace stellarium::fuse {

std::string holder_socket(const std::string& runtime_directory) {
    return runtime_directory + "/mount.sock";
}

Result<std::vector<std::shared_ptr<BlockDevice>>> hold_open_files(
    nova::Pool& pool, std::span<const std::string> runtime_directories) {
    std::vector<std::shared_ptr<BlockDevice>> held;
    for (const std::string& directory : runtime_directories) {
        // One of this store lets whoever may open the store connect.
        auto holder = HolderClient::connect(holder_socket(directory));
        if (!holder) {
            continue;
        }
        const auto status = holder->status();
        if (!status) {
            return std::unexpected(
                status.error().with_context("whether files of the store are open is not known"));
        }
        if (status->store != pool.uuid()) {
            continue;
        }
        STELLARIUM_ASSIGN(UniqueFd memory, holder->table());
        STELLARIUM_ASSIGN(const auto table, OpenTable::map(std::move(memory)));
        std::set<uint64_t> nodes;
        for (const OpenFile& file : table->files()) {
            nodes.insert(file.node);
        }
        for (const uint64_t node : nodes) {
            const auto info = pool.find(entity_of(node));
            if (!info) {
                continue;
            }
            auto device = pool.attach(
                info->name,
                {.read_only = true,
                 .label = fmt::format("the file {}/{} is open, and waits for a daemon: start "
                                      "stellariumd, close the file, and try again",
                                      status->directory, path_of(*info)),
                 .id = info->id});
            if (device) {
                held.push_back(*std::move(device));
            } else if (device.error().code() != ErrorCode::kCorrupt) {
                return std::unexpected(device.error());
            }
        }
        break;
    }
    return held;
}

}  // namespace stellarium::fuse
