// A plan in the address space: read-only memory that others share.
//
//     STELLARIUM_ASSIGN(const Mapping mapping, Mapping::make(plan, {}));
//     read(mapping.data(), mapping.size_bytes());
//
// Mappings are private: what is made writable (mprotect) and written is a copy of this process's
// own. All ranges of a process together take at most half of the mappings that the system allows
// it.
//
// Thread rule: make() from any thread; the memory is read by any; its owner decides when it goes.
// Errors: kLimitExceeded (mappings), and those of mmap(2). A page that the disk cannot give later
// is a SIGBUS, as with every mapped file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "base/bytes.h"
#include "base/error.h"
#include "share/plan.h"

namespace stellarium::share {

struct MapOptions {
    /// Where; nullptr: anywhere. The range there is the caller's, and what it holds is replaced.
    void* address = nullptr;
    bool populate = false;  ///< Has the pages' tables filled now.
};

/// How many mappings a range may take now: `wanted`, or what is left. kLimitExceeded when that is
/// less than kLeastMappings.
Result<size_t> mappings_left(size_t wanted);

class Mapping {
  public:
    static Result<Mapping> make(const Plan& plan, const MapOptions& options);
    Mapping(Mapping&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)),
          size_bytes_(std::exchange(other.size_bytes_, 0)),
          mappings_(std::exchange(other.mappings_, 0)) {}
    Mapping& operator=(Mapping&&) = delete;
    ~Mapping();

    const std::byte* data() const { return data_; }
    uint64_t size_bytes() const { return size_bytes_; }
    size_t mappings() const { return mappings_; }  ///< Counted for it.

  private:
    Mapping(std::byte* data, uint64_t size_bytes, size_t mappings)
        : data_(data), size_bytes_(size_bytes), mappings_(mappings) {}

    std::byte* data_;
    uint64_t size_bytes_;
    size_t mappings_;
};

}  // namespace stellarium::share
