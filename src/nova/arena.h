// The dirty arena: acknowledged guest writes that the log does not hold yet, in memory that
// outlives the process.
//
// One file, mapped shared, in a directory on a memory file system; or private memory. The file is
// locked while it is in use, and all of it is allocated before it has its name. It holds slots of
// one page. A write fills fresh slots and publishes each by its header, checksum last, so
// a slot is there wholly or not at all; then the older slot of the same page is freed. After the
// death of the process the next one adopts the slots in sequence order. A discard within a leaf
// takes one slot, whose data is a bitmap of the pages it still covers. Format:
// docs/formats/arena.md.
//
// Which slot is a page's present one is the business of DirtyMap (volume.h); this class hands out
// slots and writes headers.
//
//     arena.reserve(volume_dirty_pages, 1, slots);           // false: too full for this volume
//     std::memcpy(arena.data(slots[0]).data(), page, kPageBytes);
//     arena.publish_page(slots[0], volume, page, checksum);   // under the page's lock
//     arena.retire(old_slot); arena.release(old_slot);
//
// The budget is shared by dynamic thresholds (Choudhury and Hahne, "Dynamic queue length thresholds
// for shared-memory packet switches", 1998): a volume may hold as many slots as are free. So one
// volume takes half of the memory at most, and there is always room for the next.
//
// Thread rule: any function from any thread; calls for one slot are ordered by its user.
// Durability: none against power loss, by design (docs/internals/crash-model.md).
// Errors: those of io; kCorrupt is never given: what is not valid is not adopted.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "io/io.h"
#include "nova/format.h"
#include "nova/limits.h"

namespace stellarium::nova {

using Slot = uint32_t;
inline constexpr Slot kNoSlot = ~Slot{0};

using Identity = std::array<uint8_t, 16>;

/// The boot id of this system; zeros when it has none. Errors: it is there and cannot be read.
Result<Identity> boot_identity(io::FileSystem& files);

/// Whose an arena is: the store's uuid, and the file that its superblock is in. A copy of the store
/// has the same uuid and another file, and must not take what belongs to the original.
struct ArenaOwner {
    Identity store{};
    io::FileIdentity superblock;
};

class Arena {
  public:
    /// Private memory for `budget_bytes` of pages.
    static std::unique_ptr<Arena> make_private(uint64_t budget_bytes);
    /// Makes a new file at `path`, replacing what was there, with all its memory allocated, so that
    /// no store into it can fail. `identity` names this arena in the log, `previous` the one that
    /// the log names until it does. kNoSpace names the directory and what to do.
    static Result<std::unique_ptr<Arena>> make_file(const io::Env& env, const std::string& path,
                                                    uint64_t budget_bytes, const ArenaOwner& owner,
                                                    const Identity& identity,
                                                    const Identity& previous);
    /// Opens the arena of `owner` at `path` as the last process left it: the one that the log names
    /// (`named`), or one that replaced it and that the log does not name yet. nullptr, with a
    /// sentence in `why`, when there is none of this boot: then nothing can be adopted. kBusy: it
    /// is in use.
    static Result<std::unique_ptr<Arena>> open_file(const io::Env& env, const std::string& path,
                                                    const ArenaOwner& owner, const Identity& named,
                                                    std::string& why);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    uint32_t slot_count() const { return slot_count_; }
    uint64_t budget_bytes() const { return uint64_t{slot_count_} * kPageBytes; }
    const std::string& path() const { return path_; }  ///< Empty: private memory.
    /// What names it in the log; zeros: private memory.
    const Identity& identity() const { return identity_; }

    /// Appends `count` slots to `out` when the volume, which holds `held` now, may have them.
    bool reserve(uint64_t held, uint32_t count, std::vector<Slot>& out);
    /// The same, as soon as it is possible; gives up, and returns false, when `give_up` says so.
    /// It is asked whenever slots were released or wake() was called.
    bool reserve_waiting(const std::function<uint64_t()>& held, uint32_t count,
                         std::vector<Slot>& out, const std::function<bool()>& give_up);
    /// Makes waiting reservations ask again.
    void wake();
    /// Gives slots back. They must not be published.
    void release(std::span<const Slot> slots);
    void release(Slot slot) { release(std::span(&slot, 1)); }
    uint64_t free_slots() const { return free_count_.load(std::memory_order_relaxed); }
    uint64_t used_bytes() const { return (slot_count_ - free_slots()) * kPageBytes; }

    /// The memory of a slot.
    MutableBytes data(Slot slot) {
        return memory_.subspan(data_offset_ + uint64_t{slot} * kPageBytes, kPageBytes);
    }
    Bytes data(Slot slot) const {
        return memory_.subspan(data_offset_ + uint64_t{slot} * kPageBytes, kPageBytes);
    }

    /// Makes the slot valid: its data is page `page` of the volume. `data_checksum`: checksum64 of
    /// its data. Callers order publications of one page by a lock.
    void publish_page(Slot slot, uint64_t volume, uint64_t page, uint64_t data_checksum);
    /// Makes the slot valid: the pages of the leaf at `leaf_page` whose bit is set are zeros.
    void publish_zeros(Slot slot, uint64_t volume, uint64_t leaf_page,
                       std::span<const uint64_t> bits);
    /// The published slot of zeros covers these pages as well.
    void cover(Slot slot, std::span<const uint64_t> bits);
    /// The slot of zeros no longer covers this page of the leaf.
    void uncover(Slot slot, uint32_t page_in_leaf);
    /// Makes the slot invalid; its memory stays as it is until release().
    void retire(Slot slot);

    /// A valid slot that the last process left.
    struct Found {
        Slot slot = kNoSlot;
        format::ArenaSlotKind kind = format::ArenaSlotKind::kPage;
        uint64_t volume = 0;
        uint64_t page = 0;
        uint64_t sequence = 0;
    };
    /// All valid slots in sequence order; they are not free from now on. Invalid ones are wiped and
    /// free. Call once after open_file, before anything else.
    std::vector<Found> adopt();
    bool covers(Slot slot, uint32_t page_in_leaf) const;

    /// Removes the file: nothing in it is needed any more.
    Result<void> remove_file();

  private:
    Arena() = default;
    void lay_out(MutableBytes memory, uint32_t slot_count);
    bool may_take(uint64_t held, uint32_t count) const;
    void take(uint32_t count, std::vector<Slot>& out);
    std::byte* header(Slot slot) {
        return memory_.data() + kPageBytes + uint64_t{slot} * sizeof(format::ArenaSlot);
    }
    void publish(Slot slot, format::ArenaSlot header);

    io::FileSystem* files_ = nullptr;
    std::string path_;
    Identity identity_{};
    std::unique_ptr<io::File> file_;
    std::unique_ptr<std::byte, void (*)(void*)> private_memory_{nullptr, nullptr};
    MutableBytes memory_;
    uint32_t slot_count_ = 0;
    uint64_t data_offset_ = 0;
    std::atomic<uint64_t> next_sequence_{1};

    std::mutex mutex_;
    std::condition_variable released_;
    std::vector<Slot> free_;  ///< Guarded by mutex_; the last is taken first, to stay warm.
    std::atomic<uint64_t> free_count_{0};
    uint64_t waiting_ = 0;  ///< Guarded by mutex_.
};

}  // namespace stellarium::nova
