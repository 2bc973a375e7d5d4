// Walking through the scattered memory of one request.
//
// Thread rule: belongs to one thread.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include <sys/uio.h>

#include "base/bytes.h"

namespace stellarium::nova {

inline uint64_t total_bytes(std::span<const iovec> parts) {
    uint64_t total = 0;
    for (const iovec& part : parts) {
        total += part.iov_len;
    }
    return total;
}

inline iovec to_iovec(MutableBytes bytes) {
    return {.iov_base = bytes.data(), .iov_len = bytes.size()};
}

/// A position in the concatenation of some buffers, moving forward only.
class IovecCursor {
  public:
    explicit IovecCursor(std::span<const iovec> parts) : parts_(parts) {}

    uint64_t position() const { return position_; }

    void move_to(uint64_t position) {
        assert(position >= position_);
        for_each(position - position_, [](MutableBytes) {});
    }
    /// Appends the next `length` bytes, as buffers, to `out`.
    void take(uint64_t length, std::vector<iovec>& out) {
        for_each(length, [&](MutableBytes bytes) { out.push_back(to_iovec(bytes)); });
    }
    void copy_to(MutableBytes target) {
        for_each(target.size(), [&](MutableBytes bytes) {
            std::memcpy(target.data(), bytes.data(), bytes.size());
            target = target.subspan(bytes.size());
        });
    }
    void copy_from(Bytes source) {
        for_each(source.size(), [&](MutableBytes bytes) {
            std::memcpy(bytes.data(), source.data(), bytes.size());
            source = source.subspan(bytes.size());
        });
    }
    void fill_zero(uint64_t length) {
        for_each(length, [](MutableBytes bytes) { std::memset(bytes.data(), 0, bytes.size()); });
    }

  private:
    template <typename Visit>
    void for_each(uint64_t length, Visit visit) {
        position_ += length;
        while (length > 0) {
            assert(!parts_.empty());
            const size_t step = std::min<uint64_t>(length, parts_.front().iov_len - offset_);
            if (step > 0) {
                visit(
                    MutableBytes(static_cast<std::byte*>(parts_.front().iov_base) + offset_, step));
            }
            length -= step;
            offset_ += step;
            if (offset_ == parts_.front().iov_len) {
                parts_ = parts_.subspan(1);
                offset_ = 0;
            }
        }
    }

    std::span<const iovec> parts_;
    size_t offset_ = 0;  ///< Within parts_.front().
    uint64_t position_ = 0;
};

}  // namespace stellarium::nova
