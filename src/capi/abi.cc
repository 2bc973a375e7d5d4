#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <stellarium.h>

#include "capi/backend.h"
#include "control/json.h"
#include "control/service.h"
#include "nova/limits.h"
#include "share/limits.h"

using stellarium::Bytes;
using stellarium::Error;
using stellarium::error_mapping;
using stellarium::ErrorCode;
using stellarium::fail;
using stellarium::kErrorCodeCount;
using stellarium::MutableBytes;
using stellarium::Result;
using stellarium::capi::Backend;
using stellarium::capi::Disk;
using stellarium::capi::MappedRange;
using stellarium::control::Json;
using stellarium::control::percent_encode;

// Named as C knows them.
// NOLINTBEGIN(readability-identifier-naming)
struct stellarium_store {
    std::unique_ptr<Backend> backend;
};
struct stellarium_volume {
    std::unique_ptr<Disk> disk;
};
struct stellarium_mapping {
    std::unique_ptr<MappedRange> range;
};
// NOLINTEND(readability-identifier-naming)

namespace {

constexpr uint64_t kSectorBytes = 512;

std::string& last_error() {
    thread_local std::string text;
    return text;
}

int failed(const Error& error) noexcept {
    try {
        last_error() = error.message();
    } catch (...) {
        last_error().clear();
    }
    return error_mapping(error.code()).c_abi_value;
}

/// Runs `work`, which gives a Result<void>; whatever it throws is an error here.
template <typename Work>
int guarded(Work&& work) noexcept {
    try {
        const Result<void> done = std::forward<Work>(work)();
        return done ? STELLARIUM_OK : failed(done.error());
    } catch (const std::bad_alloc&) {
        return failed({ErrorCode::kLimitExceeded, "out of memory"});
    } catch (const std::exception& thrown) {
        return failed({ErrorCode::kIo, thrown.what()});
    } catch (...) {
        return failed({ErrorCode::kIo, "an unknown failure"});
    }
}

std::unexpected<Error> is_null(const char* what) {
    return fail(ErrorCode::kInvalidArgument, fmt::format("{} is NULL", what));
}

Result<std::string> text_of(const char* text, const char* what) {
    if (text == nullptr) {
        return is_null(what);
    }
    return std::string(text);
}

/// What the caller filled, in the layout of this library. See the header about sizes.
template <typename Options>
Result<Options> options_of(const Options* given) {
    Options options{};
    options.size = sizeof(Options);
    if (given == nullptr) {
        return options;
    }
    if (given->size < sizeof(given->size)) {
        return fail(ErrorCode::kInvalidArgument, "the options do not say their size");
    }
    const auto* const bytes = reinterpret_cast<const unsigned char*>(given);
    for (size_t i = sizeof(Options); i < given->size; ++i) {
        if (bytes[i] != 0) {
            return fail(ErrorCode::kUnsupported,
                        fmt::format("the options use a field at offset {} that this version of the "
                                    "library does not have",
                                    i));
        }
    }
    std::memcpy(&options, given, std::min(given->size, sizeof(Options)));
    options.size = sizeof(Options);
    return options;
}

/// Gives the caller as much of `from` as it knows, and says how much that is.
template <typename Info>
Result<void> give(Info from, Info* to) {
    if (to == nullptr) {
        return is_null("info");
    }
    if (to->size < sizeof(to->size)) {
        return fail(ErrorCode::kInvalidArgument, "the info does not say its size");
    }
    from.size = std::min(to->size, sizeof(Info));
    std::memcpy(to, &from, from.size);
    return {};
}

Result<Json> ask(const stellarium_store& store, std::string_view method, std::string target,
                 const Json* body = nullptr) {
    STELLARIUM_ASSIGN(const auto client, store.backend->client());
    return body == nullptr ? client->call(method, std::move(target))
                           : client->call(method, std::move(target), *body);
}

static_assert(sizeof(stellarium_info::name) > 2 * stellarium::nova::kMaxNameBytes + 1);

stellarium_info info_of(const Json& entity) {
    stellarium_info info{};
    info.size = sizeof info;
    const std::string kind = entity.value("kind", std::string());
    info.kind = kind == "image"    ? STELLARIUM_KIND_IMAGE
                : kind == "volume" ? STELLARIUM_KIND_VOLUME
                                   : STELLARIUM_KIND_SNAPSHOT;
    info.attached = entity.value("attached", false) ? 1 : 0;
    info.shareable = entity.value("shareable", false) ? 1 : 0;
    info.damaged = entity.value("damage", std::string()).empty() ? 0 : 1;
    info.id = entity.value("id", uint64_t{0});
    info.size_bytes = entity.value("size_bytes", uint64_t{0});
    const std::string name = entity.value("name", std::string());
    name.copy(info.name, sizeof info.name - 1);
    const std::string parent = entity.value("parent", std::string());
    parent.copy(info.parent, sizeof info.parent - 1);
    return info;
}

/// Where a snapshot "VOLUME@SNAPSHOT" is; "" for what is none.
std::string snapshot_target(const std::string& name) {
    const size_t at = name.find('@');
    return at == std::string::npos ? std::string()
                                   : "/v1/volumes/" + percent_encode(name.substr(0, at)) +
                                         "/snapshots/" + percent_encode(name.substr(at + 1));
}

/// Does to an image or volume of that name, whichever it is, or to a snapshot.
Result<Json> on_any(const stellarium_store& store, std::string_view method,
                    const std::string& name) {
    if (const std::string snapshot = snapshot_target(name); !snapshot.empty()) {
        return ask(store, method, snapshot);
    }
    const std::string encoded = percent_encode(name);
    auto volume = ask(store, method, "/v1/volumes/" + encoded);
    if (volume || volume.error().code() != ErrorCode::kNotFound) {
        return volume;
    }
    auto image = ask(store, method, "/v1/images/" + encoded);
    if (!image && image.error().code() == ErrorCode::kNotFound) {
        return fail(ErrorCode::kNotFound,
                    fmt::format("there is no image or volume named '{}'", name));
    }
    return image;
}

Result<void> check_range(const Disk& disk, uint64_t offset_bytes, uint64_t length_bytes) {
    const uint64_t size = disk.size_bytes();
    if (offset_bytes % kSectorBytes != 0 || length_bytes % kSectorBytes != 0 ||
        offset_bytes > size || length_bytes > size - offset_bytes) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("{} bytes at offset {} are not whole sectors of {} within the {} "
                                "bytes of the volume",
                                length_bytes, offset_bytes, kSectorBytes, size));
    }
    return {};
}

