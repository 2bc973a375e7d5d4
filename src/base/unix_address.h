// Addresses of unix sockets.
//
// Thread rule: pure functions.
#pragma once

#include <string>

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "base/error.h"

namespace stellarium {

/// kInvalidArgument when the path is empty or longer than an address can be.
inline Result<sockaddr_un> unix_address(const std::string& path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.empty() || path.size() >= sizeof(address.sun_path)) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("socket path '{}' must have 1 to {} bytes", path,
                                sizeof(address.sun_path) - 1));
    }
    path.copy(address.sun_path, path.size());
    return address;
}

}  // namespace stellarium
