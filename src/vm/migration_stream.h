// QEMU's migration stream, taken apart: pages of the guest's RAM on one side, everything else on
// the other.
//
// QEMU sends RAM in rounds, while the guest runs, and the device state at the end. What is left
// when the records of the RAM block are taken out is a valid stream of its own: QEMU demands no
// page when it loads one, and keeps what the block holds, which is then a mapping of the saved RAM.
// That works for every kind of memory backend, private mappings included, which the capability
// x-ignore-shared does not leave out (it looks at whether the block is shared). And so the dirty
// log is QEMU's own, with every accelerator.
//
//     MigrationStream stream("ram", sink);
//     STELLARIUM_TRY(stream.feed(bytes));                    // any pieces
//     STELLARIUM_ASSIGN(auto state, stream.finish());        // at the end of the stream
//
// Format: qemu/docs/devel/migration.rst, migration/savevm.c and migration/ram.c of QEMU 7.2:
// magic and version; sections with a footer; "ram" is the only section that comes in parts, and
// everything after its end is kept as it is. All integers are big-endian.
//
// Thread rule: one thread.
// Errors: kProtocol for what is no such stream, kUnsupported for sections, records or page sizes
// that this does not know, kLimitExceeded for device state above kMaxStateBytes; the sink's.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"

namespace stellarium::vm {

inline constexpr uint64_t kGuestPageBytes = 4096;
/// Device state, with small RAM blocks (firmware, ACPI tables, video memory).
inline constexpr uint64_t kMaxStateBytes = uint64_t{256} << 20;

/// Where pages go. A page may come several times; the last one counts.
class PageSink {
  public:
    virtual ~PageSink() = default;
    /// `data` is kGuestPageBytes long and valid during the call.
    virtual Result<void> page(uint64_t number, Bytes data) = 0;
    virtual Result<void> zero_page(uint64_t number) = 0;
};

class MigrationStream {
  public:
    /// `block`: the name of the RAM block whose pages go to `sink`, which outlives this.
    MigrationStream(std::string block, PageSink& sink);

    Result<void> feed(Bytes bytes);
    /// The stream without those pages. kProtocol when it is not complete.
    Result<std::vector<std::byte>> finish();

    /// Of the block; 0 until it was named.
    uint64_t block_bytes() const { return block_bytes_; }

  private:
    enum class Step : uint8_t { kHeader, kSection, kRam, kSetup, kFooter, kRest };
    class Cursor;

    Result<bool> step(Cursor& cursor);
    Result<bool> read_header(Cursor& cursor);
    Result<bool> read_section(Cursor& cursor);
    Result<bool> read_ram_record(Cursor& cursor);
    Result<bool> read_setup_block(Cursor& cursor);
    Result<bool> read_footer(Cursor& cursor);
    Result<void> keep(Bytes bytes);

    const std::string block_;
    PageSink& sink_;
    Step step_ = Step::kHeader;
    std::vector<std::byte> pending_;  ///< Of a record that is not complete.
    std::vector<std::byte> state_;
    uint32_t ram_section_ = 0;
    bool has_ram_section_ = false;
    bool ending_ = false;           ///< In the last section of "ram".
    bool current_is_ours_ = false;  ///< The last record's block, also of a section before.
    uint64_t block_bytes_ = 0;
    uint64_t setup_left_bytes_ = 0;  ///< RAM whose blocks are not named yet.
};

}  // namespace stellarium::vm
