#include "control/entity_json.h"

#include <array>
#include <chrono>
#include <cmath>
#include <string_view>
#include <utility>

#include <fmt/chrono.h>
#include <fmt/format.h>

namespace stellarium::control {

std::string_view to_string(nova::EntityKind kind) {
    switch (kind) {
        case nova::EntityKind::kImage:
            return "image";
        case nova::EntityKind::kVolume:
            return "volume";
        case nova::EntityKind::kSnapshot:
            return "snapshot";
    }
    std::unreachable();
}

std::string format_time(std::chrono::nanoseconds since_1970) {
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(since_1970).count();
    std::tm parts{};
    const auto time = static_cast<std::time_t>(seconds);
    if (gmtime_r(&time, &parts) == nullptr) {
        return "?";
    }
    return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", parts);
}

std::string format_uuid(const std::array<uint8_t, 16>& uuid) {
    std::string text;
    for (size_t i = 0; i < uuid.size(); ++i) {
        if (i == 4 || i == 6 || i == 8 || i == 10) {
            text += '-';
        }
        text += fmt::format("{:02x}", uuid[i]);
    }
    return text;
}

Json to_json(const nova::EntityInfo& info) {
    Json json{{"kind", to_string(info.kind)},
              {"id", info.id},
              {"name", info.name},
              {"size_bytes", info.size_bytes},
              {"parent", info.parent},
              {"parent_removed", info.parent_removed},
              {"created", format_time(info.created)},
              {"attached", info.attached},
              {"attachment", info.attachment},
              {"dirty_bytes", info.dirty_bytes},
              {"snapshots", info.snapshots},
              {"shareable", info.shareable},
              {"damage", info.damage}};
    return json;
}

Json to_json(const nova::EntityDetail& detail) {
    Json json = to_json(detail.info);
    json["data_bytes"] = detail.data_bytes;
    json["extents"] = detail.extents;
    json["root"] = detail.root.hex();
    json["lineage"] = detail.lineage;
    return json;
}

Json to_json(const nova::ImageImport::Progress& progress) {
    return Json{{"bytes", progress.bytes},
                {"new_bytes", progress.new_bytes},
                {"duplicate_bytes", progress.duplicate_bytes},
                {"zero_bytes", progress.zero_bytes}};
}

double dedup_ratio(const nova::PoolStats& stats) {
    if (stats.store.unique_bytes == 0) {
        return 0;
    }
    const double ratio = static_cast<double>(stats.imported_bytes + stats.written_bytes) /
                         static_cast<double>(stats.store.unique_bytes);
    return std::round(ratio * 10'000) / 10'000;
}

Json to_json(const nova::PoolStats& stats) {
    return Json{{"logical_bytes", stats.logical_bytes},
                {"unique_bytes", stats.store.unique_bytes},
                {"stored_bytes", stats.store.stored_bytes},
                {"reclaimable_bytes", stats.gc.reclaimable_bytes},
                {"appended_bytes", stats.store.appended_bytes},
                {"dedup_ratio", dedup_ratio(stats)},
                {"chunks", stats.store.chunks},
                {"index_bytes", stats.store.index_bytes},
                {"volumes", stats.volumes},
                {"images", stats.images},
                {"snapshots", stats.snapshots},
                {"attachments", stats.attachments},
                {"imported_bytes", stats.imported_bytes},
                {"written_bytes", stats.written_bytes},
                {"duplicate_bytes", stats.store.duplicate_bytes},
                {"dirty_bytes", stats.dirty_bytes},
                {"delta_extents", stats.delta_extents},
                {"node_cache_bytes", stats.node_cache_bytes},
                {"segments", stats.store.segments},
                {"sequence", stats.store.sequence},
                {"durable_sequence", stats.store.durable_sequence},
                {"index_misses_recovered", stats.store.index_misses_recovered},
                {"chunks_verified", stats.store.chunks_verified},
                {"collections", stats.gc.collections},
                {"collected_bytes", stats.gc.freed_bytes},
                {"file_system_bytes", stats.space.total_bytes},
                {"file_system_free_bytes", stats.space.free_bytes},
                {"space_low", stats.space_low},
                {"disk_full", stats.store.disk_full},
                {"reserve_bytes", stats.store.reserve_bytes},
                {"damaged_chunks", stats.scrub.damaged_chunks},
                {"scrubs", stats.scrub.passes},
                {"scrubbed_bytes", stats.scrub.checked_bytes}};
}

Json to_json(const nova::GcReport& report) {
    return Json{{"live_bytes", report.live_bytes},
                {"live_chunks", report.live_chunks},
                {"dead_bytes", report.dead_bytes},
                {"dead_chunks", report.dead_chunks},
                {"freed_bytes", report.freed_bytes},
                {"moved_bytes", report.moved_bytes},
                {"rewritten_bytes", report.rewritten_bytes},
                {"segments_freed", report.segments_freed},
                {"duration_ms", report.duration / std::chrono::milliseconds(1)}};
}

Json to_json(const nova::GcStats& stats) {
    static constexpr std::array<std::string_view, 3> kPhases = {"mark", "free", "rewrite"};
    Json json{{"running", stats.running},
              {"phase", nullptr},
              {"done", stats.progress.done},
              {"total", stats.progress.total},
              {"collections", stats.collections},
              {"failures", stats.failures},
              {"freed_bytes", stats.freed_bytes},
              {"reclaimable_bytes", stats.reclaimable_bytes},
              {"last", nullptr},
              {"last_ended", nullptr},
              {"last_error", stats.last_error}};
    if (stats.running) {
        json["phase"] = kPhases.at(static_cast<size_t>(stats.progress.phase));
    }
    if (stats.last) {
        json["last"] = to_json(*stats.last);
        json["last_ended"] = format_time(stats.last_ended);
    }
    return json;
}

Json to_json(const nova::ScrubPass& pass) {
    Json json{{"started", format_time(pass.started)},
              {"ended", nullptr},
              {"bytes", pass.bytes},
              {"chunks", pass.entries},
              {"damaged", pass.damaged}};
    if (pass.ended.count() != 0) {
        json["ended"] = format_time(pass.ended);
    }
    return json;
}

Json to_json(const nova::ScrubStats& stats) {
    return Json{{"running", stats.running},
                {"present", stats.present ? to_json(*stats.present) : Json(nullptr)},
                {"total_bytes", stats.total_bytes},
                {"last", stats.last ? to_json(*stats.last) : Json(nullptr)},
                {"checked_bytes", stats.checked_bytes},
                {"passes", stats.passes},
                {"damaged_chunks", stats.damaged_chunks},
                {"next_due",
                 stats.next_due.count() != 0 ? Json(format_time(stats.next_due)) : Json(nullptr)},
                {"last_error", stats.last_error}};
}

Json to_json(const nova::DamageReport& report) {
    Json damaged = Json::array();
    bool complete = report.listed.size() >= report.chunks;
    for (const nova::ChunkDamage& each : report.listed) {
        Json users = Json::array();
        for (const nova::ChunkUser& user : each.users) {
            if (users.size() == kMaxDamageUsers) {
                complete = false;
                break;
            }
            Json ranges = Json::array();
            uint64_t bytes = 0;
            complete = complete && user.bad.complete && user.bad.ranges.size() <= kMaxDamageRanges;
            for (const nova::BadRange& range : user.bad.ranges) {
                bytes += range.length_bytes;
                if (ranges.size() < kMaxDamageRanges) {
                    ranges.push_back(Json{{"offset_bytes", range.offset_bytes},
                                          {"length_bytes", range.length_bytes}});
                }
            }
            users.push_back(Json{{"kind", user.kind ? to_string(*user.kind) : "catalog"},
                                 {"name", user.name},
                                 {"bytes", bytes},
                                 {"ranges", std::move(ranges)}});
        }
        damaged.push_back(Json{{"id", each.chunk.id.hex()},
                               {"file", each.chunk.file},
                               {"offset_bytes", each.chunk.offset_bytes},
                               {"reason", each.chunk.reason},
                               {"users", std::move(users)}});
    }
    return Json{
        {"damaged_chunks", report.chunks}, {"complete", complete}, {"damaged", std::move(damaged)}};
}

Json to_json(const nova::SharingReport& report) {
    Json entities = Json::array();
    for (const nova::Sharing& each : report.entities) {
        entities.push_back(Json{{"kind", to_string(each.kind)},
                                {"name", each.name},
                                {"stored_bytes", each.stored_bytes},
                                {"resident_bytes", each.resident_bytes},
                                {"shared_bytes", each.shared_bytes},
                                {"private_bytes", each.private_bytes}});
    }
    return Json{{"resident_bytes", report.resident_bytes},
                {"complete", report.complete},
                {"entities", std::move(entities)}};
}

Json to_json(const std::vector<nova::EntityInfo>& infos) {
    Json array = Json::array();
    for (const nova::EntityInfo& info : infos) {
        array.push_back(to_json(info));
    }
    return array;
}

}  // namespace stellarium::control
