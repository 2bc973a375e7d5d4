// Gives a socket's file to the group that may use it.
//
// Thread rule: any thread.
#pragma once

#include <cerrno>
#include <optional>
#include <string>

#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include "base/error.h"

namespace stellarium::daemon {

/// Mode 0660 for `group`; without one the file stays as it is. `what`: "map socket /run/...", for
/// the error.
inline Result<void> give_to_group(const std::string& path, std::optional<gid_t> group,
                                  const std::string& what) {
    if (group && (chown(path.c_str(), static_cast<uid_t>(-1), *group) != 0 ||
                  chmod(path.c_str(), 0660) != 0)) {
        return std::unexpected(Error::from_errno(errno, "give " + what + " to its group"));
    }
    return {};
}

}  // namespace stellarium::daemon
