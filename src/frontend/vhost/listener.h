// Listening unix sockets that replace what a dead server left behind, and nothing else.
#pragma once

#include <string>

#include <sys/types.h>

#include "base/error.h"
#include "base/unique_fd.h"

namespace stellarium::vhost {

struct Listener {
    UniqueFd fd;
    std::string path;
    dev_t device = 0;  ///< Identity of the socket file, so that a successor's is never removed.
    ino_t inode = 0;
};

/// Listens at `path`, mode 0600 from its first moment. A socket there that nobody listens on is
/// replaced, in one step. Errors: kBusy (someone listens), kAlreadyExists (not a socket),
/// kInvalidArgument (path too long), kIo.
Result<Listener> listen_at(const std::string& path);

/// Removes the socket file when it is still this listener's.
void remove_socket_file(const Listener& listener);

}  // namespace stellarium::vhost