Result<void> check_writable(const Disk& disk) {
    return disk.read_only() ? fail(ErrorCode::kReadOnly, "the volume is open for reading only")
                            : Result<void>();
}

/// Opens with `open` and gives the caller a handle, or NULL.
template <typename Handle, typename Open>
int open_handle(Handle** handle, const char* what, Open open) {
    return guarded([&]() -> Result<void> {
        if (handle == nullptr) {
            return is_null(what);
        }
        *handle = nullptr;
        STELLARIUM_ASSIGN(auto opened, open());
        *handle = new Handle{std::move(opened)};
        return {};
    });
}

const stellarium::ErrorMapping* mapping_of(int code) {
    for (int i = 0; i < kErrorCodeCount; ++i) {
        const stellarium::ErrorMapping& mapping = error_mapping(static_cast<ErrorCode>(i));
        if (mapping.c_abi_value == code) {
            return &mapping;
        }
    }
    return nullptr;
}

}  // namespace

// ---- About the library and errors ---------------------------------------------------------------

const char* stellarium_version() {
    return STELLARIUM_VERSION;
}

uint32_t stellarium_abi_version() {
    return STELLARIUM_ABI_VERSION;
}

const char* stellarium_last_error() {
    return last_error().c_str();
}

// The table's texts are literals, which end in a zero byte.
const char* stellarium_error_name(int code) {
    const auto* const mapping = mapping_of(code);
    return code == STELLARIUM_OK ? "ok" : mapping == nullptr ? "unknown" : mapping->name.data();
}

