// Where an image comes from: a raw file, a block device, a pipe, or a disk image of another
// program.
//
// The format is found by content, never by name. What is compressed or an archive is refused,
// unless the format was named: an image of the compressed bytes is of use to nobody, and nobody
// would see. Raw files keep their holes (SEEK_DATA). Other formats are read by qemu-nbd, which
// knows them best, through libnbd: block status tells holes without reading them, so a 64 TiB qcow2
// with little in it is quick.
//
// A disk image may name other files (a backing file, an external data file, extents). Whoever made
// the image chose them, so they are refused unless allow_backing: otherwise a guest that writes a
// qcow2 header into its raw disk could have any file of this machine imported.
//
//     STELLARIUM_ASSIGN(auto source, open_import_source("disk.qcow2", {}));
//
// Errors: kNotFound, kPermissionDenied, kInvalidArgument (damaged, backing refused), kBusy when the
// file changes while it is read, kUnavailable when a tool is not installed (its package is named).
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "base/bytes.h"
#include "base/error.h"
#include "control/sparse_stream.h"

namespace stellarium::cli {

enum class ImageFormat : uint8_t { kRaw, kQcow2, kVmdk, kVhdx, kVdi, kVpc };

/// The name that qemu gives it: "raw", "qcow2", "vmdk", "vhdx", "vdi", "vpc".
std::string_view format_name(ImageFormat format);
std::optional<ImageFormat> format_from_name(std::string_view name);

/// By magic numbers in the first kDetectBytes bytes (fewer when the file is shorter).
ImageFormat detect_format(Bytes head);
inline constexpr size_t kDetectBytes = 1024;

/// Content that is no disk, and the command that makes one of it.
struct ForeignContent {
    std::string_view what;     ///< "compressed with xz".
    std::string_view through;  ///< "xz -dc": what to pipe it through.
    std::string_view from;     ///< The same for a file, before its name: "tar -xOf".
};
/// By magic numbers in the first kDetectBytes bytes.
std::optional<ForeignContent> detect_foreign(Bytes head);

struct ImportSourceOptions {
    std::optional<ImageFormat> format;  ///< nullopt: by content.
    bool allow_backing = false;
    bool allow_empty = false;  ///< A pipe that ends at once; a command before it has mostly failed.
};

struct ImportSource {
    std::unique_ptr<control::SparseSource> content;
    ImageFormat format = ImageFormat::kRaw;
};

/// `path` "-" reads raw bytes from standard input. What a pipe gives is looked at when it comes, in
/// next().
Result<ImportSource> open_import_source(const std::string& path,
                                        const ImportSourceOptions& options);

/// True when all bytes are zero.
bool all_zero(Bytes bytes);

}  // namespace stellarium::cli
