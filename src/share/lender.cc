#include "share/lender.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <list>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>

#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/budget.h"
#include "share/limits.h"
#include "share/plan.h"
#include "share/protocol.h"

namespace stellarium::share {
namespace {

/// A plan that is lent, and what it takes of the daemon's bounds.
struct LentPlan {
    LentPlan(std::shared_ptr<Budget> files_of_all, std::shared_ptr<Budget> bytes_of_all)
        : files(std::move(files_of_all)), bytes(std::move(bytes_of_all)) {}
    BudgetShare files;
    BudgetShare bytes;
    Plan plan;
};

/// Which image, offset, length and number of mappings.
using PlanKey = std::tuple<uint64_t, uint64_t, uint64_t, uint32_t>;

/// A plan for each key, made by the first who asks and shared by all who come while it is lent.
class PlanTable {
  public:
    PlanTable(nova::Pool& pool, uint64_t max_files)
        : pool_(pool),
          files_(std::make_shared<Budget>(max_files)),
          bytes_(std::make_shared<Budget>(kMaxGatheredBytes)) {}

    Result<std::shared_ptr<const LentPlan>> get(const std::string& source, const PlanKey& key) {
        std::shared_ptr<Slot> slot;
        {
            const std::lock_guard lock(mutex_);
            std::erase_if(slots_, [](const auto& entry) {
                return entry.second.use_count() == 1 && entry.second->plan.expired();
            });
            auto& entry = slots_[key];
            if (!entry) {
                entry = std::make_shared<Slot>();
            }
            slot = entry;
        }
        const std::lock_guard one(slot->making);
        if (auto plan = slot->plan.lock()) {
            return plan;
        }
        STELLARIUM_ASSIGN(const auto reader, pool_.open_reader(source));
        auto lent = std::make_shared<LentPlan>(files_, bytes_);
        const auto [id, offset_bytes, length_bytes, max_mappings] = key;
        STELLARIUM_ASSIGN(lent->plan,
                          make_plan(*reader, offset_bytes, length_bytes,
                                    {.max_mappings = max_mappings,
                                     .max_files = kMaxFiles,
                                     .max_gathered_bytes = bytes_->total() - bytes_->taken()}));
        if (!lent->files.resize(lent->plan.files.size()) ||
            !lent->bytes.resize(lent->plan.gathered_bytes)) {
            return fail(ErrorCode::kLimitExceeded,
                        fmt::format("the daemon lends {} files and {} gathered bytes already: try "
                                    "again when others have given theirs back",
                                    files_->taken(), bytes_->taken()));
        }
        slot->plan = lent;
        return lent;
    }
    uint64_t files() const { return files_->taken(); }
    uint64_t gathered_bytes() const { return bytes_->taken(); }

  private:
    struct Slot {
        std::mutex making;
        std::weak_ptr<const LentPlan> plan;  ///< Guarded by making; expired() may be asked by all.
    };
    nova::Pool& pool_;
    const std::shared_ptr<Budget> files_;
    const std::shared_ptr<Budget> bytes_;
    std::mutex mutex_;
    std::map<PlanKey, std::shared_ptr<Slot>> slots_;  ///< Guarded by mutex_.
};

class LenderImpl final : public Lender {
  public:
    LenderImpl(nova::Pool& pool, LenderOptions options, UniqueFd wake)
        : pool_(pool),
          plans_(pool, options.max_files),
          options_(std::move(options)),
          listener_(options_.listen_fd),
          wake_(std::move(wake)),
          acceptor_([this] { accept_all(); }) {}
    ~LenderImpl() override {
        const uint64_t one = 1;
        [[maybe_unused]] const ssize_t woken = write(wake_.get(), &one, sizeof one);
        acceptor_.join();
        {
            const std::lock_guard lock(mutex_);
            for (const Client& client : clients_) {
                shutdown(client.socket.get(), SHUT_RDWR);
            }
        }
        for (Client& client : clients_) {
            client.thread.join();
        }
    }
    LenderImpl(const LenderImpl&) = delete;
    LenderImpl& operator=(const LenderImpl&) = delete;

