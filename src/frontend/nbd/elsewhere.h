// Connection::do_elsewhere, for the two files that use it.
//
// Thread rule: see connection.h.
#pragma once

#include <memory>
#include <utility>

#include <boost/asio/post.hpp>

#include "frontend/nbd/connection.h"

namespace stellarium::nbd {

template <typename Work, typename Then>
void Connection::do_elsewhere(TurnPool& pool, const std::shared_ptr<TurnPool::Turns>& turns,
                              Work work, Then then) {
    ++elsewhere_;
    pool.submit(turns, [self = shared_from_this(), work = std::move(work),
                        then = std::move(then)]() mutable {
        auto result = work();
        // The last reference goes on the loop's thread, with everything that the client owns.
        const std::shared_ptr<boost::asio::io_context> io = self->io_;
        boost::asio::post(*io, [self = std::move(self), then = std::move(then),
                                result = std::move(result)]() mutable {
            --self->elsewhere_;
            then(std::move(result));
            self->process();
        });
    });
}

}  // namespace stellarium::nbd
