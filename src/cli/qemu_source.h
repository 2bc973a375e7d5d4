// A disk image read through qemu-nbd and libnbd. See import_source.h.
//
// Thread rule: one thread.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "base/error.h"
#include "cli/import_source.h"
#include "control/sparse_stream.h"

namespace stellarium::cli {

/// Opens the image at `path`, which has the format `format`.
Result<std::unique_ptr<control::SparseSource>> open_qemu_source(const std::string& path,
                                                                ImageFormat format,
                                                                bool allow_backing);

/// Looks at what `qemu-img info --output=json` said about the image at `path`: kInvalidArgument
/// naming the other file when the image refers to one, kUnsupported when it is encrypted.
Result<void> check_image_info(std::string_view info_json, const std::string& path,
                              bool allow_backing);

}  // namespace stellarium::cli
