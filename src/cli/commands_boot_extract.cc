// Takes kernel and initrd out of an image's own /boot.
//
// The daemon opens no file for this and runs nothing: the image comes out as a sparse stream into a
// file of ours, which debugfs (e2fsprogs) looks into, reading only; what it finds goes back in as
// images of their own.
#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <sstream>
#include <system_error>

#include <fmt/format.h>

#include "cli/commands_common.h"
#include "cli/export_target.h"
#include "cli/import_source.h"
#include "cli/interrupt.h"
#include "cli/process.h"
#include "cli/progress.h"
#include "nova/limits.h"

namespace stellarium::cli {

using control::Json;

namespace {

/// Where kernels lie: in the root file system, and in a partition of their own for /boot.
constexpr std::string_view kFolders[] = {"/boot", "/"};

/// A folder that goes with what is in it.
class TemporaryFolder {
  public:
    static Result<std::unique_ptr<TemporaryFolder>> make() {
        const char* const parent = std::getenv("TMPDIR");
        std::string pattern = fmt::format("{}/stellarctl-XXXXXX",
                                          parent != nullptr && *parent != 0 ? parent : "/tmp");
        if (mkdtemp(pattern.data()) == nullptr) {
            return std::unexpected(Error::from_errno(errno, "make a folder " + pattern));
        }
        return std::make_unique<TemporaryFolder>(pattern);
    }
    explicit TemporaryFolder(std::string path) : path_(std::move(path)) {}
    ~TemporaryFolder() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    TemporaryFolder(const TemporaryFolder&) = delete;
    TemporaryFolder& operator=(const TemporaryFolder&) = delete;
    std::string file(std::string_view name) const { return fmt::format("{}/{}", path_, name); }

  private:
    std::string path_;
};

/// A kernel and what goes with it, as paths in a file system that begins at `offset_bytes`.
struct Found {
    uint64_t offset_bytes = 0;
    std::string kernel;
    std::string initrd;  ///< "": there is none of its version.
};

/// Words of a name: digits are compared as numbers, so that 6.1.0-9 comes before 6.1.0-10.
bool is_older(std::string_view a, std::string_view b) {
    const auto digits = [](std::string_view text) {
        return std::min(text.find_first_not_of("0123456789"), text.size());
    };
    const auto number = [](std::string_view text) {
        uint64_t value = 0;
        std::from_chars(text.begin(), text.end(), value);
        return value;
    };
    while (!a.empty() && !b.empty()) {
        const size_t a_digits = digits(a);
        const size_t b_digits = digits(b);
        if (a_digits > 0 && b_digits > 0) {
            const uint64_t left = number(a.substr(0, a_digits));
            const uint64_t right = number(b.substr(0, b_digits));
            if (left != right) {
                return left < right;
            }
            a.remove_prefix(a_digits);
            b.remove_prefix(b_digits);
        } else if (a.front() != b.front()) {
            return a.front() < b.front();
        } else {
            a.remove_prefix(1);
            b.remove_prefix(1);
        }
    }
    return a.size() < b.size();
}

/// A file system in a file, as debugfs takes it.
std::string device_of(const std::string& disk, uint64_t offset_bytes) {
    return offset_bytes == 0 ? disk : fmt::format("{}?offset={}", disk, offset_bytes);
}

/// debugfs takes a command as text: names that would need quotes are passed over.
bool is_plain(std::string_view name) {
    return name.find_first_not_of(
               "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
               "._+~-") == std::string_view::npos;
}

/// Plain files of a folder; none where there is no such file system or folder.
Result<std::vector<std::string>> files_of(const std::string& device, std::string_view folder) {
    const Result<std::string> listed =
        run_tool({"debugfs", "-R", fmt::format("ls -p {}", folder), device}, "e2fsprogs", {0, 1});
    if (!listed) {
        if (listed.error().code() == ErrorCode::kInvalidArgument) {
            return std::vector<std::string>{};
        }
        return std::unexpected(listed.error());
    }
    // "/inode/mode/user/group/name/size/", with an octal mode: 10.... is a file.
    std::vector<std::string> names;
    std::istringstream lines(*listed);
    for (std::string line; std::getline(lines, line);) {
        std::vector<std::string> fields;
        std::istringstream stream(line);
        for (std::string field; std::getline(stream, field, '/');) {
            fields.push_back(field);
        }
        if (fields.size() >= 6 && fields[2].size() == 6 && fields[2].starts_with("10") &&
            is_plain(fields[5])) {
            names.push_back(fields[5]);
        }
    }
    return names;
}

/// Bytes at which file systems may begin: the whole disk, and its partitions.
Result<std::vector<uint64_t>> file_system_offsets(const std::string& disk) {
    std::vector<uint64_t> offsets{0};
    const Result<std::string> table = run_tool(
        {"partx", "--show", "--noheadings", "--output", "START", disk}, "util-linux", {0, 1});
    if (!table && table.error().code() != ErrorCode::kInvalidArgument) {
        return std::unexpected(table.error());
    }
    std::istringstream words(table.value_or(std::string()));
    for (uint64_t start = 0; words >> start;) {
        offsets.push_back(start * nova::kSectorBytes);
    }
    return offsets;
}

/// The newest kernel of the first file system that has one.
Result<std::optional<Found>> find_kernel(const std::string& disk) {
    STELLARIUM_ASSIGN(const std::vector<uint64_t> offsets, file_system_offsets(disk));
    for (const uint64_t offset : offsets) {
        for (const std::string_view folder : kFolders) {
            STELLARIUM_TRY(check_interrupt());
            STELLARIUM_ASSIGN(const std::vector<std::string> names,
                              files_of(device_of(disk, offset), folder));
            constexpr std::string_view kKernel = "vmlinuz-";
            std::string version;
            for (const std::string& name : names) {
                if (name.starts_with(kKernel) &&
                    (version.empty() || is_older(version, name.substr(kKernel.size())))) {
                    version = name.substr(kKernel.size());
                }
            }
            if (version.empty()) {
                continue;
            }
            const std::string prefix = folder == "/" ? "/" : std::string(folder) + "/";
            Found found{.offset_bytes = offset,
                        .kernel = fmt::format("{}{}{}", prefix, kKernel, version),
                        .initrd = {}};
            for (const std::string& initrd :
                 {"initrd.img-" + version, "initramfs-" + version + ".img", "initrd-" + version,
                  "initramfs-" + version}) {
                if (found.initrd.empty() && std::ranges::find(names, initrd) != names.end()) {
                    found.initrd = prefix + initrd;
                }
            }
            return found;
        }
    }
    return std::nullopt;
}

/// Takes a file out of the file system and makes an image of it.
Result<Json> import_file(Context& context, const std::string& device, const std::string& path,
                         const std::string& out, const std::string& image) {
    STELLARIUM_TRY(
        run_tool({"debugfs", "-R", fmt::format("dump {} {}", path, out), device}, "e2fsprogs"));
    std::error_code error;
    if (std::filesystem::file_size(out, error) == 0 || error) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("{} cannot be read from the image, or is empty", path));
    }
    STELLARIUM_ASSIGN(const ImportSource source,
                      open_import_source(out, {.format = ImageFormat::kRaw}));
    STELLARIUM_ASSIGN(control::ControlClient* const client, context.client());
    return client->upload(target_of("/v1/images/", image), *source.content);
}

