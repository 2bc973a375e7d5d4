// Waiting for a flush, where a caller may wait.
//
// Thread rule: any thread, but none that completes flushes.
#pragma once

#include <future>
#include <memory>
#include <utility>

#include "base/block_device.h"
#include "base/error.h"

namespace stellarium {

/// Returns when everything that completed before is durable, or with what prevented it.
inline Result<void> flush_device(BlockDevice& device) {
    const auto done = std::make_shared<std::promise<Result<void>>>();
    device.flush_async([done](Result<void> result) { done->set_value(std::move(result)); });
    return done->get_future().get();
}

}  // namespace stellarium
