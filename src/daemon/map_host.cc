#include "daemon/map_host.h"

#include <cerrno>
#include <utility>

#include <sys/stat.h>
#include <unistd.h>

namespace stellarium::daemon {

Result<void> MapHost::start() {
    const std::string what = "map socket " + socket_path_;
    auto listener = vhost::listen_at(socket_path_);
    if (!listener) {
        return std::unexpected(listener.error().with_context(what));
    }
    listener_ = *std::move(listener);
    if (socket_gid_ && (chown(socket_path_.c_str(), static_cast<uid_t>(-1), *socket_gid_) != 0 ||
                        chmod(socket_path_.c_str(), 0660) != 0)) {
        const Error error = Error::from_errno(errno, "give " + what + " to its group");
        vhost::remove_socket_file(listener_);
        return std::unexpected(error);
    }
    auto lender = share::Lender::start(
        pool_, {.listen_fd = listener_.fd.release(), .notice = [this](const std::string& sentence) {
                    log_.warning("map client", {{"message", sentence}});
                }});
    if (!lender) {
        vhost::remove_socket_file(listener_);
        return std::unexpected(lender.error().with_context(what));
    }
    lender_ = *std::move(lender);
    return {};
}

void MapHost::stop() {
    if (lender_) {
        vhost::remove_socket_file(listener_);
        lender_.reset();
    }
}

}  // namespace stellarium::daemon
