// Option haggling: from the greeting to the transmission phase.
#include <utility>

#include <fmt/format.h>

#include "frontend/nbd/connection.h"
#include "frontend/nbd/elsewhere.h"

namespace stellarium::nbd {

namespace {
constexpr std::string_view kNoName =
    "choose an export by its name: an image, a volume, or a snapshot VOLUME@SNAPSHOT; nbdinfo "
    "--list 'nbd+unix:///?socket=PATH' lists them all";
}  // namespace

/// Takes one message of the client; false when it is not there yet, or another one is under way.
bool Connection::next_option() {
    if (option_under_way_) {
        blocked_ = true;
        return false;
    }
    if (skip_bytes_ > 0) {
        const size_t skipped = std::min<uint64_t>(skip_bytes_, available().size());
        consume(skipped);
        skip_bytes_ -= skipped;
        return skip_bytes_ == 0;
    }
    if (!out_.empty() && phase_ == Phase::kOptions) {
        // One answer at a time: a client that takes none is not given more.
        blocked_ = true;
        return false;
    }
    if (list_after_) {
        std::string after = *std::move(list_after_);
        list_after_.reset();
        list(std::move(after));
        blocked_ = true;
        return false;
    }
    if (phase_ == Phase::kGreeting) {
        if (available().size() < sizeof(U32Be)) {
            return false;
        }
        const uint32_t flags = load<U32Be>(available());
        consume(sizeof(U32Be));
        if ((flags & ~uint32_t{kHandshakeFixedNewstyle | kHandshakeNoZeroes}) != 0) {
            fault(fmt::format("unknown handshake flags {:#x}", flags));
            return false;
        }
        fixed_newstyle_ = (flags & kHandshakeFixedNewstyle) != 0;
        no_zeroes_ = (flags & kHandshakeNoZeroes) != 0;
        phase_ = Phase::kOptions;
        return true;
    }
    if (available().size() < sizeof(OptionHeader)) {
        return false;
    }
    const auto header = load<OptionHeader>(available());
    const uint32_t length = header.length_bytes;
    if (header.magic != kOptionMagic) {
        fault("an option without its magic number");
        return false;
    }
    if (!fixed_newstyle_ && header.option != kOptExportName) {
        fault("options of the fixed newstyle handshake, which it did not choose");
        return false;
    }
    if (length > kMaxOptionBytes) {
        if (length > kMaxSkippedOptionBytes || header.option == kOptExportName) {
            fault(fmt::format("an option of {} bytes", length));
            return false;
        }
        consume(sizeof(OptionHeader));
        skip_bytes_ = length;
        refuse(header.option, kRepErrTooBig,
               fmt::format("options have at most {} bytes here", kMaxOptionBytes));
        return true;
    }
    if (available().size() < sizeof(OptionHeader) + length) {
        return false;
    }
    const Bytes payload = available().subspan(sizeof(OptionHeader), length);
    consume(sizeof(OptionHeader) + length);
    option(header.option, payload);  // Nothing is read before it returns.
    return !closed_;
}

void Connection::answer(const std::vector<std::byte>& bytes) {
    option_since_ = Clock::now();
    push(bytes, false);
}

void Connection::refuse(uint32_t option, uint32_t type, std::string_view message) {
    std::vector<std::byte> out;
    append_option_error(out, option, type, message);
    answer(out);
}

void Connection::option(uint32_t option, Bytes payload) {
    std::vector<std::byte> out;
    switch (option) {
        case kOptExportName:
            return export_name(payload);
        case kOptAbort:
            append_option_reply(out, option, kRepAck);
            answer(out);
            draining_ = true;
            stop_at_ = Clock::now() + kDrainTimeout;
            return;
        case kOptList:
            if (!payload.empty()) {
                return refuse(option, kRepErrInvalid, "NBD_OPT_LIST has no data");
            }
            return list("");
        case kOptStartTls:
            return refuse(option, kRepErrPolicy,
                          "no TLS here: who may open the unix socket may use it");
        case kOptInfo:
        case kOptGo:
            return info_or_go(option, payload);
        case kOptStructuredReply:
            if (!payload.empty() || structured_) {
                return refuse(option, kRepErrInvalid,
                              structured_ ? "structured replies were chosen already"
                                          : "NBD_OPT_STRUCTURED_REPLY has no data");
            }
            structured_ = true;
            append_option_reply(out, option, kRepAck);
            return answer(out);
        case kOptListMetaContext:
        case kOptSetMetaContext:
            return meta_context(option, payload);
        default:
            return refuse(option, kRepErrUnsupported,
                          fmt::format("option {} is not known here", option));
    }
}

/// A page of the list; the next one is fetched when the client has taken this one.
void Connection::list(std::string after) {
    option_under_way_ = true;
    do_elsewhere(
        shared_.control, control_turns_,
        [this, after = std::move(after)] { return shared_.source.list(after, kListPage); },
        [this](const Result<std::vector<std::string>>& names) {
            option_under_way_ = false;
            std::vector<std::byte> out;
            if (!names) {
                append_option_error(out, kOptList, names.error());
                return answer(out);
            }
            for (const std::string& name : *names) {
                append_server(out, name);
            }
            if (names->size() < kListPage) {
                append_option_reply(out, kOptList, kRepAck);
                return answer(out);
            }
            answer(out);
            list_after_ = names->back();
        });
}

void Connection::info_or_go(uint32_t option, Bytes payload) {
    std::vector<std::byte> out;
    Result<InfoOption> wanted = decode_info(payload);
    if (!wanted) {
        append_option_error(out, option, wanted.error());
        return answer(out);
    }
    if (const Result<void> usable = check_export_name(wanted->name); !usable) {
        append_option_error(out, option, usable.error());
        return answer(out);
    }
    if (wanted->name.empty()) {
        return refuse(option, kRepErrUnknown, kNoName);
    }
    struct Found {
        ExportInfo info;
        std::shared_ptr<Export> opened;
    };
    option_under_way_ = true;
    const bool open = option == kOptGo;
    const std::string name = wanted->name;
    do_elsewhere(
        shared_.control, control_turns_,
        [this, name, open]() -> Result<Found> {
            Found found;
            STELLARIUM_ASSIGN(found.info, shared_.source.find(name));
            if (open) {
                STELLARIUM_ASSIGN(found.opened, shared_.source.open(name));
                found.info.size_bytes = found.opened->device().size_bytes();
                found.info.read_only = found.opened->device().read_only();
            }
            return found;
        },
        [this, option, wanted = *std::move(wanted)](Result<Found> found) {
            option_under_way_ = false;
            std::vector<std::byte> reply;
            if (!found) {
                append_option_error(reply, option, found.error());
                return answer(reply);
            }
            append_info(reply, option, wanted, found->info,
                        transmission_flags(found->info.read_only, structured_));
            answer(reply);
            if (found->opened) {
                enter(std::move(found->opened), wanted.name);
            }
        });
}

void Connection::export_name(Bytes payload) {
    const std::string name(reinterpret_cast<const char*>(payload.data()), payload.size());
    // This option has no way to refuse but to hang up.
    if (name.empty() || !check_export_name(name)) {
        return fault("it asked for no export");
    }
    option_under_way_ = true;
    do_elsewhere(
        shared_.control, control_turns_, [this, name] { return shared_.source.open(name); },
        [this, name](Result<std::shared_ptr<Export>> opened) {
            option_under_way_ = false;
            if (!opened) {
                return fault(opened.error().message());
            }
            BlockDevice& device = (*opened)->device();
            std::vector<std::byte> out;
            append_bytes(out, bytes_of(ExportNameReply{
                                  .size_bytes = device.size_bytes(),
                                  .flags = transmission_flags(device.read_only(), structured_)}));
            if (!no_zeroes_) {
                out.resize(out.size() + kExportNameZeroes);
            }
            answer(out);
            enter(*std::move(opened), name);
        });
}

void Connection::meta_context(uint32_t option, Bytes payload) {
    if (option == kOptSetMetaContext) {
        context_export_.reset();  // Also when this fails: proto.md.
    }
    if (!structured_) {
        return refuse(option, kRepErrInvalid, "choose structured replies first");
    }
    std::vector<std::byte> out;
    Result<MetaContextOption> wanted = decode_meta_context(payload);
    if (wanted) {
        if (const Result<void> usable = check_export_name(wanted->name); !usable) {
            wanted = std::unexpected(usable.error());
        }
    }
    if (!wanted) {
        append_option_error(out, option, wanted.error());
        return answer(out);
    }
    if (wanted->name.empty()) {
        return refuse(option, kRepErrUnknown, kNoName);
    }
    option_under_way_ = true;
    const std::string name = wanted->name;
    do_elsewhere(
        shared_.control, control_turns_, [this, name] { return shared_.source.find(name); },
        [this, option, wanted = *std::move(wanted)](const Result<ExportInfo>& found) {
            option_under_way_ = false;
            std::vector<std::byte> reply;
            if (!found) {
                append_option_error(reply, option, found.error());
                return answer(reply);
            }
            const bool set = option == kOptSetMetaContext;
            if (wanted.names_allocation || (!set && (wanted.asks_base || wanted.empty))) {
                append_meta_context(reply, option, set ? kContextAllocationId : 0);
                if (set) {
                    context_export_ = wanted.name;
                }
            }
            append_option_reply(reply, option, kRepAck);
            answer(reply);
        });
}

void Connection::enter(std::shared_ptr<Export> opened, std::string name) {
    has_context_ = context_export_ == name;
    name_ = std::move(name);
    export_ = std::move(opened);
    read_only_ = export_->device().read_only();
    phase_ = Phase::kTransmission;
}

}  // namespace stellarium::nbd