const char* stellarium_error_advice(int code) {
    const auto* const mapping = mapping_of(code);
    return mapping == nullptr ? "" : mapping->advice.data();
}

// ---- Stores -------------------------------------------------------------------------------------

int stellarium_create_store(const char* directory) {
    return guarded([&]() -> Result<void> {
        STELLARIUM_ASSIGN(const std::string path, text_of(directory, "the directory"));
        return stellarium::capi::create_own_store(path);
    });
}

int stellarium_open(const char* directory, const stellarium_store_options* options,
                    stellarium_store** store) {
    return open_handle(store, "store", [&]() -> Result<std::unique_ptr<Backend>> {
        STELLARIUM_ASSIGN(const std::string path, text_of(directory, "the directory"));
        STELLARIUM_ASSIGN(const auto given, options_of(options));
        return stellarium::capi::open_own_store(path,
                                                {.read_only = given.read_only != 0,
                                                 .collect_garbage = given.collect_garbage != 0,
                                                 .dirty_bytes = given.dirty_bytes});
    });
}

int stellarium_connect(const char* directory, const stellarium_store_options* options,
                       stellarium_store** store) {
    return open_handle(store, "store", [&]() -> Result<std::unique_ptr<Backend>> {
        STELLARIUM_ASSIGN(const auto given, options_of(options));
        const std::string socket = given.socket == nullptr ? "" : given.socket;
        if (directory == nullptr && socket.empty()) {
            return is_null("the directory, and no socket is given either,");
        }
        return stellarium::capi::connect_daemon_store(directory == nullptr ? "" : directory,
                                                      socket);
    });
}

int stellarium_close(stellarium_store* store) {
    return guarded([&]() -> Result<void> {
        const std::unique_ptr<stellarium_store> gone(store);
        return gone ? gone->backend->close() : Result<void>();
    });
}

int stellarium_through_daemon(const stellarium_store* store) {
    return store != nullptr && store->backend->through_daemon() ? 1 : 0;
}

// ---- Images, volumes, snapshots -----------------------------------------------------------------

int stellarium_volume_create(stellarium_store* store, const char* name, uint64_t size_bytes) {
    return guarded([&]() -> Result<void> {
        STELLARIUM_ASSIGN(const std::string volume, text_of(name, "the name"));
        if (store == nullptr) {
            return is_null("store");
        }
        const Json body{{"name", volume}, {"size_bytes", size_bytes}};
        STELLARIUM_TRY(ask(*store, "POST", "/v1/volumes", &body));
        return {};
    });
}

int stellarium_clone(stellarium_store* store, const char* source, const char* const* names,
                     size_t count) {
    return guarded([&]() -> Result<void> {
        STELLARIUM_ASSIGN(const std::string from, text_of(source, "the source"));
        if (store == nullptr || names == nullptr) {
            return is_null("store or names");
        }
        std::vector<std::string> wanted;
        wanted.reserve(std::min(count, stellarium::nova::kMaxClonesPerCall));
        for (size_t i = 0; i < count; ++i) {
            STELLARIUM_ASSIGN(wanted.emplace_back(), text_of(names[i], "a name"));
        }
        const Json body{{"source", from}, {"names", wanted}};
        STELLARIUM_TRY(ask(*store, "POST", "/v1/clones", &body));
        return {};
    });
}

int stellarium_snapshot(stellarium_store* store, const char* volume, const char* snapshot) {
    return guarded([&]() -> Result<void> {
        STELLARIUM_ASSIGN(const std::string of, text_of(volume, "the volume"));
        STELLARIUM_ASSIGN(const std::string name, text_of(snapshot, "the snapshot"));
        if (store == nullptr) {
            return is_null("store");
        }
        const Json body{{"name", name}};
        STELLARIUM_TRY(
            ask(*store, "POST", "/v1/volumes/" + percent_encode(of) + "/snapshots", &body));
        return {};
    });
}

int stellarium_remove(stellarium_store* store, const char* name) {
    return guarded([&]() -> Result<void> {
        STELLARIUM_ASSIGN(const std::string what, text_of(name, "the name"));
        if (store == nullptr) {
            return is_null("store");
        }
        STELLARIUM_TRY(on_any(*store, "DELETE", what));
        return {};
    });
}

