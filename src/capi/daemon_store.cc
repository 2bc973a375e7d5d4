#include <algorithm>
#include <cerrno>
#include <chrono>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <libnbd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "capi/backend.h"
#include "control/json.h"
#include "control/locations.h"
#include "control/service.h"
#include "io/io.h"
#include "share/borrower.h"

namespace stellarium::capi {
namespace {

using control::Json;

/// Of one NBD request; a server takes 32 MiB.
constexpr uint64_t kRequestBytes = uint64_t{8} << 20;
constexpr uint64_t kPrefetchStep = uint64_t{64} << 20;
constexpr uint64_t kDiscardStep = uint64_t{1} << 30;
/// How long a volume that was closed is waited for; others may have it, too.
constexpr std::chrono::seconds kReleaseTimeout{3};
constexpr std::chrono::milliseconds kReleasePause{2};

struct CloseNbd {
    void operator()(nbd_handle* handle) const { nbd_close(handle); }
};

/// libnbd keeps the last error for each thread.
Error nbd_error(std::string_view what) {
    const int code = nbd_get_errno();
    const char* const text = nbd_get_error();
    const ErrorCode known = code == 0           ? ErrorCode::kUnavailable
                            : code == ESHUTDOWN ? ErrorCode::kUnavailable
                                                : Error::from_errno(code, "").code();
    return {known, fmt::format("{}: {}", what, text != nullptr ? text : "unknown error")};
}

/// A connection to the daemon's NBD socket. libnbd makes one request at a time of a handle.
class NbdDisk final : public Disk {
  public:
    static Result<std::unique_ptr<NbdDisk>> open(const std::string& socket,
                                                 const std::string& source, bool read_only,
                                                 bool attached) {
        std::unique_ptr<nbd_handle, CloseNbd> handle(nbd_create());
        if (!handle || nbd_set_export_name(handle.get(), source.c_str()) != 0) {
            return std::unexpected(nbd_error("make an NBD client"));
        }
        if (nbd_connect_unix(handle.get(), socket.c_str()) != 0) {
            const Error error =
                nbd_error(fmt::format("open '{}' at NBD socket {}", source, socket));
            return fail(attached ? ErrorCode::kBusy : error.code(), error.message());
        }
        const int64_t size = nbd_get_size(handle.get());
        const int is_read_only = nbd_is_read_only(handle.get());
        if (size < 0 || is_read_only < 0) {
            return std::unexpected(nbd_error("ask an NBD export"));
        }
        return std::make_unique<NbdDisk>(std::move(handle), static_cast<uint64_t>(size),
                                         read_only || is_read_only == 1);
    }
    NbdDisk(std::unique_ptr<nbd_handle, CloseNbd> handle, uint64_t size_bytes, bool read_only)
        : handle_(std::move(handle)), size_bytes_(size_bytes), read_only_(read_only) {}
    ~NbdDisk() override {
        [[maybe_unused]] const int ended = nbd_shutdown(handle_.get(), 0);
        // The daemon lets go of a volume when the connection has ended. Whoever closes it and
        // removes it at once would be told that it is attached.
        const auto end = std::chrono::steady_clock::now() + kReleaseTimeout;
        while (is_held_ && is_held_() && std::chrono::steady_clock::now() < end) {
            std::this_thread::sleep_for(kReleasePause);
        }
    }
    /// Asked after the connection has ended.
    void set_is_held(std::function<bool()> is_held) { is_held_ = std::move(is_held); }
    NbdDisk(const NbdDisk&) = delete;
    NbdDisk& operator=(const NbdDisk&) = delete;

