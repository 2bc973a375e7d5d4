// What a store is to the C interface: requests, disks and mappings, wherever the store is open.
//
//     STELLARIUM_ASSIGN(auto backend, open_own_store(directory, {}));
//     STELLARIUM_ASSIGN(auto client, backend->client());
//     client->call("POST", "/v1/clones", ...);
//
// Thread rule: any thread; clients that client() gives belong to one thread each.
// Ownership: disks and mapped ranges go before their backend.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "base/bytes.h"
#include "base/error.h"
#include "control/client.h"
#include "share/mapping.h"

namespace stellarium::capi {

/// An open image, volume or snapshot. Offsets and lengths are multiples of 512 within it.
class Disk {
  public:
    virtual ~Disk() = default;
    virtual uint64_t size_bytes() const = 0;
    virtual bool read_only() const = 0;
    virtual Result<void> read(uint64_t offset_bytes, MutableBytes into) = 0;
    virtual Result<void> write(uint64_t offset_bytes, Bytes from) = 0;
    virtual Result<void> flush() = 0;
    virtual Result<void> discard(uint64_t offset_bytes, uint64_t length_bytes) = 0;
    virtual Result<void> prefetch(uint64_t offset_bytes, uint64_t length_bytes) = 0;
};

/// A range in memory.
class MappedRange {
  public:
    MappedRange(share::Mapping mapping, uint64_t mapped_bytes, uint64_t gathered_bytes)
        : mapping_(std::move(mapping)),
          mapped_bytes_(mapped_bytes),
          gathered_bytes_(gathered_bytes) {}
    virtual ~MappedRange() = default;
    MappedRange(const MappedRange&) = delete;
    MappedRange& operator=(const MappedRange&) = delete;

    const share::Mapping& mapping() const { return mapping_; }
    uint64_t mapped_bytes() const { return mapped_bytes_; }
    uint64_t gathered_bytes() const { return gathered_bytes_; }
    /// Unmaps it. Once.
    virtual Result<void> release() {
        const share::Mapping ends(std::move(mapping_));
        return {};
    }

  private:
    share::Mapping mapping_;
    const uint64_t mapped_bytes_;
    const uint64_t gathered_bytes_;
};

struct RangeOptions {
    uint64_t offset_bytes = 0;
    uint64_t length_bytes = 0;  ///< 0: up to the end.
    size_t max_mappings = 0;
    share::MapOptions map;
};

class Backend {
  public:
    virtual ~Backend() = default;
    virtual bool through_daemon() const = 0;
    virtual Result<std::unique_ptr<control::ControlClient>> client() = 0;
    virtual Result<std::unique_ptr<Disk>> open_disk(const std::string& source, bool read_only) = 0;
    virtual Result<std::unique_ptr<MappedRange>> map(const std::string& source,
                                                     const RangeOptions& options) = 0;
    virtual Result<void> close() = 0;
};

struct OwnStoreOptions {
    bool read_only = false;
    bool collect_garbage = false;
    uint64_t dirty_bytes = 0;  ///< 0: the default.
};

Result<void> create_own_store(const std::string& directory);
/// kBusy says who holds it, and of a daemon that one connects to it.
Result<std::unique_ptr<Backend>> open_own_store(const std::string& directory,
                                                const OwnStoreOptions& options);
/// `socket`: the control socket; "": where the store's daemon listens.
Result<std::unique_ptr<Backend>> connect_daemon_store(const std::string& directory,
                                                      const std::string& socket);

/// Of the pieces of a plan, those that are not gathered.
uint64_t mapped_bytes_of(const share::Plan& plan);

}  // namespace stellarium::capi
