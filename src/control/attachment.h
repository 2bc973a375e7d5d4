// Attachments: what is asked for, what is remembered in the store, what is reported.
//
// The store keeps an attachment as opaque bytes (nova::Pool::AttachmentRecord::options); this is
// their meaning: a small JSON object with a version, so that a later daemon reads what an earlier
// one wrote and a client without a daemon can list and remove it.
//
// Thread rule: values; AttachmentHost says its own.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/rate_limits.h"
#include "control/json.h"
#include "nova/pool.h"

namespace stellarium::control {

inline constexpr uint32_t kMaxQueues = 64;
inline constexpr size_t kMaxSerialBytes = 20;

/// What a client asks for and what is remembered.
struct AttachmentOptions {
    bool read_only = false;
    uint32_t queues = 1;              ///< 1 to kMaxQueues.
    uint32_t block_size_bytes = 512;  ///< 512 or 4096: the guest's logical block.
    std::string serial;               ///< "" takes the volume's name.
    /// The client's own name for the socket: a symbolic link that the client made. The daemon never
    /// opens it; it is kept so that `detach` and `attachments` can name it. "" for none.
    std::string link;
    RateLimits limits;  ///< Completed.
};

/// Reads {"iops", "iops_burst", "bandwidth_bytes", "bandwidth_burst_bytes"}; what is left out is
/// not limited, and a burst is one second's worth. kInvalidArgument.
Result<RateLimits> rate_limits_from_json(const Json& object, std::string what);
/// The inverse: the limits that there are, with their bursts.
Json to_json(const RateLimits& limits);

/// Reads the options of an attach request or of a record.
Result<AttachmentOptions> attachment_options_from_json(const Json& object, const std::string& what);
std::vector<std::byte> encode_attachment(const AttachmentOptions& options);
Result<AttachmentOptions> decode_attachment(const nova::Pool::AttachmentRecord& record);

enum class AttachmentState : uint8_t {
    kOffline,    ///< On record; no daemon serves it now.
    kListening,  ///< Its socket waits for a guest.
    kConnected,  ///< A guest is there.
    kFailed,     ///< It could not be restored; `detail` says why.
};
std::string_view to_string(AttachmentState state);

struct AttachmentStatus {
    std::string source;
    std::string socket;  ///< Where the daemon listens; "" when offline.
    AttachmentOptions options;
    AttachmentState state = AttachmentState::kOffline;
    std::string detail;
};
Json to_json(const AttachmentStatus& status);

/// The part of a daemon that serves volumes to guests.
/// Thread rule: any thread.
class AttachmentHost {
  public:
    virtual ~AttachmentHost() = default;
    /// On return the socket accepts a guest and the attachment is on record.
    virtual Result<AttachmentStatus> attach(std::string_view source,
                                            const AttachmentOptions& options) = 0;
    /// On return the guest is disconnected, its writes are durable, socket and record are gone.
    /// Returns the last status. kNotFound when `source` is not attached.
    virtual Result<AttachmentStatus> detach(std::string_view source) = 0;
    /// Sets the limits (completed) of what is attached, also of one with a guest; none: takes them
    /// away. On return they are on record, and hold from about now on. kNotFound when `source` is
    /// not attached.
    virtual Result<AttachmentStatus> set_limits(std::string_view source,
                                                const RateLimits& limits) = 0;
    virtual std::vector<AttachmentStatus> attachments() const = 0;
};

}  // namespace stellarium::control
