// ControlService: every operation on a store, as a request with a JSON (or content) body and an
// answer. docs/api/openapi.json describes it; a test holds this table and that file together.
//
// The daemon puts it behind a socket, and a command that finds no daemon calls it directly, so both
// say the same about the same store.
//
//     ControlService service(*pool, {});
//     Response r = service.handle({"POST", "/v1/volumes", R"({"name":"a","size_bytes":4096})"});
//
// What it does beside nova::Pool: names images and volumes apart (removing an image by the volume's
// path is refused), suggests names for mistyped ones, counts running imports, and translates.
//
// Thread rule: handle() from any thread at the same time. The pool and the host outlive it.
// Durability and errors: those of nova/pool.h.
#pragma once

#include <memory>
#include <span>
#include <string_view>

#include "boot/boot.h"
#include "control/attachment.h"
#include "control/files_host.h"
#include "control/message.h"
#include "nova/pool.h"

namespace stellarium::control {

inline constexpr std::string_view kApiVersion = "v1";
/// Bound of requests that carry lists; the largest is a clone of kMaxClonesPerCall names.
inline constexpr size_t kMaxJsonBytes = size_t{16} << 20;
static_assert(nova::kMaxClonesPerCall * (128 + 4) + 4096 <= kMaxJsonBytes);
/// Values in one request. The names of such a clone and a few more.
inline constexpr size_t kMaxJsonValues = 2 * nova::kMaxClonesPerCall;
inline constexpr uint64_t kMaxDiffRanges = 100'000;  ///< In one answer; the client asks on.

/// One row of the table of operations.
struct RouteInfo {
    std::string_view method;
    std::string_view path;  ///< With {placeholders}: "/v1/images/{name}".
    std::string_view operation;
    int success_status;
    bool upload = false;     ///< The request's body is a sparse stream.
    bool download = false;   ///< The answer's body is a sparse stream.
    bool long_body = false;  ///< Up to kMaxJsonBytes instead of kUsualJsonBytes.
};

struct ServiceOptions {
    AttachmentHost* host = nullptr;  ///< nullptr: no daemon; attaching is refused.
    FilesHost* files = nullptr;      ///< nullptr: the same, for a directory.
    boot::Boot* boot = nullptr;      ///< nullptr: one of its own, without a thread.
    std::string version;             ///< Of the program, for GET /v1/version.
    std::string directory;           ///< Of the store.
    std::string socket;              ///< Control socket; "" for none.
    std::string nbd_socket{};        ///< Where NBD is served; "" for nowhere.
    std::string map_socket{};        ///< Where images are lent to be mapped; "" for nowhere.
};

class ControlService final : public RequestHandler {
  public:
    ControlService(nova::Pool& pool, ServiceOptions options);
    ~ControlService() override;

    size_t max_json_bytes(const std::string& method, const std::string& target) const override;
    bool wants_upload(const std::string& method, const std::string& target) const override;
    Response handle(const Request& request) override;

    /// Ends what may take long and loses nothing by it (a garbage collection), and refuses the
    /// like: before the program stops answering.
    void stop_long_work();

    static std::span<const RouteInfo> routes();

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

/// %XX-encodes everything but unreserved characters.
std::string percent_encode(std::string_view text);
/// kInvalidArgument for a malformed escape or an encoded NUL.
Result<std::string> percent_decode(std::string_view text);

}  // namespace stellarium::control
