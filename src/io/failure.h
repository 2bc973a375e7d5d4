// How the implementations of the seam word the errors of system calls. Not for use outside src/io.
#pragma once

#include <string_view>

#include <fmt/format.h>

#include "base/error.h"

namespace stellarium::io {

/// "write pool/log: No space left on device", with the code that belongs to `errno_value`.
inline std::unexpected<Error> failed(int errno_value, std::string_view operation,
                                     std::string_view path) {
    return std::unexpected(Error::from_errno(errno_value, fmt::format("{} {}", operation, path)));
}

}  // namespace stellarium::io
