// The handshake's messages: options of the client decoded, answers encoded. Pure functions.
//
//     STELLARIUM_ASSIGN(const InfoOption wanted, decode_info(payload));
//     append_info(out, kOptGo, wanted, name, info, flags);
//
// Errors: kProtocol for a payload whose lengths do not fit, with what is wrong.
// Thread rule: any thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "frontend/nbd/export.h"
#include "frontend/nbd/protocol.h"

namespace stellarium::nbd {

/// Payload of NBD_OPT_INFO and NBD_OPT_GO.
struct InfoOption {
    std::string name;
    bool wants_name = false;
    bool wants_description = false;
};
Result<InfoOption> decode_info(Bytes payload);

/// Payload of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
struct MetaContextOption {
    std::string name;
    bool names_allocation = false;  ///< One of the queries is "base:allocation".
    bool asks_base = false;         ///< ... or "base:", which lists all of that name space.
    bool empty = true;              ///< No queries at all.
};
Result<MetaContextOption> decode_meta_context(Bytes payload);

/// kInvalidArgument when an export's name is longer than proto.md allows, or holds a NUL.
Result<void> check_export_name(std::string_view name);

void append_option_reply(std::vector<std::byte>& out, uint32_t option, uint32_t type,
                         Bytes payload = {});
/// `message` is cut at kMaxMessageBytes.
void append_option_error(std::vector<std::byte>& out, uint32_t option, uint32_t type,
                         std::string_view message);
/// The error reply that an Error makes: unknown export, or refused.
void append_option_error(std::vector<std::byte>& out, uint32_t option, const Error& error);
/// Everything that NBD_OPT_INFO and NBD_OPT_GO are answered with, up to the ACK.
void append_info(std::vector<std::byte>& out, uint32_t option, const InfoOption& wanted,
                 const ExportInfo& info, uint16_t flags);
void append_server(std::vector<std::byte>& out, std::string_view name);
void append_meta_context(std::vector<std::byte>& out, uint32_t option, uint32_t id);

uint16_t transmission_flags(bool read_only, bool structured_replies);

/// The error field of a reply.
uint32_t wire_error_of(const Error& error);

}  // namespace stellarium::nbd
