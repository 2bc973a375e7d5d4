// Borrows ranges of images from a daemon: the client's side of protocol.h.
//
//     STELLARIUM_ASSIGN(auto borrower, Borrower::connect("/run/.../map.sock"));
//     STELLARIUM_ASSIGN(const Borrowed range, borrower->borrow("debian", 0, 0, kDefaultMappings));
//     STELLARIUM_ASSIGN(const Mapping mapping, Mapping::make(range.plan, {}));
//
// Thread rule: any thread; requests are made one at a time.
// Ownership: the connection keeps the daemon's copy of the plans for others; mappings outlive it.
// Errors: kUnavailable when there is no daemon (any more), kProtocol, and what the daemon says.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/unique_fd.h"
#include "share/plan.h"

namespace stellarium::share {

struct Borrowed {
    uint64_t lease = 0;
    Plan plan;  ///< Checked.
};

class Borrower {
  public:
    static Result<std::unique_ptr<Borrower>> connect(const std::string& socket_path);
    explicit Borrower(UniqueFd socket) : socket_(std::move(socket)) {}

    /// `length_bytes` 0: up to the end.
    Result<Borrowed> borrow(std::string_view source, uint64_t offset_bytes, uint64_t length_bytes,
                            size_t max_mappings);
    Result<void> give_back(uint64_t lease);

  private:
    std::mutex mutex_;
    UniqueFd
        socket_;  ///< Guarded by mutex_. None: it said something odd, and nothing else is asked.
};

}  // namespace stellarium::share
