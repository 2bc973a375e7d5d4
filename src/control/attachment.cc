#include "control/attachment.h"

#include <optional>
#include <utility>

#include <fmt/format.h>

namespace stellarium::control {
namespace {

constexpr uint64_t kRecordVersion = 1;

/// What is wrong with them is told to `reader`.
RateLimits read_limits(ObjectReader& reader) {
    RateLimits limits;
    const auto required_more_than_0 = [&](std::string_view key, std::optional<uint64_t> value) {
        if (value && *value == 0) {
            reader.complain(key, "must be more than 0; leave it out for no limit");
        }
        return value.value_or(0);
    };
    limits.iops = required_more_than_0("iops", reader.optional_number("iops"));
    limits.iops_burst = required_more_than_0("iops_burst", reader.optional_number("iops_burst"));
    limits.bandwidth_bytes =
        required_more_than_0("bandwidth_bytes", reader.optional_size("bandwidth_bytes"));
    limits.bandwidth_burst_bytes = required_more_than_0(
        "bandwidth_burst_bytes", reader.optional_size("bandwidth_burst_bytes"));
    return limits;
}

}  // namespace

Result<RateLimits> rate_limits_from_json(const Json& object, std::string what) {
    ObjectReader reader(object, std::move(what));
    const RateLimits limits = read_limits(reader);
    STELLARIUM_TRY(reader.finish());
    return completed(limits);
}

Json to_json(const RateLimits& limits) {
    Json object = Json::object();
    if (limits.iops != 0) {
        object["iops"] = limits.iops;
        object["iops_burst"] = limits.iops_burst;
    }
    if (limits.bandwidth_bytes != 0) {
        object["bandwidth_bytes"] = limits.bandwidth_bytes;
        object["bandwidth_burst_bytes"] = limits.bandwidth_burst_bytes;
    }
    return object;
}

Result<AttachmentOptions> attachment_options_from_json(const Json& object,
                                                       const std::string& what) {
    AttachmentOptions options;
    ObjectReader reader(object, what);
    const std::string frontend = reader.optional_string("frontend").value_or("vhost-user");
    if (frontend != "vhost-user") {
        reader.complain("frontend",
                        fmt::format("is '{}'; this version knows 'vhost-user'", frontend));
    }
    if (reader.optional_number("version").value_or(kRecordVersion) != kRecordVersion) {
        reader.complain("version", "is newer than this program");
    }
    options.read_only = reader.optional_bool("read_only").value_or(false);
    options.queues =
        static_cast<uint32_t>(reader.optional_number("queues", 1, kMaxQueues).value_or(1));
    const uint64_t block_size = reader.optional_number("block_size").value_or(512);
    if (block_size != 512 && block_size != 4096) {
        reader.complain("block_size", fmt::format("is {}, and must be 512 or 4096", block_size));
    }
    options.block_size_bytes = static_cast<uint32_t>(block_size);
    options.serial = reader.optional_string("serial").value_or("");
    if (options.serial.size() > kMaxSerialBytes) {
        reader.complain("serial", fmt::format("has {} bytes; a virtio serial has at most {}",
                                              options.serial.size(), kMaxSerialBytes));
    }
    for (const char c : options.serial) {
        if (c < ' ' || c > '~') {
            reader.complain("serial", "must be printable ASCII");
            break;
        }
    }
    options.link = reader.optional_string("link").value_or("");
    if (options.link.size() > 2048) {
        reader.complain("link", "is longer than 2048 bytes");
    }
    const Json* limits = reader.optional_value("limits");
    STELLARIUM_TRY(reader.finish());
    if (limits != nullptr) {
        STELLARIUM_ASSIGN(options.limits,
                          rate_limits_from_json(*limits, "'limits' of the " + what));
    }
    return options;
}

std::vector<std::byte> encode_attachment(const AttachmentOptions& options) {
    Json object{{"version", kRecordVersion},
                {"frontend", "vhost-user"},
                {"read_only", options.read_only},
                {"queues", options.queues},
                {"block_size", options.block_size_bytes},
                {"serial", options.serial},
                {"link", options.link}};
    // Only where there are some, so that a program without limits can read the record.
    if (options.limits.any()) {
        object["limits"] = to_json(options.limits);
    }
    const std::string text = to_text(object);
    const Bytes bytes = bytes_of(std::string_view(text));
    return {bytes.begin(), bytes.end()};
}

Result<AttachmentOptions> decode_attachment(const nova::Pool::AttachmentRecord& record) {
    const std::string text(reinterpret_cast<const char*>(record.options.data()),
                           record.options.size());
    const std::string what = fmt::format("attachment record of '{}'", record.source);
    STELLARIUM_ASSIGN(const Json object, parse_json(text, what));
    return attachment_options_from_json(object, what);
}

std::string_view to_string(AttachmentState state) {
    switch (state) {
        case AttachmentState::kOffline:
            return "offline";
        case AttachmentState::kListening:
            return "listening";
        case AttachmentState::kConnected:
            return "connected";
        case AttachmentState::kFailed:
            return "failed";
    }
    std::unreachable();
}

Json to_json(const AttachmentStatus& status) {
    return Json{{"source", status.source},
                {"frontend", "vhost-user"},
                {"state", to_string(status.state)},
                {"detail", status.detail},
                {"socket", status.socket},
                {"link", status.options.link},
                {"read_only", status.options.read_only},
                {"queues", status.options.queues},
                {"block_size", status.options.block_size_bytes},
                {"serial", status.options.serial},
                {"limits", to_json(status.options.limits)}};
}

}  // namespace stellarium::control
