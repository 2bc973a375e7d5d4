// How images, volumes, snapshots and statistics look as JSON. Field names are stable.
//
// Thread rule: pure.
#pragma once

#include <array>
#include <chrono>
#include <string>
#include <string_view>
#include <vector>

#include "control/json.h"
#include "nova/pool.h"

namespace stellarium::control {

/// Bounds of an answer about damage.
inline constexpr size_t kMaxDamageUsers = 100;
inline constexpr size_t kMaxDamageRanges = 100;

std::string_view to_string(nova::EntityKind kind);
/// "2026-05-01T12:00:00Z".
std::string format_time(std::chrono::nanoseconds since_1970);
/// "6ba7b810-9dad-11d1-80b4-00c04fd430c8".
std::string format_uuid(const std::array<uint8_t, 16>& uuid);

Json to_json(const nova::EntityInfo& info);
/// The fields of the info, and what the walk found.
Json to_json(const nova::EntityDetail& detail);
Json to_json(const nova::ImageImport::Progress& progress);
Json to_json(const nova::PoolStats& stats);
Json to_json(const nova::GcReport& report);
/// Whether garbage is collected now and how far, what was collected, and what could be.
Json to_json(const nova::GcStats& stats);
Json to_json(const nova::ScrubPass& pass);
/// Whether a scrub runs and how far it is, the last pass, the schedule, what is damaged.
Json to_json(const nova::ScrubStats& stats);
/// At most kMaxDamageUsers users of a chunk, with kMaxDamageRanges ranges each; "complete" says
/// whether that is all.
Json to_json(const nova::DamageReport& report);
Json to_json(const nova::SharingReport& report);
Json to_json(const std::vector<nova::EntityInfo>& infos);

/// Bytes given to the store by imports and guests for each unique byte it keeps; 0 when it keeps
/// none.
double dedup_ratio(const nova::PoolStats& stats);

}  // namespace stellarium::control
