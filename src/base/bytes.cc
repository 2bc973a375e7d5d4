#include "base/bytes.h"

namespace stellarium {

bool all_zero(Bytes bytes) {
    // The overlap trick: a buffer is all zero when its head is zero and it equals itself shifted by
    // that head. memcmp runs at memory speed and stops at the first difference.
    constexpr size_t kHead = 16;
    for (size_t i = 0; i < bytes.size() && i < kHead; ++i) {
        if (bytes[i] != std::byte{0}) {
            return false;
        }
    }
    return bytes.size() <= kHead ||
           std::memcmp(bytes.data(), bytes.data() + kHead, bytes.size() - kHead) == 0;
}

}  // namespace stellarium
