#include "daemon/map_host.h"

#include <utility>

#include "daemon/socket_group.h"

namespace stellarium::daemon {

Result<void> MapHost::start() {
    const std::string what = "map socket " + socket_path_;
    auto listener = vhost::listen_at(socket_path_);
    if (!listener) {
        return std::unexpected(listener.error().with_context(what));
    }
    listener_ = *std::move(listener);
    if (auto given = give_to_group(socket_path_, socket_gid_, what); !given) {
        vhost::remove_socket_file(listener_);
        return given;
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
