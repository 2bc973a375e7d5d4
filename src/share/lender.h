// Lends ranges of shareable images to clients, which map them: the daemon's side of protocol.h.
//
//     STELLARIUM_ASSIGN(auto lender, Lender::start(pool, {.listen_fd = fd}));
//     lender.reset();     // hangs up; what clients have mapped stays theirs, and leased
//
// Who asks for the same range of the same image gets descriptors of the same files, the memory file
// included, as long as somebody has it: so its pages are shared, too. A lease that is given back,
// or whose client hangs up, is forgotten here; the segments' locks end with the client's mappings.
//
// A thread accepts, and one serves each client; they block.
//
// Thread rule: any thread, except start() and the destructor.
// Errors, to the client: kPermissionDenied (the image is not shareable), kNotFound, kLimitExceeded
// (leases, descriptors, gathered bytes), and those of make_plan().
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/error.h"
#include "nova/pool.h"
#include "share/limits.h"

namespace stellarium::share {

struct LenderOptions {
    int listen_fd = -1;  ///< Listening; owned from then on.
    uint64_t max_files = kMaxLentFiles;
    /// Told of clients that break the protocol. From the clients' threads.
    std::function<void(const std::string& sentence)> notice{};
};

struct LenderStatus {
    uint64_t clients = 0;
    uint64_t leases = 0;          ///< Of all clients.
    uint64_t files = 0;           ///< Descriptors that are kept for them.
    uint64_t gathered_bytes = 0;  ///< In memory files.
};

class Lender {
  public:
    virtual ~Lender() = default;
    static Result<std::unique_ptr<Lender>> start(nova::Pool& pool, LenderOptions options);
    virtual LenderStatus status() const = 0;
};

}  // namespace stellarium::share
