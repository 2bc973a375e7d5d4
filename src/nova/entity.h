// The kinds of named things in a pool, and the rule for their names.
//
// Thread rule: values and pure functions.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/error.h"

namespace stellarium::nova {

/// Images and volumes share one name space; a snapshot's name is its volume's own.
enum class EntityKind : uint8_t { kImage, kVolume, kSnapshot };

/// kInvalidArgument with the rule when `name` is not [A-Za-z0-9._-]{1,128}, or is "." or "..".
Result<void> check_name(std::string_view name);

/// "image", "volume", "snapshot".
std::string_view kind_name(EntityKind kind);

}  // namespace stellarium::nova