int stellarium_set_shareable(stellarium_store* store, const char* image, int shareable) {
    return guarded([&]() -> Result<void> {
        STELLARIUM_ASSIGN(const std::string name, text_of(image, "the image"));
        if (store == nullptr) {
            return is_null("store");
        }
        const Json body{{"shareable", shareable != 0}};
        STELLARIUM_TRY(
            ask(*store, "PUT", "/v1/images/" + percent_encode(name) + "/sharing", &body));
        return {};
    });
}

int stellarium_get_info(stellarium_store* store, const char* name, stellarium_info* info) {
    return guarded([&]() -> Result<void> {
        STELLARIUM_ASSIGN(const std::string what, text_of(name, "the name"));
        if (store == nullptr) {
            return is_null("store");
        }
        STELLARIUM_ASSIGN(const Json entity, on_any(*store, "GET", what));
        return give(info_of(entity), info);
    });
}

int stellarium_list(stellarium_store* store, uint32_t kinds,
                    int (*visit)(void* user, const stellarium_info* info), void* user) {
    return guarded([&]() -> Result<void> {
        if (store == nullptr || visit == nullptr) {
            return is_null("store or visit");
        }
        const std::array<std::pair<uint32_t, const char*>, 3> lists{
            {{STELLARIUM_KIND_IMAGE, "/v1/images"},
             {STELLARIUM_KIND_VOLUME, "/v1/volumes"},
             {STELLARIUM_KIND_SNAPSHOT, "/v1/snapshots"}}};
        for (const auto& [kind, target] : lists) {
            if ((kinds & kind) == 0) {
                continue;
            }
            STELLARIUM_ASSIGN(const Json entities, ask(*store, "GET", target));
            for (const Json& entity : entities) {
                const stellarium_info info = info_of(entity);
                if (visit(user, &info) != 0) {
                    return {};
                }
            }
        }
        return {};
    });
}

// ---- Reading and writing ------------------------------------------------------------------------

int stellarium_volume_open(stellarium_store* store, const char* name,
                           const stellarium_volume_options* options, stellarium_volume** volume) {
    return open_handle(volume, "volume", [&]() -> Result<std::unique_ptr<Disk>> {
        STELLARIUM_ASSIGN(const std::string source, text_of(name, "the name"));
        STELLARIUM_ASSIGN(const auto given, options_of(options));
        if (store == nullptr) {
            return is_null("store");
        }
        return store->backend->open_disk(source, given.read_only != 0);
    });
}

int stellarium_volume_close(stellarium_volume* volume) {
    return guarded([&]() -> Result<void> {
        const std::unique_ptr<stellarium_volume> gone(volume);
        return gone && !gone->disk->read_only() ? gone->disk->flush() : Result<void>();
    });
}

uint64_t stellarium_volume_size(const stellarium_volume* volume) {
    return volume == nullptr ? 0 : volume->disk->size_bytes();
}

int stellarium_volume_read_only(const stellarium_volume* volume) {
    return volume != nullptr && volume->disk->read_only() ? 1 : 0;
}

int stellarium_read(stellarium_volume* volume, uint64_t offset_bytes, void* buffer,
                    uint64_t length_bytes) {
    return guarded([&]() -> Result<void> {
        if (volume == nullptr || (buffer == nullptr && length_bytes > 0)) {
            return is_null("volume or buffer");
        }
        STELLARIUM_TRY(check_range(*volume->disk, offset_bytes, length_bytes));
        return volume->disk->read(offset_bytes,
                                  MutableBytes(static_cast<std::byte*>(buffer), length_bytes));
    });
}

int stellarium_write(stellarium_volume* volume, uint64_t offset_bytes, const void* buffer,
                     uint64_t length_bytes) {
    return guarded([&]() -> Result<void> {
        if (volume == nullptr || (buffer == nullptr && length_bytes > 0)) {
            return is_null("volume or buffer");
        }
        STELLARIUM_TRY(check_writable(*volume->disk));
        STELLARIUM_TRY(check_range(*volume->disk, offset_bytes, length_bytes));
        return volume->disk->write(offset_bytes,
                                   Bytes(static_cast<const std::byte*>(buffer), length_bytes));
    });
}

