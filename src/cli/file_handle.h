// A descriptor that is closed when it goes out of scope, and the loops around its system calls.
//
// The command opens what its user names with plain system calls: devices, pipes, standard input.
// The engine's own files are none of its business (they go through io/io.h).
//
// Thread rule: one thread.
#pragma once

#include <cerrno>
#include <string>
#include <utility>

#include <unistd.h>

#include "base/bytes.h"
#include "base/error.h"

namespace stellarium::cli {

class FileHandle {
  public:
    FileHandle() = default;
    explicit FileHandle(int descriptor) : descriptor_(descriptor) {}
    ~FileHandle() { reset(); }
    FileHandle(FileHandle&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
    FileHandle& operator=(FileHandle&& other) noexcept {
        if (this != &other) {
            reset();
            descriptor_ = std::exchange(other.descriptor_, -1);
        }
        return *this;
    }
    int get() const { return descriptor_; }
    int release() { return std::exchange(descriptor_, -1); }
    void reset() {
        if (descriptor_ >= 0) {
            ::close(descriptor_);
            descriptor_ = -1;
        }
    }

  private:
    int descriptor_ = -1;
};

/// Reads until `into` is full or the file ends; gives the number of bytes. `offset` < 0: from the
/// present position. kCancelled when interrupted by a signal that asks to stop.
Result<size_t> read_fully(int descriptor, MutableBytes into, int64_t offset,
                          const std::string& what);
/// Writes everything.
Result<void> write_fully(int descriptor, Bytes from, int64_t offset, const std::string& what);

}  // namespace stellarium::cli
