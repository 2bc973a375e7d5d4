#include "vm/migration_stream.h"

#include <fmt/format.h>

namespace stellarium::vm {
namespace {

using Big16 = BigEndian<uint16_t>;
using Big32 = BigEndian<uint32_t>;
using Big64 = BigEndian<uint64_t>;

constexpr uint32_t kMagic = 0x5145564d;  // "QEVM"
constexpr uint32_t kVersion = 3;

// Types of sections.
constexpr uint8_t kSectionStart = 0x01;
constexpr uint8_t kSectionPart = 0x02;
constexpr uint8_t kSectionEnd = 0x03;
constexpr uint8_t kConfiguration = 0x07;
constexpr uint8_t kSectionFooter = 0x7e;

constexpr uint32_t kRamVersion = 4;

// Flags of a record in "ram", in the low bits of an offset.
constexpr uint64_t kFlagZero = 0x02;
constexpr uint64_t kFlagSize = 0x04;
constexpr uint64_t kFlagPage = 0x08;
constexpr uint64_t kFlagEnd = 0x10;
constexpr uint64_t kFlagContinue = 0x20;
constexpr uint64_t kFlagMask = kGuestPageBytes - 1;

}  // namespace

/// Reads from the front of what has come. Each get() is false when it is not there yet; then the
/// whole record is read again with more.
class MigrationStream::Cursor {
  public:
    explicit Cursor(Bytes bytes) : bytes_(bytes) {}