Result<void> check_free(Context& context, const std::string& image) {
    const Result<Json> taken = ask(context, "GET", target_of("/v1/images/", image));
    if (taken) {
        return fail(ErrorCode::kAlreadyExists,
                    fmt::format("there is an image '{0}' already: 'stellarctl boot set' uses it, "
                                "'stellarctl image rm {0}' removes it",
                                image));
    }
    return taken.error().code() == ErrorCode::kNotFound ? Result<void>()
                                                        : std::unexpected(taken.error());
}

}  // namespace

Result<void> boot_extract(Context& context, const Arguments& arguments) {
    const std::string& name = arguments.name;
    const std::string kernel_image = name + ".vmlinuz";
    const std::string initrd_image = name + ".initrd";
    STELLARIUM_ASSIGN(const Json info, ask(context, "GET", target_of("/v1/images/", name)));
    STELLARIUM_TRY(check_free(context, kernel_image));
    STELLARIUM_TRY(check_free(context, initrd_image));
    for (const auto& [tool, package] :
         {std::pair("debugfs", "e2fsprogs"), std::pair("partx", "util-linux")}) {
        if (!tool_exists(tool)) {
            return std::unexpected(missing_tool(tool, package));
        }
    }
    STELLARIUM_ASSIGN(const auto folder, TemporaryFolder::make());
    const std::string disk = folder->file("disk");
    {
        STELLARIUM_ASSIGN(
            const auto target,
            ExportTarget::open(disk, {.size_bytes = number_field(info, "size_bytes"),
                                      .data_bytes = number_field(info, "data_bytes")}));
        STELLARIUM_ASSIGN(control::ControlClient* const client, context.client());
        STELLARIUM_ASSIGN(const std::unique_ptr<control::SparseSource> content,
                          client->download(target_of("/v1/content?source=", name)));
        Progress progress("looking into " + name, context.progress());
        ProgressSource watched(*content, progress);
        STELLARIUM_TRY(target->write_all(watched));
        progress.finish();
    }
    STELLARIUM_ASSIGN(const std::optional<Found> found, find_kernel(disk));
    if (!found) {
        return fail(
            ErrorCode::kNotFound,
            fmt::format("no vmlinuz-* lies in /boot of an ext2, ext3 or ext4 file system of "
                        "'{0}': import the kernel as an image, and 'stellarctl boot set {0} "
                        "--kernel IMAGE'",
                        name));
    }
    const std::string device = device_of(disk, found->offset_bytes);
    Json request = Json::object();
    STELLARIUM_TRY(
        import_file(context, device, found->kernel, folder->file("kernel"), kernel_image));
    request["kernel"] = kernel_image;
    if (!found->initrd.empty()) {
        STELLARIUM_TRY(
            import_file(context, device, found->initrd, folder->file("initrd"), initrd_image));
        request["initrd"] = initrd_image;
    }
    STELLARIUM_ASSIGN(const Json boot, ask(context, "PUT", target_of("/v1/boots/", name), request));
    print_done(context, boot,
               fmt::format("took {}{} out of '{}': images {}{}", found->kernel,
                           found->initrd.empty() ? "" : " and " + found->initrd, name, kernel_image,
                           found->initrd.empty() ? "" : " and " + initrd_image));
    return {};
}

}  // namespace stellarium::cli
