#include "test/model/pool_commands.h"

#include <memory>
#include <optional>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "base/bytes.h"
#include "nova/testing/test_pool.h"

namespace stellarium::nova::model {
namespace {

using testing::must;

bool exists(const Pool& pool, const std::string& name) {
    return pool.find(name).has_value();
}

/// Forgets what the call returns besides its success.
template <typename T>
Result<void> only_success(const Result<T>& result) {
    if (!result) {
        return std::unexpected(result.error());
    }
    return {};
}

}  // namespace

const Content& content_of(const Shadow& shadow, const std::string& source) {
    const size_t at = source.find('@');
    const ShadowVolume& volume = shadow.at(source.substr(0, at));
    return at == std::string::npos ? volume.content : volume.snapshots.at(source.substr(at + 1));
}

PoolCommand create_command(const std::string& fresh, uint64_t size_bytes) {
    return {.what = fmt::format("create {} of {} bytes", fresh, size_bytes),
            .run = [=](Pool& pool) { return only_success(pool.create_volume(fresh, size_bytes)); },
            .effect = [=](Shadow& shadow) { shadow[fresh].content.resize(size_bytes); },
            .has_happened = [=](const Pool& pool) { return exists(pool, fresh); }};
}

PoolCommand clone_command(const std::string& source, const std::vector<std::string>& fresh) {
    return {.what = fmt::format("clone {} to {}", source, fmt::join(fresh, ", ")),
            .run = [=](Pool& pool) { return pool.clone(source, fresh); },
            .effect =
                [=](Shadow& shadow) {
                    Content content = content_of(shadow, source);
                    content.resize((content.size_bytes() + kSectorBytes - 1) / kSectorBytes *
                                   kSectorBytes);
                    for (const std::string& name : fresh) {
                        shadow[name].content = content;
                        shadow[name].parent = source;
                    }
                },
            .has_happened = [=](const Pool& pool) { return exists(pool, fresh.front()); },
            .flushes = source.find('@') == std::string::npos ? source : std::string()};
}

PoolCommand snapshot_command(const std::string& volume, const std::string& fresh) {
    return {.what = fmt::format("snapshot {}@{}", volume, fresh),
            .run = [=](Pool& pool) { return only_success(pool.create_snapshot(volume, fresh)); },
            .effect =
                [=](Shadow& shadow) {
                    ShadowVolume& of = shadow.at(volume);
                    of.snapshots[fresh] = of.content;
                },
            .has_happened = [=](const Pool& pool) { return exists(pool, volume + "@" + fresh); },
            .flushes = volume};
}

PoolCommand rename_command(const std::string& from, const std::string& fresh) {
    return {.what = fmt::format("rename {} to {}", from, fresh),
            .run = [=](Pool& pool) { return pool.rename(from, fresh); },
            .effect =
                [=](Shadow& shadow) {
                    auto node = shadow.extract(from);
                    node.key() = fresh;
                    shadow.insert(std::move(node));
                    parent_renamed(shadow, from, fresh);
                },
            .has_happened = [=](const Pool& pool) { return exists(pool, fresh); }};
}

PoolCommand remove_command(const std::string& name) {
    return {.what = "remove " + name,
            .run = [=](Pool& pool) { return pool.remove({name}); },
            .effect =
                [=](Shadow& shadow) {
                    shadow.erase(name);
                    parent_removed(shadow, name);
                },
            .has_happened = [=](const Pool& pool) { return !exists(pool, name); }};
}

PoolCommand remove_snapshot_command(const std::string& volume, const std::string& snapshot) {
    const std::string source = volume + "@" + snapshot;
    return {.what = "remove snapshot " + source,
            .run = [=](Pool& pool) { return pool.remove_snapshot(volume, snapshot); },
            .effect =
                [=](Shadow& shadow) {
                    shadow.at(volume).snapshots.erase(snapshot);
                    parent_removed(shadow, source);
                },
            .has_happened = [=](const Pool& pool) { return !exists(pool, source); }};
}

PoolCommand resize_command(const std::string& volume, uint64_t old_size_bytes,
                           uint64_t size_bytes) {
    return {.what = fmt::format("resize {} to {} bytes", volume, size_bytes),
            .run = [=](Pool& pool) { return only_success(pool.resize(volume, size_bytes)); },
            .effect = [=](Shadow& shadow) { shadow.at(volume).content.resize(size_bytes); },
            .has_happened =
                [=](const Pool& pool) {
                    return size_bytes != old_size_bytes &&
                           must(pool.find(volume)).size_bytes == size_bytes;
                },
            .flushes = size_bytes < old_size_bytes ? volume : std::string()};
}

PoolCommand rollback_command(const std::string& volume, const std::string& snapshot,
                             const Content& content) {
    return {.what = fmt::format("rollback {} to {}", volume, snapshot),
            .run = [=](Pool& pool) { return pool.rollback(volume, snapshot); },
            .effect =
                [=](Shadow& shadow) {
                    ShadowVolume& of = shadow.at(volume);
                    of.content = content;
                    of.uncertain.clear();
                },
            .has_happened =
                [=](Pool& pool) {
                    // Not through a reader, which would need room for what is dirty.
                    const auto device = must(pool.attach(volume, {.read_only = true}));
                    const auto actual = testing::read(*device, 0, device->size_bytes());
                    return actual == content.read(0, content.size_bytes());
                },
            .flushes = volume};
}

PoolCommand import_command(const std::string& fresh, std::vector<std::byte> data) {
    const auto shared = std::make_shared<const std::vector<std::byte>>(std::move(data));
    return {.what = fmt::format("import {} of {} bytes", fresh, shared->size()),
            .run = [=](Pool& pool) -> Result<void> {
                STELLARIUM_ASSIGN(const auto import, pool.begin_import(fresh));
                STELLARIUM_TRY(import->append(0, *shared));
                return only_success(import->finish(shared->size()));
            },
            .effect =
                [=](Shadow& shadow) {
                    ShadowVolume& image = shadow[fresh];
                    image.is_image = true;
                    image.content.resize(shared->size());
                    image.content.write(0, *shared);
                },
            .has_happened = [=](const Pool& pool) { return exists(pool, fresh); }};
}

PoolCommand attachment_command(const std::string& name, const std::string& label) {
    return {.what = fmt::format("attachment of {}: '{}'", name, label),
            .run = [=](Pool& pool) -> Result<void> {
                if (label.empty()) {
                    return pool.set_attachment(name, std::nullopt);
                }
                return pool.set_attachment(
                    name, Pool::AttachmentRecord{.source = name, .label = label, .options = {}});
            },
            .effect = [=](Shadow& shadow) { shadow.at(name).attachment = label; },
            .has_happened =
                [=](const Pool& pool) {
                    std::string found;
                    for (const Pool::AttachmentRecord& record : pool.attachments()) {
                        if (record.source == name) {
                            found = record.label;
                        }
                    }
                    return found == label;
                }};
}

PoolCommand boot_command(const std::string& image, const Hash256& root,
                         std::vector<std::byte> manifest) {
    const auto shared = std::make_shared<const std::vector<std::byte>>(std::move(manifest));
    return {.what = fmt::format("boot manifest of {}, {} bytes", image, shared->size()),
            .run = [=](Pool& pool) -> Result<void> {
                if (shared->empty()) {
                    return pool.set_boot_manifest(root, std::nullopt);
                }
                return pool.set_boot_manifest(root, *shared);
            },
            .effect =
                [=](Shadow& shadow) {
                    shadow.at(image).boot_root = root;
                    for (auto& [name, each] : shadow) {
                        if (each.boot_root == root) {
                            each.boot = *shared;
                        }
                    }
                },
            .has_happened =
                [=](Pool& pool) {
                    return must(pool.boot_manifest(root)).value_or(std::vector<std::byte>{}) ==
                           *shared;
                }};
}

PoolCommand checkpoint_command() {
    return {.what = "checkpoint",
            .run = [](Pool& pool) { return pool.checkpoint(); },
            .effect = [](Shadow&) {},
            .has_happened = [](const Pool&) { return false; }};
}

PoolCommand collect_command(const GcOptions& options) {
    return {.what = "collect garbage",
            .run = [=](Pool& pool) { return only_success(pool.gc(options)); },
            .effect = [](Shadow&) {},
            .has_happened = [](const Pool&) { return false; }};
}

}  // namespace stellarium::nova::model