    template <typename Packed, typename Native>
    bool get(Native& value) {
        Packed packed;
        if (bytes_.size() - at_ < sizeof packed) {
            return false;
        }
        std::memcpy(&packed, bytes_.data() + at_, sizeof packed);
        value = packed.get();
        at_ += sizeof packed;
        return true;
    }
    bool get(size_t length, Bytes& bytes) {
        if (bytes_.size() - at_ < length) {
            return false;
        }
        bytes = bytes_.subspan(at_, length);
        at_ += length;
        return true;
    }
    /// A length byte, then so many characters.
    bool get_name(std::string_view& name) {
        uint8_t length = 0;
        Bytes bytes;
        if (!get<U8>(length) || !get(length, bytes)) {
            return false;
        }
        name = {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
        return true;
    }
    bool get_all(Bytes& bytes) { return get(bytes_.size() - at_, bytes) && !bytes.empty(); }

    /// What was read since the last accept().
    Bytes accept() {
        const Bytes record = bytes_.subspan(accepted_, at_ - accepted_);
        accepted_ = at_;
        return record;
    }
    Bytes rest() const { return bytes_.subspan(accepted_); }

  private:
    Bytes bytes_;
    size_t at_ = 0;
    size_t accepted_ = 0;
};

MigrationStream::MigrationStream(std::string block, PageSink& sink)
    : block_(std::move(block)), sink_(sink) {}

Result<void> MigrationStream::keep(Bytes bytes) {
    if (state_.size() + bytes.size() > kMaxStateBytes) {
        return fail(ErrorCode::kLimitExceeded,
                    fmt::format("the device state is above {} MiB", kMaxStateBytes >> 20));
    }
    state_.insert(state_.end(), bytes.begin(), bytes.end());
    return {};
}

Result<void> MigrationStream::feed(Bytes bytes) {
    // A record that was cut in two is completed first, with as little copying as that needs.
    if (!pending_.empty()) {
        constexpr size_t kRecordBytes = 2 * kGuestPageBytes;  // Longer than any of "ram".
        while (!pending_.empty() && !bytes.empty()) {
            const Bytes piece = bytes.first(std::min(bytes.size(), kRecordBytes));
            pending_.insert(pending_.end(), piece.begin(), piece.end());
            Cursor cursor(pending_);
            while (true) {
                STELLARIUM_ASSIGN(const bool complete, step(cursor));
                if (!complete) {
                    break;
                }
            }
            const size_t left = cursor.rest().size();
            if (left <= piece.size()) {
                // What is left lies in `bytes` as well: go on there.
                bytes = bytes.subspan(piece.size() - left);
                pending_.clear();
                break;
            }
            pending_.erase(pending_.begin(), pending_.end() - static_cast<std::ptrdiff_t>(left));
            bytes = bytes.subspan(piece.size());
        }
        if (bytes.empty()) {
            return {};
        }
    }
    Cursor cursor(bytes);
    while (true) {
        STELLARIUM_ASSIGN(const bool complete, step(cursor));
        if (!complete) {
            break;
        }
    }
    const Bytes rest = cursor.rest();
    pending_.assign(rest.begin(), rest.end());
    return {};
}

/// Reads one record; false when it is not complete yet.
Result<bool> MigrationStream::step(Cursor& cursor) {
    switch (step_) {
        case Step::kHeader:
            return read_header(cursor);
        case Step::kSection:
            return read_section(cursor);
        case Step::kSetup:
            return read_setup_block(cursor);
        case Step::kRam:
            return read_ram_record(cursor);
        case Step::kFooter:
            return read_footer(cursor);
        case Step::kRest: {
            Bytes all;
            if (!cursor.get_all(all)) {
                return false;
            }
            STELLARIUM_TRY(keep(cursor.accept()));
            return true;
        }
    }
    return false;
}

Result<bool> MigrationStream::read_header(Cursor& cursor) {
    uint32_t magic = 0;
    uint32_t version = 0;
    if (!cursor.get<Big32>(magic) || !cursor.get<Big32>(version)) {
        return false;
    }
    if (magic != kMagic) {
        return fail(ErrorCode::kProtocol, "this is no migration stream of QEMU");
    }
    if (version != kVersion) {
        return fail(ErrorCode::kUnsupported,
                    fmt::format("a migration stream of version {}, not {}", version, kVersion));
    }
    STELLARIUM_TRY(keep(cursor.accept()));
    step_ = Step::kSection;
    return true;
}

Result<bool> MigrationStream::read_section(Cursor& cursor) {
    uint8_t type = 0;
    if (!cursor.get<U8>(type)) {
        return false;
    }
    if (type == kConfiguration) {
        // The machine's name. Its subsections are those of capabilities that are not used here.
        uint32_t length = 0;
        Bytes name;
        if (!cursor.get<Big32>(length)) {
            return false;
        }
        if (length > kFlagMask) {
            return fail(ErrorCode::kProtocol, "the machine's name in the stream has no end");
        }
        if (!cursor.get(length, name)) {
            return false;
        }
        STELLARIUM_TRY(keep(cursor.accept()));
        return true;
    }
    uint32_t section = 0;
    if (type != kSectionStart && type != kSectionPart && type != kSectionEnd) {
        return fail(ErrorCode::kUnsupported,
                    fmt::format("the migration stream has a section of type {} before the end of "
                                "its RAM",
                                type));
    }
    if (!cursor.get<Big32>(section)) {
        return false;
    }
    if (type == kSectionStart) {
        std::string_view name;
        uint32_t instance = 0;
        uint32_t version = 0;
        if (!cursor.get_name(name) || !cursor.get<Big32>(instance) || !cursor.get<Big32>(version)) {
            return false;
        }
        if (name != "ram" || version != kRamVersion || has_ram_section_) {
            return fail(ErrorCode::kUnsupported,
                        fmt::format("the migration stream has a section '{}' of version {}, and "
                                    "only one 'ram' of version {} is understood",
                                    name, version, kRamVersion));
        }
        has_ram_section_ = true;
        ram_section_ = section;
    } else if (!has_ram_section_ || section != ram_section_) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("the migration stream goes on with section {}, which never began",
                                section));
    }
    ending_ = type == kSectionEnd;
    STELLARIUM_TRY(keep(cursor.accept()));
    step_ = Step::kRam;
    return true;
}