    uint64_t size_bytes() const override { return size_bytes_; }
    bool read_only() const override { return read_only_; }
    Result<void> read(uint64_t offset_bytes, MutableBytes into) override {
        while (!into.empty()) {
            const MutableBytes now = into.first(std::min<size_t>(into.size(), kRequestBytes));
            if (nbd_pread(handle_.get(), now.data(), now.size(), offset_bytes, 0) != 0) {
                return std::unexpected(nbd_error("read"));
            }
            into = into.subspan(now.size());
            offset_bytes += now.size();
        }
        return {};
    }
    Result<void> write(uint64_t offset_bytes, Bytes from) override {
        while (!from.empty()) {
            const Bytes now = from.first(std::min<size_t>(from.size(), kRequestBytes));
            if (nbd_pwrite(handle_.get(), now.data(), now.size(), offset_bytes, 0) != 0) {
                return std::unexpected(nbd_error("write"));
            }
            from = from.subspan(now.size());
            offset_bytes += now.size();
        }
        return {};
    }
    Result<void> flush() override {
        if (!read_only_ && nbd_flush(handle_.get(), 0) != 0) {
            return std::unexpected(nbd_error("flush"));
        }
        return {};
    }
    Result<void> discard(uint64_t offset_bytes, uint64_t length_bytes) override {
        // Zeroes, which a TRIM does not promise; the daemon makes a hole of either.
        return in_steps(offset_bytes, length_bytes, kDiscardStep, "discard",
                        [this](uint64_t length, uint64_t offset) {
                            return nbd_zero(handle_.get(), length, offset, 0);
                        });
    }
    Result<void> prefetch(uint64_t offset_bytes, uint64_t length_bytes) override {
        return in_steps(offset_bytes, length_bytes, kPrefetchStep, "prefetch",
                        [this](uint64_t length, uint64_t offset) {
                            return nbd_cache(handle_.get(), length, offset, 0);
                        });
    }

  private:
    template <typename Request>
    static Result<void> in_steps(uint64_t offset_bytes, uint64_t length_bytes, uint64_t step_bytes,
                                 std::string_view what, Request request) {
        while (length_bytes > 0) {
            const uint64_t now = std::min(length_bytes, step_bytes);
            if (request(now, offset_bytes) != 0) {
                return std::unexpected(nbd_error(what));
            }
            offset_bytes += now;
            length_bytes -= now;
        }
        return {};
    }

    const std::unique_ptr<nbd_handle, CloseNbd> handle_;
    const uint64_t size_bytes_;
    const bool read_only_;
    std::function<bool()> is_held_;
};

class LentRange final : public MappedRange {
  public:
    LentRange(std::shared_ptr<share::Borrower> borrower, uint64_t lease, share::Mapping mapping,
              uint64_t mapped_bytes, uint64_t gathered_bytes)
        : MappedRange(std::move(mapping), mapped_bytes, gathered_bytes),
          borrower_(std::move(borrower)),
          lease_(lease) {}
    Result<void> release() override {
        STELLARIUM_TRY(MappedRange::release());
        return borrower_->give_back(lease_);
    }

  private:
    const std::shared_ptr<share::Borrower> borrower_;
    const uint64_t lease_;
};

class DaemonStore final : public Backend {
  public:
    DaemonStore(std::string socket, std::vector<uid_t> trusted_users)
        : socket_(std::move(socket)), trusted_users_(std::move(trusted_users)) {}

    bool through_daemon() const override { return true; }
    Result<std::unique_ptr<control::ControlClient>> client() override {
        return control::connect_unix(socket_, trusted_users_);
    }
    Result<std::unique_ptr<Disk>> open_disk(const std::string& source, bool read_only) override {
        STELLARIUM_ASSIGN(const std::string nbd, daemon_socket("nbd_socket"));
        if (nbd.empty()) {
            return fail(ErrorCode::kUnavailable,
                        "the daemon serves no NBD, which reads and writes go through: start it "
                        "with stellariumd --nbd");
        }
        STELLARIUM_ASSIGN(const bool attached, is_attached(source));
        STELLARIUM_ASSIGN(auto disk, NbdDisk::open(nbd, source, read_only, attached));
        if (!attached) {
            disk->set_is_held([this, source] { return is_attached(source).value_or(false); });
        }
        return disk;
    }
    Result<std::unique_ptr<MappedRange>> map(const std::string& source,
                                             const RangeOptions& options) override {
        STELLARIUM_ASSIGN(const auto borrower, connected());
        STELLARIUM_ASSIGN(const size_t mappings, share::mappings_left(options.max_mappings));
        auto borrowed =
            borrower->borrow(source, options.offset_bytes, options.length_bytes, mappings);
        if (!borrowed) {
            if (borrowed.error().code() == ErrorCode::kUnavailable) {
                forget(borrower);  // A daemon that has started again is connected to next time.
            }
            return std::unexpected(std::move(borrowed).error());
        }
        auto mapping = share::Mapping::make(borrowed->plan, options.map);
        if (!mapping) {
            [[maybe_unused]] const auto given_back = borrower->give_back(borrowed->lease);
            return std::unexpected(std::move(mapping).error());
        }
        return std::make_unique<LentRange>(borrower, borrowed->lease, *std::move(mapping),
                                           mapped_bytes_of(borrowed->plan),
                                           borrowed->plan.gathered_bytes);
    }
    Result<void> close() override { return {}; }

