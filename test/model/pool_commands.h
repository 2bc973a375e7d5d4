// Changes of a pool as values: what to call, what it makes of the shadow, and how to tell whether
// it has happened, for tests in which nobody was told.
//
//     const PoolCommand command = clone_command("a", {"b", "c"});
//     if (command.run(*pool)) command.apply(shadow);
//     // ... or after a crash in the middle of it:
//     if (command.has_happened(*reopened)) command.apply(shadow);
//
// Thread rule: one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "nova/pool.h"
#include "test/model/pool_shadow.h"

namespace stellarium::nova::model {

/// Happens wholly or not at all.
struct PoolCommand {
    std::string what;  ///< For people.
    std::function<Result<void>(Pool&)> run;
    /// What it makes of a shadow.
    std::function<void(Shadow&)> effect;
    /// Whether it has happened in this pool, which was opened since. Throws when it cannot tell.
    std::function<bool(Pool&)> has_happened;
    /// This volume's dirty pages are in the log before the command's record, and durable with it.
    /// Empty: none.
    std::string flushes{};

    /// It has happened, durably.
    void apply(Shadow& shadow) const {
        effect(shadow);
        if (const auto volume = shadow.find(flushes); volume != shadow.end()) {
            volume->second.flushed();
        }
    }
};

/// `source`: an image, a volume, or "VOLUME@SNAPSHOT".
const Content& content_of(const Shadow& shadow, const std::string& source);

PoolCommand create_command(const std::string& fresh, uint64_t size_bytes);
PoolCommand clone_command(const std::string& source, const std::vector<std::string>& fresh);
PoolCommand snapshot_command(const std::string& volume, const std::string& fresh);
PoolCommand rename_command(const std::string& from, const std::string& fresh);
/// No device of it may be open.
PoolCommand remove_command(const std::string& name);
PoolCommand remove_snapshot_command(const std::string& volume, const std::string& snapshot);
/// `old_size_bytes`: what it has now. When it shrinks no device may be open.
PoolCommand resize_command(const std::string& volume, uint64_t old_size_bytes, uint64_t size_bytes);
/// `content`: of the snapshot. No device may be open.
PoolCommand rollback_command(const std::string& volume, const std::string& snapshot,
                             const Content& content);
PoolCommand import_command(const std::string& fresh, std::vector<std::byte> data);
/// An empty label takes the attachment away.
PoolCommand attachment_command(const std::string& name, const std::string& label);
/// The boot manifest of the image, which has this root; empty takes it away.
PoolCommand boot_command(const std::string& image, const Hash256& root,
                         std::vector<std::byte> manifest);
PoolCommand checkpoint_command();
PoolCommand collect_command(const GcOptions& options = {});

}  // namespace stellarium::nova::model
