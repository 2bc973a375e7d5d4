// How boot manifests, recordings and prefetches look as JSON. Field names are stable.
//
// Thread rule: pure.
#pragma once

#include "boot/boot.h"
#include "control/json.h"

namespace stellarium::control {

/// Without the runs.
Json to_json(const boot::ManifestEntry& entry);
/// With them.
Json to_json(const boot::ManifestView& view);
Json to_json(const boot::RecordingStatus& status);
Json to_json(const boot::StageReport& report);
/// What is staged now, and what was.
Json to_json(const boot::BootStats& stats);

}  // namespace stellarium::control