    LenderStatus status() const override {
        const std::lock_guard lock(mutex_);
        LenderStatus status{.files = plans_.files(), .gathered_bytes = plans_.gathered_bytes()};
        for (const Client& client : clients_) {
            status.clients += client.done ? 0 : 1;
            status.leases += client.leases.size();
        }
        return status;
    }

  private:
    struct Client {
        UniqueFd socket;
        std::thread thread;
        bool done = false;  ///< Guarded by mutex_, as leases is.
        std::map<uint64_t, std::shared_ptr<const LentPlan>> leases;
    };

    void accept_all() {
        while (true) {
            std::array<pollfd, 2> wait{
                pollfd{.fd = listener_.get(), .events = POLLIN, .revents = 0},
                pollfd{.fd = wake_.get(), .events = POLLIN, .revents = 0}};
            if (poll(wait.data(), wait.size(), -1) < 0 && errno != EINTR) {
                return;
            }
            if (wait[1].revents != 0) {
                return;
            }
            if (wait[0].revents != 0) {
                accept_one();
            }
        }
    }

    void accept_one() {
        UniqueFd socket(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
        reap();
        const std::lock_guard lock(mutex_);
        if (!socket || clients_.size() >= kMaxBorrowers ||
            !set_timeouts(socket.get(), 0, kMessageTimeoutSeconds)) {
            if (!socket) {
                // Out of descriptors; whoever waits is asked again a little later.
                std::this_thread::sleep_for(std::chrono::milliseconds(10));
            }
            return;  // Hung up on.
        }
        Client& client = clients_.emplace_back();
        client.socket = std::move(socket);
        client.thread = std::thread([this, &client] { serve(client); });
    }

    /// Forgets the clients that have gone.
    void reap() {
        std::list<Client> gone;
        {
            const std::lock_guard lock(mutex_);
            for (auto it = clients_.begin(); it != clients_.end();) {
                const auto next = std::next(it);
                if (it->done) {
                    gone.splice(gone.end(), clients_, it);
                }
                it = next;
            }
        }
        for (Client& client : gone) {
            client.thread.join();
        }
    }

    void serve(Client& client) {
        while (true) {
            const Result<void> served = serve_one(client);
            if (!served) {
                if (served.error().code() != ErrorCode::kUnavailable && options_.notice) {
                    options_.notice(served.error().message());
                }
                break;
            }
        }
        std::map<uint64_t, std::shared_ptr<const LentPlan>> leases;  // Goes after the lock.
        const std::lock_guard lock(mutex_);
        leases.swap(client.leases);
        shutdown(client.socket.get(), SHUT_RDWR);
        client.done = true;
    }

    Result<void> serve_one(Client& client) {
        const int socket = client.socket.get();
        BorrowRequest request{};
        std::array<std::byte, sizeof request> bytes{};
        STELLARIUM_TRY(receive_all(socket, bytes));
        request = load<BorrowRequest>(bytes);
        if (request.magic != kBorrowMagic || request.version != kBorrowVersion ||
            request.reserved != std::array<uint8_t, 2>{} ||
            request.source_bytes > kMaxSourceBytes) {
            return fail(ErrorCode::kProtocol, "a client of the map socket sends no request");
        }
        std::string source(request.source_bytes, '\0');
        STELLARIUM_TRY(receive_all(socket, std::as_writable_bytes(std::span(source))));
        switch (static_cast<BorrowKind>(request.kind.get())) {
            case BorrowKind::kBorrow: {
                auto lent = lend(source, request);
                if (!lent) {
                    return answer_error(socket, lent.error());
                }
                return answer(client, *std::move(lent));
            }
            case BorrowKind::kGiveBack: {
                std::shared_ptr<const LentPlan> given_back;  // Goes after the lock.
                {
                    const std::lock_guard lock(mutex_);
                    const auto lease = client.leases.find(request.lease);
                    if (lease != client.leases.end()) {
                        given_back = std::move(lease->second);
                        client.leases.erase(lease);
                    }
                }
                return given_back ? answer_done(socket)
                                  : answer_error(socket, {ErrorCode::kNotFound,
                                                          "this client has no such lease"});
            }
        }
        return fail(ErrorCode::kProtocol,
                    fmt::format("a client of the map socket asks for {}", request.kind.get()));
    }

    Result<std::shared_ptr<const LentPlan>> lend(const std::string& source,
                                                 const BorrowRequest& request) {
        STELLARIUM_ASSIGN(const nova::EntityInfo info, pool_.find(source));
        if (info.kind != nova::EntityKind::kImage || !info.shareable) {
            return fail(ErrorCode::kPermissionDenied,
                        fmt::format("'{}' is not lent to be mapped: that is for images that are "
                                    "marked so (stellarctl image set NAME --shareable yes)",
                                    source));
        }
        const size_t mappings =
            std::clamp<size_t>(request.max_mappings, kLeastMappings, kMostMappings);
        return plans_.get(source, {info.id, request.offset_bytes, request.length_bytes,
                                   static_cast<uint32_t>(mappings)});
    }

    Result<void> answer(Client& client, std::shared_ptr<const LentPlan> lent) {
        BorrowAnswer head = answer_head();
        {
            const std::lock_guard lock(mutex_);
            if (client.leases.size() < kMaxLeases) {
                head.lease = ++last_lease_;
                client.leases.emplace(head.lease, lent);
            }
        }
        if (head.lease == 0) {
            return answer_error(
                client.socket.get(),
                {ErrorCode::kLimitExceeded,
                 fmt::format("a client has at most {} ranges at once: unmap some", kMaxLeases)});
        }
        const Plan& plan = lent->plan;
        head.length_bytes = plan.length_bytes;
        head.gathered_bytes = plan.gathered_bytes;
        head.piece_count = static_cast<uint32_t>(plan.pieces.size());
        head.file_count = static_cast<uint32_t>(plan.files.size());
        std::vector<std::byte> packet;
        packet.reserve(sizeof head + plan.pieces.size() * sizeof(WirePiece));
        append_bytes(packet, bytes_of(head));
        for (const Piece& piece : plan.pieces) {
            WirePiece wire{};
            wire.offset_bytes = piece.offset_bytes;
            wire.length_bytes = piece.length_bytes;
            wire.file_offset_bytes = piece.file_offset_bytes;
            wire.file = piece.file;
            append_bytes(packet, bytes_of(wire));
        }
        STELLARIUM_TRY(send_all(client.socket.get(), packet));
        return send_files(client.socket.get(), plan.files);
    }

    static BorrowAnswer answer_head() {
        BorrowAnswer head{};
        head.magic = kBorrowMagic;
        head.version = kBorrowVersion;
        return head;
    }
    static Result<void> answer_done(int socket) {
        const BorrowAnswer head = answer_head();
        return send_all(socket, bytes_of(head));
    }
    static Result<void> answer_error(int socket, const Error& error) {
        BorrowAnswer head = answer_head();
        const std::string_view text = std::string_view(error.message()).substr(0, kMaxAnswerText);
        head.code = static_cast<uint16_t>(1 + static_cast<unsigned>(error.code()));
        head.message_bytes = static_cast<uint32_t>(text.size());
        std::vector<std::byte> packet;
        append_bytes(packet, bytes_of(head));
        append_bytes(packet, bytes_of(text));
        return send_all(socket, packet);
    }

    nova::Pool& pool_;
    PlanTable plans_;
    const LenderOptions options_;
    const UniqueFd listener_;
    const UniqueFd wake_;
    mutable std::mutex mutex_;
    std::list<Client> clients_;  ///< Guarded by mutex_; each is used by its thread, too.
    uint64_t last_lease_ = 0;    ///< Guarded by mutex_.
    std::thread acceptor_;
};

}  // namespace

Result<std::unique_ptr<Lender>> Lender::start(nova::Pool& pool, LenderOptions options) {
    UniqueFd wake(eventfd(0, EFD_CLOEXEC));
    if (!wake) {
        const int error = errno;
        const UniqueFd listener(options.listen_fd);
        return std::unexpected(Error::from_errno(error, "make an event descriptor"));
    }
    return std::make_unique<LenderImpl>(pool, std::move(options), std::move(wake));
}

}  // namespace stellarium::share