int stellarium_flush(stellarium_volume* volume) {
    return guarded([&]() -> Result<void> {
        if (volume == nullptr) {
            return is_null("volume");
        }
        return volume->disk->flush();
    });
}

int stellarium_discard(stellarium_volume* volume, uint64_t offset_bytes, uint64_t length_bytes) {
    return guarded([&]() -> Result<void> {
        if (volume == nullptr) {
            return is_null("volume");
        }
        STELLARIUM_TRY(check_writable(*volume->disk));
        STELLARIUM_TRY(check_range(*volume->disk, offset_bytes, length_bytes));
        return volume->disk->discard(offset_bytes, length_bytes);
    });
}

int stellarium_prefetch(stellarium_volume* volume, uint64_t offset_bytes, uint64_t length_bytes) {
    return guarded([&]() -> Result<void> {
        if (volume == nullptr) {
            return is_null("volume");
        }
        const uint64_t size = volume->disk->size_bytes();
        const uint64_t length =
            length_bytes == 0 && offset_bytes < size ? size - offset_bytes : length_bytes;
        STELLARIUM_TRY(check_range(*volume->disk, offset_bytes, length));
        return volume->disk->prefetch(offset_bytes, length);
    });
}

// ---- Mapping ------------------------------------------------------------------------------------

int stellarium_map(stellarium_store* store, const char* name, const stellarium_map_options* options,
                   stellarium_mapping** mapping) {
    return open_handle(mapping, "mapping", [&]() -> Result<std::unique_ptr<MappedRange>> {
        STELLARIUM_ASSIGN(const std::string source, text_of(name, "the name"));
        STELLARIUM_ASSIGN(const auto given, options_of(options));
        if (store == nullptr) {
            return is_null("store");
        }
        if ((given.flags & ~uint32_t{STELLARIUM_MAP_POPULATE}) != 0) {
            return fail(ErrorCode::kUnsupported,
                        "the map options have flags that this version of "
                        "the library does not know");
        }
        const size_t mappings =
            given.max_mappings == 0 ? stellarium::share::kDefaultMappings : given.max_mappings;
        if (mappings < stellarium::share::kLeastMappings ||
            mappings > stellarium::share::kMostMappings) {
            return fail(
                ErrorCode::kInvalidArgument,
                fmt::format("max_mappings must be 0 or {} to {}", stellarium::share::kLeastMappings,
                            stellarium::share::kMostMappings));
        }
        return store->backend->map(
            source, {.offset_bytes = given.offset_bytes,
                     .length_bytes = given.length_bytes,
                     .max_mappings = mappings,
                     .map = {.address = given.address,
                             .populate = (given.flags & STELLARIUM_MAP_POPULATE) != 0}});
    });
}

const void* stellarium_mapping_address(const stellarium_mapping* mapping) {
    return mapping == nullptr ? nullptr : mapping->range->mapping().data();
}

uint64_t stellarium_mapping_size(const stellarium_mapping* mapping) {
    return mapping == nullptr ? 0 : mapping->range->mapping().size_bytes();
}

int stellarium_mapping_get_info(const stellarium_mapping* mapping, stellarium_mapping_info* info) {
    return guarded([&]() -> Result<void> {
        if (mapping == nullptr) {
            return is_null("mapping");
        }
        stellarium_mapping_info known{};
        known.mapped_bytes = mapping->range->mapped_bytes();
        known.gathered_bytes = mapping->range->gathered_bytes();
        known.mappings = mapping->range->mapping().mappings();
        return give(known, info);
    });
}

int stellarium_unmap(stellarium_mapping* mapping) {
    return guarded([&]() -> Result<void> {
        const std::unique_ptr<stellarium_mapping> gone(mapping);
        return gone ? gone->range->release() : Result<void>();
    });
}
