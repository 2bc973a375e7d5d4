// The memory that a guest shares with us: mapping it, and finding addresses in it.
//
// Every byte in it may change at any moment, and the file behind it may be cut short under us.
//
// A file that is cut short would kill this process with SIGBUS at the next access, wherever that
// is: in this frontend, in the engine, in a copy loop. So each mapping is entered in a table that a
// process-wide SIGBUS handler reads. A fault inside a mapping replaces the whole mapping by private
// zero pages and marks it lost; the interrupted instruction goes on, the owner sees lost() and
// disconnects the guest. A fault anywhere else goes to the handler that was there before. (The
// alternative, a recovery point around each copy, would have to reach into the engine.)
//
// Thread rule: SharedMapping and GuestMemory are immutable once made and may be read by any thread;
// they are kept alive by shared_ptr for as long as a request uses them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include <sys/uio.h>

#include "base/bytes.h"
#include "base/error.h"
#include "base/unique_fd.h"

namespace stellarium::vhost {

struct FaultGuardSlot;

/// Installs the SIGBUS handler; later calls do nothing.
void install_fault_guard();

/// [offset, offset + size) of a descriptor, mapped shared and writable, guarded against truncation.
class SharedMapping {
  public:
    /// The range must lie within the file. Handles offsets that are not aligned to the file's page
    /// size, huge pages included. Refuses what is not a regular file (memfd, tmpfs, hugetlbfs, disk
    /// file) and files on FUSE or a network, where a page fault may wait for someone else's process
    /// for ever. The descriptor is not kept.
    static Result<std::shared_ptr<SharedMapping>> map(int fd, uint64_t offset_bytes,
                                                      uint64_t size_bytes);
    ~SharedMapping();
    SharedMapping(const SharedMapping&) = delete;
    SharedMapping& operator=(const SharedMapping&) = delete;

    uint8_t* data() const { return data_; }
    uint64_t size_bytes() const { return size_bytes_; }
    /// True when a page of it could not be read: what it holds now is no longer the guest's.
    bool lost() const;

  private:
    SharedMapping() = default;
    uint8_t* data_ = nullptr;
    uint64_t size_bytes_ = 0;
    void* map_base_ = nullptr;
    uint64_t map_bytes_ = 0;
    FaultGuardSlot* guard_ = nullptr;
};

struct MemoryRegion {
    uint64_t guest_address = 0;
    uint64_t size_bytes = 0;
    uint64_t user_address = 0;  ///< Address in the front-end's process; rings are named by it.
    std::shared_ptr<SharedMapping> mapping;
};

/// An immutable set of regions that overlap neither in guest nor in user addresses.
class GuestMemory {
  public:
    GuestMemory() = default;

    /// The same set with one region more. kProtocol when it overlaps, is empty or wraps around,
    /// kLimitExceeded when there are too many or they are too large.
    Result<std::shared_ptr<const GuestMemory>> with(MemoryRegion region) const;
    /// The same set without the region of exactly this place. kProtocol when there is none.
    Result<std::shared_ptr<const GuestMemory>> without(uint64_t guest_address, uint64_t size_bytes,
                                                       uint64_t user_address) const;

    /// Appends the host ranges of a guest range, joined to the last element where they touch.
    /// False when any byte is outside the regions.
    bool translate(uint64_t guest_address, uint64_t length_bytes, std::vector<iovec>& out) const;
    /// Copies a guest range; false when any byte is outside the regions.
    bool copy_from(uint64_t guest_address, MutableBytes into) const;
    /// The host address of a range of user addresses inside one region; nullptr when there is none.
    uint8_t* find_user(uint64_t user_address, uint64_t length_bytes) const;

    bool lost() const;
    size_t region_count() const { return regions_.size(); }

  private:
    const MemoryRegion* find(uint64_t guest_address) const;
    std::vector<MemoryRegion> regions_;  ///< Sorted by guest address.
};

}  // namespace stellarium::vhost