  private:
    /// Asked each time: a daemon that was started again may have others.
    Result<std::string> daemon_socket(const char* key) {
        STELLARIUM_ASSIGN(const auto control, client());
        STELLARIUM_ASSIGN(const Json version, control->call("GET", "/v1/version"));
        return version.value(key, std::string());
    }
    Result<bool> is_attached(const std::string& source) {
        STELLARIUM_ASSIGN(const auto control, client());
        const size_t at = source.find('@');
        const std::string volume = control::percent_encode(source.substr(0, at));
        if (at != std::string::npos) {
            STELLARIUM_ASSIGN(
                const Json info,
                control->call("GET", "/v1/volumes/" + volume + "/snapshots/" +
                                         control::percent_encode(source.substr(at + 1))));
            return info.value("attached", false);
        }
        auto info = control->call("GET", "/v1/images/" + volume);
        if (!info && info.error().code() == ErrorCode::kNotFound) {
            info = control->call("GET", "/v1/volumes/" + volume);
        }
        if (!info) {
            return std::unexpected(info.error());
        }
        return info->value("attached", false);
    }
    Result<std::shared_ptr<share::Borrower>> connected() {
        const std::lock_guard lock(mutex_);
        if (!borrower_) {
            STELLARIUM_ASSIGN(const std::string socket, daemon_socket("map_socket"));
            if (socket.empty()) {
                return fail(ErrorCode::kUnavailable, "the daemon lends nothing to be mapped");
            }
            STELLARIUM_ASSIGN(borrower_, share::Borrower::connect(socket));
        }
        return borrower_;
    }
    void forget(const std::shared_ptr<share::Borrower>& borrower) {
        const std::lock_guard lock(mutex_);
        if (borrower_ == borrower) {
            borrower_.reset();
        }
    }

    const std::string socket_;
    const std::vector<uid_t> trusted_users_;
    std::mutex mutex_;
    std::shared_ptr<share::Borrower> borrower_;  ///< Guarded by mutex_.
};

}  // namespace

Result<std::unique_ptr<Backend>> connect_daemon_store(const std::string& directory,
                                                      const std::string& socket) {
    if (!socket.empty()) {
        STELLARIUM_ASSIGN(const auto client, control::connect_unix(socket));
        return std::make_unique<DaemonStore>(socket, std::vector<uid_t>());
    }
    const std::string store = control::real_path(directory);
    // Some places of sockets lie in folders where others may write, too.
    std::vector<uid_t> trusted{geteuid(), 0};
    if (struct stat status{}; stat(store.c_str(), &status) == 0) {
        trusted.push_back(status.st_uid);
    }
    Error last(ErrorCode::kUnavailable,
               fmt::format("no daemon serves the store {}: start one (stellariumd --store {} "
                           "--nbd), or open it with stellarium_open()",
                           store, store));
    for (const std::string& candidate :
         control::control_socket_candidates(*io::real_env().files, store)) {
        const auto client = control::connect_unix(candidate, trusted);
        if (client) {
            return std::make_unique<DaemonStore>(candidate, trusted);
        }
        if (client.error().code() == ErrorCode::kPermissionDenied) {
            last = client.error();
        }
    }
    return std::unexpected(last);
}

}  // namespace stellarium::capi
