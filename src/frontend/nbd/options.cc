#include "frontend/nbd/options.h"

#include <algorithm>
#include <optional>

#include <fmt/format.h>

#include "frontend/nbd/limits.h"

namespace stellarium::nbd {
namespace {

/// Takes lengths and strings off a payload.
class PayloadReader {
  public:
    explicit PayloadReader(Bytes left) : left_(left) {}

    template <typename Number>
    std::optional<Number> number() {
        if (left_.size() < sizeof(Number)) {
            return std::nullopt;
        }
        const auto value = load<BigEndian<Number>>(left_).get();
        left_ = left_.subspan(sizeof(Number));
        return value;
    }
    /// A string behind its length of 32 bits.
    std::optional<std::string_view> text() {
        const auto length = number<uint32_t>();
        if (!length || *length > left_.size()) {
            return std::nullopt;
        }
        const std::string_view value(reinterpret_cast<const char*>(left_.data()), *length);
        left_ = left_.subspan(*length);
        return value;
    }
    bool at_end() const { return left_.empty(); }

  private:
    Bytes left_;
};

std::unexpected<Error> malformed(std::string_view what) {
    return fail(ErrorCode::kProtocol, fmt::format("the option is malformed: {}", what));
}

}  // namespace

Result<InfoOption> decode_info(Bytes payload) {
    PayloadReader reader(payload);
    InfoOption option;
    const auto name = reader.text();
    const auto count = name ? reader.number<uint16_t>() : std::nullopt;
    if (!count) {
        return malformed("the export's name is longer than it");
    }
    option.name = *name;
    for (unsigned i = 0; i < *count; ++i) {
        const auto info = reader.number<uint16_t>();
        if (!info) {
            return malformed("it asks for more than it names");
        }
        option.wants_name = option.wants_name || *info == kInfoName;
        option.wants_description = option.wants_description || *info == kInfoDescription;
    }
    if (!reader.at_end()) {
        return malformed("something follows what it asks for");
    }
    return option;
}

Result<MetaContextOption> decode_meta_context(Bytes payload) {
    PayloadReader reader(payload);
    MetaContextOption option;
    const auto name = reader.text();
    const auto count = name ? reader.number<uint32_t>() : std::nullopt;
    if (!count) {
        return malformed("the export's name is longer than it");
    }
    option.name = *name;
    option.empty = *count == 0;
    for (uint32_t i = 0; i < *count; ++i) {
        // Each query has its length, so the payload's end ends this soon whatever the count says.
        const auto query = reader.text();
        if (!query) {
            return malformed("a query is longer than it");
        }
        option.names_allocation = option.names_allocation || *query == kContextAllocation;
        option.asks_base = option.asks_base || *query == "base:";
    }
    if (!reader.at_end()) {
        return malformed("something follows its queries");
    }
    return option;
}

Result<void> check_export_name(std::string_view name) {
    if (name.size() > kMaxExportNameBytes) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("an export's name has at most {} bytes, this one {}",
                                kMaxExportNameBytes, name.size()));
    }
    if (name.find('\0') != std::string_view::npos) {
        return fail(ErrorCode::kInvalidArgument, "an export's name holds no NUL");
    }
    return {};
}

void append_option_reply(std::vector<std::byte>& out, uint32_t option, uint32_t type,
                         Bytes payload) {
    const OptionReplyHeader header{
        .option = option, .type = type, .length_bytes = static_cast<uint32_t>(payload.size())};
    append_bytes(out, bytes_of(header));
    append_bytes(out, payload);
}

void append_option_error(std::vector<std::byte>& out, uint32_t option, uint32_t type,
                         std::string_view message) {
    append_option_reply(out, option, type, bytes_of(message.substr(0, kMaxMessageBytes)));
}

void append_option_error(std::vector<std::byte>& out, uint32_t option, const Error& error) {
    uint32_t type = kRepErrPolicy;
    switch (error.code()) {
        case ErrorCode::kProtocol:
            type = kRepErrInvalid;
            break;
        case ErrorCode::kNotFound:
        case ErrorCode::kInvalidArgument:
            type = kRepErrUnknown;
            break;
        default:
            break;
    }
    append_option_error(out, option, type, error.message());
}

void append_info(std::vector<std::byte>& out, uint32_t option, const InfoOption& wanted,
                 const ExportInfo& info, uint16_t flags) {
    append_option_reply(out, option, kRepInfo,
                        bytes_of(InfoExport{.size_bytes = info.size_bytes, .flags = flags}));
    // Also to those who did not ask: they may send what does not fit, and then find out why.
    append_option_reply(out, option, kRepInfo,
                        bytes_of(InfoBlockSize{.minimum_bytes = kMinBlockBytes,
                                               .preferred_bytes = kPreferredBlockBytes,
                                               .maximum_bytes = kMaxTransferBytes}));
    const auto text = [&](uint16_t type, std::string_view value) {
        std::vector<std::byte> payload;
        append_bytes(payload, bytes_of(U16Be(type)));
        append_bytes(payload, bytes_of(value.substr(0, kMaxExportNameBytes)));
        append_option_reply(out, option, kRepInfo, payload);
    };
    if (wanted.wants_name) {
        text(kInfoName, wanted.name);
    }
    if (wanted.wants_description && !info.description.empty()) {
        text(kInfoDescription, info.description);
    }
    append_option_reply(out, option, kRepAck);
}

void append_server(std::vector<std::byte>& out, std::string_view name) {
    std::vector<std::byte> payload;
    append_bytes(payload, bytes_of(U32Be(static_cast<uint32_t>(name.size()))));
    append_bytes(payload, bytes_of(name));
    append_option_reply(out, kOptList, kRepServer, payload);
}

void append_meta_context(std::vector<std::byte>& out, uint32_t option, uint32_t id) {
    std::vector<std::byte> payload;
    append_bytes(payload, bytes_of(U32Be(id)));
    append_bytes(payload, bytes_of(std::string_view(kContextAllocation)));
    append_option_reply(out, option, kRepMetaContext, payload);
}

uint16_t transmission_flags(bool read_only, bool structured_replies) {
    // Several connections are coherent: all of an export share one device, and its flush covers
    // every write that was completed before, on whichever connection.
    unsigned flags =
        kFlagHasFlags | kFlagSendFlush | kFlagSendFua | kFlagCanMultiConn | kFlagSendCache;
    flags |= read_only ? kFlagReadOnly : unsigned{kFlagSendTrim | kFlagSendWriteZeroes};
    if (structured_replies) {
        flags |= kFlagSendDf;
    }
    return static_cast<uint16_t>(flags);
}

uint32_t wire_error_of(const Error& error) {
    switch (error.code()) {
        case ErrorCode::kInvalidArgument:
            return kErrInvalid;
        case ErrorCode::kNoSpace:
            return kErrNoSpace;
        case ErrorCode::kReadOnly:
        case ErrorCode::kPermissionDenied:
            return kErrPermission;
        case ErrorCode::kUnsupported:
            return kErrNotSupported;
        default:
            return kErrIo;
    }
}

}  // namespace stellarium::nbd