Result<bool> MigrationStream::read_setup_block(Cursor& cursor) {
    std::string_view name;
    uint64_t length = 0;
    if (!cursor.get_name(name) || !cursor.get<Big64>(length)) {
        return false;
    }
    if (length > setup_left_bytes_) {
        return fail(ErrorCode::kProtocol, "the RAM blocks of the stream are longer than its RAM");
    }
    if (name == block_) {
        if (length % kGuestPageBytes != 0) {
            return fail(ErrorCode::kUnsupported,
                        fmt::format("RAM of {} bytes, not whole pages", length));
        }
        block_bytes_ = length;
    }
    setup_left_bytes_ -= length;
    STELLARIUM_TRY(keep(cursor.accept()));
    if (setup_left_bytes_ == 0) {
        if (block_bytes_ == 0) {
            return fail(ErrorCode::kUnsupported,
                        fmt::format("the stream has no RAM block '{}'", block_));
        }
        step_ = Step::kRam;
    }
    return true;
}

Result<bool> MigrationStream::read_ram_record(Cursor& cursor) {
    uint64_t word = 0;
    if (!cursor.get<Big64>(word)) {
        return false;
    }
    const uint64_t offset = word & ~kFlagMask;
    const uint64_t flags = word & kFlagMask;
    switch (flags) {
        case kFlagEnd:
            STELLARIUM_TRY(keep(cursor.accept()));
            step_ = Step::kFooter;
            return true;
        case kFlagSize:
            if (offset == 0 || block_bytes_ != 0) {
                return fail(ErrorCode::kProtocol, "the stream names its RAM blocks twice");
            }
            setup_left_bytes_ = offset;
            STELLARIUM_TRY(keep(cursor.accept()));
            step_ = Step::kSetup;
            return true;
        case kFlagZero:
        case kFlagZero | kFlagContinue:
        case kFlagPage:
        case kFlagPage | kFlagContinue:
            break;
        default:
            return fail(ErrorCode::kUnsupported,
                        fmt::format("a RAM record with flags {:#x} in the stream", flags));
    }
    bool ours = current_is_ours_;
    if ((flags & kFlagContinue) == 0) {
        std::string_view name;
        if (!cursor.get_name(name)) {
            return false;
        }
        ours = name == block_;
    }
    const bool zero = (flags & kFlagZero) != 0;
    Bytes data;
    if (!cursor.get(zero ? 1 : kGuestPageBytes, data)) {
        return false;
    }
    if (zero && data[0] != std::byte{0}) {
        return fail(ErrorCode::kUnsupported, "a page of equal bytes that are not zero");
    }
    current_is_ours_ = ours;
    const Bytes record = cursor.accept();
    if (!ours) {
        STELLARIUM_TRY(keep(record));
        return true;
    }
    if (offset >= block_bytes_) {
        return fail(ErrorCode::kProtocol,
                    fmt::format("a page at {} of RAM that has {} bytes", offset, block_bytes_));
    }
    STELLARIUM_TRY(zero ? sink_.zero_page(offset / kGuestPageBytes)
                        : sink_.page(offset / kGuestPageBytes, data));
    return true;
}

Result<bool> MigrationStream::read_footer(Cursor& cursor) {
    uint8_t type = 0;
    uint32_t section = 0;
    if (!cursor.get<U8>(type) || !cursor.get<Big32>(section)) {
        return false;
    }
    if (type != kSectionFooter || section != ram_section_) {
        return fail(ErrorCode::kProtocol, "a section of the stream does not end as it should");
    }
    STELLARIUM_TRY(keep(cursor.accept()));
    step_ = ending_ ? Step::kRest : Step::kSection;
    return true;
}

Result<std::vector<std::byte>> MigrationStream::finish() {
    if (step_ != Step::kRest || !pending_.empty()) {
        return fail(ErrorCode::kProtocol, "the migration stream ends before the guest's RAM does");
    }
    return std::move(state_);
}

}  // namespace stellarium::vm
