// Opens a pool's store for salvage, replays what there is, and has ChunkUserFinder walk over all
// that images, volumes and snapshots refer to, looking up every chunk on the way.
#include "nova/check.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <span>
#include <tuple>
#include <utility>

#include <absl/container/flat_hash_map.h>
#include <absl/container/flat_hash_set.h>
#include <fmt/format.h>

#include "base/units.h"
#include "nova/catalog.h"
#include "nova/chunk_users.h"
#include "nova/limits.h"
#include "nova/records.h"

namespace stellarium::nova {
namespace {

using nebula::Finding;
using nebula::SalvagedStore;

/// Findings about single chunks and nodes; what is more is counted. All lost ranges are listed.
constexpr size_t kMaxObjectFindings = 1000;
/// Ranges named in one finding.
constexpr size_t kMaxRangesInWords = 8;
constexpr std::string_view kRestore =
    "write that range anew, roll back to a snapshot, or remove what refers to it; importing or "
    "writing the same content again heals it";

/// The damage of one node or chunk is no reason to stop.
bool is_damage(const Error& error) {
    return error.code() == ErrorCode::kCorrupt || error.code() == ErrorCode::kNotFound ||
           error.code() == ErrorCode::kIo || error.code() == ErrorCode::kUnsupported;
}

/// Applies records to a catalog although others may be missing.
class SalvageSink final : public nebula::ReplaySink {
  public:
    SalvageSink(Catalog& catalog, std::vector<Finding>& findings)
        : catalog_(catalog), findings_(findings) {}

    Result<void> records_missing(const std::string& why) override {
        // Which volumes they concerned nobody knows: all that there were. Images never change.
        catalog_.mark_damaged("acknowledged changes may be missing, because the log is damaged: " +
                              why);
        missing_ = true;
        return {};
    }

    Result<void> replay(uint64_t sequence, uint16_t kind, Bytes payload) override {
        Result<void> applied = catalog_.replay(kind, payload);
        if (applied || applied.error().code() != ErrorCode::kCorrupt) {
            return applied;
        }
        if (missing_) {
            STELLARIUM_ASSIGN(const bool adapted, apply_adapted(kind, payload));
            if (adapted) {
                return {};
            }
        }
        findings_.push_back({.kind = Finding::Kind::kLog,
                             .repairable = true,
                             .what = fmt::format("a change in batch {} cannot be made: {}",
                                                 sequence, applied.error().message()),
                             .file = {},
                             .consequence = "what it says has not happened",
                             .advice = "--repair leaves it out"});
        return {};
    }

  private:
    std::string free_name(const std::string& name) const {
        for (uint64_t i = 1;; ++i) {
            std::string other = fmt::format("{}.{}", name.substr(0, kMaxNameBytes - 24),
                                            fmt::format("found-{}", i));
            if (!catalog_.name_taken(other)) {
                return other;
            }
        }
    }
    void say_renamed(const std::string& name, const std::string& now) {
        findings_.push_back({.kind = Finding::Kind::kLog,
                             .repairable = true,
                             .what = fmt::format("'{}' is the name of two, because a change of "
                                                 "names is missing: the newer one is '{}'",
                                                 name, now),
                             .file = {},
                             .consequence = "it has another name",
                             .advice = "rename it"});
    }

    /// A record that does not fit because others are missing, as far as it can be applied.
    Result<bool> apply_adapted(uint16_t kind, Bytes payload) {
        switch (static_cast<RecordKind>(kind)) {
            case RecordKind::kCreate: {
                STELLARIUM_ASSIGN(auto record, decode<CreateRecord>(payload));
                if (!catalog_.name_taken(record.name)) {
                    return false;
                }
                const std::string name = std::exchange(record.name, free_name(record.name));
                say_renamed(name, record.name);
                return apply(kind, encode(record));
            }
            case RecordKind::kClone: {
                STELLARIUM_ASSIGN(auto record, decode<CloneRecord>(payload));
                if (!catalog_.find(record.source)) {
                    return false;
                }
                // One by one: each has its own fate.
                for (size_t i = 0; i < record.names.size(); ++i) {
                    CloneRecord one = record;
                    one.first_id = record.first_id + i;
                    one.names = {record.names[i]};
                    if (catalog_.find(one.first_id)) {
                        continue;
                    }
                    if (catalog_.name_taken(record.names[i])) {
                        one.names[0] = free_name(record.names[i]);
                        say_renamed(record.names[i], one.names[0]);
                    }
                    STELLARIUM_ASSIGN(const bool applied, apply(kind, encode(one)));
                    if (!applied) {
                        return false;
                    }
                }
                return true;
            }
            case RecordKind::kRemove: {
                STELLARIUM_ASSIGN(auto record, decode<RemoveRecord>(payload));
                std::erase_if(record.ids, [this](uint64_t id) { return !catalog_.find(id); });
                return record.ids.empty() ? Result<bool>(true) : apply(kind, encode(record));
            }
            default:
                return false;
        }
    }
    Result<bool> apply(uint16_t kind, const std::vector<std::byte>& payload) {
        const Result<void> applied = catalog_.replay(kind, payload);
        if (!applied && applied.error().code() != ErrorCode::kCorrupt) {
            return std::unexpected(applied.error());
        }
        return applied.has_value();
    }

    Catalog& catalog_;
    std::vector<Finding>& findings_;
    bool missing_ = false;
};

class Walk {
  public:
    Walk(SalvagedStore& store, const Catalog& catalog, const nebula::CheckOptions& options,
         CheckReport& report)
        : store_(store),
          catalog_(catalog),
          options_(options),
          report_(report),
          finder_(store,
                  {.is_bad = [this](const ChunkId& id, std::optional<nebula::PageAddress> hint,
                                    uint32_t end_page) -> Result<bool> {
                       STELLARIUM_ASSIGN(const bool whole, check_chunk(id, hint, end_page));
                       return !whole;
                   },
                   .unreadable =
                       [this](const NodeRef& node, const Error& error) {
                           note_bad(node.id, /*is_node=*/true, error, node.hint);
                       }}) {}

    Result<void> run();

  private:
    /// A node or chunk that cannot be read, and who misses it.
    struct Bad {
        bool is_node = false;
        std::string why;
        std::string file;
        std::optional<uint64_t> offset;
        std::vector<std::string> users;
        uint64_t more_users = 0;
    };

    Result<void> walk_entity(const Entity& entity);
    Result<void> walk_boots();
    /// False: it cannot be read.
    Result<bool> check_chunk(const ChunkId& id, std::optional<nebula::PageAddress> hint,
                             uint32_t end_page);
    void note_bad(const ChunkId& id, bool is_node, const Error& error,
                  std::optional<nebula::PageAddress> hint);
    static std::string consequence_of(const Bad& bad);
    Result<void> say_bad();
    Result<void> look_up_known();

    SalvagedStore& store_;
    const Catalog& catalog_;
    const nebula::CheckOptions& options_;
    CheckReport& report_;
    absl::flat_hash_map<Hash256, Bad, Hash256Hasher> bad_;
    /// What the store knows to be damaged, and why.
    absl::flat_hash_map<Hash256, std::string, Hash256Hasher> damaged_;
    ChunkUserFinder finder_;
};

void Walk::note_bad(const ChunkId& id, bool is_node, const Error& error,
                    std::optional<nebula::PageAddress> hint) {
    const auto [it, is_new] = bad_.try_emplace(id);
    if (is_new) {
        it->second.is_node = is_node;
        it->second.why = error.message();
        if (hint) {
            it->second.file =
                fmt::format("{}/segments/{:07}.seg", store_.directory(), hint->segment());
            it->second.offset = hint->offset_bytes();
        }
    }
}

std::string Walk::consequence_of(const Bad& bad) {
    if (bad.users.empty()) {
        return "none for what can be read: newer data hides it";
    }
    return fmt::format("cannot be read: {}{}", fmt::join(bad.users, "; "),
                       bad.more_users == 0 ? "" : fmt::format("; and {} more", bad.more_users));
}

Result<bool> Walk::check_chunk(const ChunkId& id, std::optional<nebula::PageAddress> hint,
                               uint32_t end_page) {
    ++report_.chunks;
    if (bad_.contains(id)) {
        return false;
    }
    const auto found = store_.resolve(id, hint);
    if (!found) {
        if (!is_damage(found.error())) {
            return std::unexpected(found.error());
        }
        note_bad(id, /*is_node=*/false, found.error(), hint);
        return false;
    }
    if (const auto known = damaged_.find(id); known != damaged_.end()) {
        note_bad(id, /*is_node=*/false, Error(ErrorCode::kCorrupt, known->second), found->address);
        return false;
    }
    if (end_page > found->pages) {
        note_bad(id, /*is_node=*/false,
                 Error(ErrorCode::kCorrupt,
                       fmt::format("chunk {} has {} pages, and page {} of it is referred to",
                                   id.hex(), found->pages, end_page - 1)),
                 found->address);
        return false;
    }
    return true;
}

Result<void> Walk::walk_entity(const Entity& entity) {
    const std::string name = catalog_.full_name(entity);
    const VolumeState state = entity.state();
    if (state.damage) {
        report_.unknown.push_back(name);
        report_.findings.push_back(
            {.kind = Finding::Kind::kVolume,
             .what =
                 fmt::format("{} '{}' is damaged: {}", kind_name(entity.kind), name, *state.damage),
             .file = {},
             .consequence = "its content is not known, and it is refused",
             .advice = entity.kind == EntityKind::kVolume
                           ? "roll it back to a snapshot that is not damaged, or remove it"
                           : "remove it"});
        return {};
    }
    STELLARIUM_ASSIGN(const BadRanges bad, finder_.ranges_of(state, options_.cancelled));
    for (const BadRange& range : bad.ranges) {
        const uint64_t end = range.offset_bytes + range.length_bytes;
        Bad& cause = bad_[range.cause];
        if (cause.users.size() < kMaxRangesInWords) {
            cause.users.push_back(fmt::format("{} '{}' bytes {} to {}", kind_name(entity.kind),
                                              name, range.offset_bytes, end - 1));
        } else {
            ++cause.more_users;
        }
        if (!report_.lost.empty() && report_.lost.back().source == name) {
            // Whatever the cause, what touches is one range.
            LostRange& last = report_.lost.back();
            const uint64_t last_end = last.offset_bytes + last.length_bytes;
            if (range.offset_bytes <= last_end) {
                last.length_bytes = std::max(last_end, end) - last.offset_bytes;
                continue;
            }
        }
        report_.lost.push_back({.source = name,
                                .kind = entity.kind,
                                .offset_bytes = range.offset_bytes,
                                .length_bytes = range.length_bytes});
    }
    if (!bad.complete) {
        report_.findings.push_back(
            {.kind = Finding::Kind::kVolume,
             .what = fmt::format("{} '{}' has more lost ranges than are listed",
                                 kind_name(entity.kind), name),
             .file = {},
             .consequence = "the list of its lost ranges is not complete",
             .advice = std::string(kRestore)});
    }
    return {};
}

Result<void> Walk::say_bad() {
    // What the walk found rotten is known from now on, which a repair puts on record.
    absl::flat_hash_set<Hash256, Hash256Hasher> newly_known;
    STELLARIUM_ASSIGN(const auto known, store_.damaged());
    for (const nebula::DamagedChunk& chunk : known) {
        if (!damaged_.contains(chunk.id)) {
            newly_known.insert(chunk.id);
        }
    }
    // What the store has found already is told of there, once.
    absl::flat_hash_set<Hash256, Hash256Hasher> told;
    std::erase_if(report_.findings, [&told](const Finding& finding) {
        return finding.id && finding.kind == Finding::Kind::kChunk &&
               !told.insert(*finding.id).second;
    });
    for (Finding& finding : report_.findings) {
        if (!finding.id ||
            (finding.kind != Finding::Kind::kChunk && finding.kind != Finding::Kind::kObject)) {
            continue;
        }
        const auto found = bad_.find(*finding.id);
        if (found == bad_.end()) {
            if (finding.consequence.empty()) {
                finding.consequence = finding.harmless
                                          ? "none: it is known, and nothing needs it"
                                          : "nothing refers to it, or another copy of it is whole";
                finding.advice = finding.harmless
                                     ? "the next garbage collection removes it"
                                     : "--repair sees to it that it is not used; then the next "
                                       "garbage collection removes it";
            }
            continue;
        }
        Bad& bad = found->second;
        finding.harmless = false;
        finding.kind = bad.is_node ? Finding::Kind::kObject : Finding::Kind::kChunk;
        finding.consequence = consequence_of(bad);
        finding.advice = kRestore;
        bad_.erase(found);
    }
    std::vector<ChunkId> ids;
    ids.reserve(bad_.size());
    for (const auto& [id, bad] : bad_) {
        ids.push_back(id);
    }
    std::ranges::sort(ids, [this](const ChunkId& a, const ChunkId& b) {
        const Bad& left = bad_.at(a);
        const Bad& right = bad_.at(b);
        return std::tie(left.file, left.offset, left.why) <
               std::tie(right.file, right.offset, right.why);
    });
    for (const ChunkId& id : std::span(ids).first(std::min(ids.size(), kMaxObjectFindings))) {
        const Bad& bad = bad_.at(id);
        const std::string_view what = bad.is_node ? "a tree node" : "a chunk";
        report_.findings.push_back(
            {.kind = bad.is_node ? Finding::Kind::kObject : Finding::Kind::kChunk,
             .repairable = newly_known.contains(id),
             .what = fmt::format("{} cannot be read: {}", what, bad.why),
             .file = bad.file,
             .offset = bad.offset,
             .id = id,
             .consequence = consequence_of(bad),
             .advice = std::string(kRestore)});
    }
    if (bad_.size() > kMaxObjectFindings) {
        report_.findings.push_back(
            {.kind = Finding::Kind::kChunk,
             .what = fmt::format("{} more chunks and tree nodes cannot be read",
                                 bad_.size() - kMaxObjectFindings),
             .file = {},
             .consequence = "see the list of lost ranges",
             .advice = std::string(kRestore)});
    }
    return {};
}

Result<void> Walk::look_up_known() {
    STELLARIUM_ASSIGN(const auto damaged, store_.damaged());
    for (const nebula::DamagedChunk& chunk : damaged) {
        damaged_.emplace(chunk.id, chunk.reason);
    }
    return {};
}

Result<void> Walk::walk_boots() {
    for (const auto& [root, pieces] : catalog_.boots()) {
        NodeRef last;
        const auto read = load_pieces(store_, pieces, "boot manifest", [&](const NodeRef& piece) {
            last = piece;
            return Result<void>();
        });
        if (read) {
            continue;
        }
        if (!is_damage(read.error())) {
            return std::unexpected(read.error());
        }
        note_bad(last.id, /*is_node=*/true, read.error(), last.hint);
        bad_[last.id].users.push_back(
            fmt::format("the boot manifest of images with root {} (stellarctl boot rm removes it)",
                        root.hex()));
    }
    return {};
}

Result<void> Walk::run() {
    STELLARIUM_TRY(look_up_known());
    std::vector<EntityPtr> entities = catalog_.all();
    std::ranges::sort(entities, {}, [](const EntityPtr& entity) { return entity->id; });
    for (const EntityPtr& entity : entities) {
        switch (entity->kind) {
            case EntityKind::kImage:
                ++report_.images;
                break;
            case EntityKind::kVolume:
                ++report_.volumes;
                break;
            case EntityKind::kSnapshot:
                ++report_.snapshots;
                break;
        }
        STELLARIUM_TRY(walk_entity(*entity));
    }
    STELLARIUM_TRY(walk_boots());
    report_.nodes = finder_.nodes_read();
    return say_bad();
}

// --- The whole -----------------------------------------------------------------------------------

/// Held while a pool is looked at. Writing nothing, it needs the file that a holder has locked.
Result<std::unique_ptr<io::File>> lock_quietly(const io::Env& env, const std::string& directory) {
    const std::string path = directory + "/lock";
    auto file = env.files->open(path, io::OpenMode::kReadWrite);
    if (!file) {
        // A copy without it, or on a file system that is mounted read-only: nobody can hold it.
        if (file.error().code() == ErrorCode::kNotFound ||
            file.error().code() == ErrorCode::kReadOnly ||
            file.error().code() == ErrorCode::kPermissionDenied) {
            return nullptr;
        }
        return std::unexpected(file.error());
    }
    if (auto locked = (*file)->lock(); !locked) {
        return std::unexpected(locked.error().with_context(
            fmt::format("{} is in use: stop its daemon, or check a copy of it", directory)));
    }
    return *std::move(file);
}

/// A store whose catalog could be loaded, and what was found on the way.
struct Salvaged {
    std::unique_ptr<SalvagedStore> store;
    std::unique_ptr<NodeCache> cache;
    std::unique_ptr<Catalog> catalog;
};

class PoolCheck {
  public:
    PoolCheck(const io::Env& env, const std::string& directory, const PoolCheckOptions& options)
        : env_(env), directory_(directory), options_(options) {}

    /// One look; with `repair` and what it takes to write, one repair.
    Result<CheckReport> run(bool repair);

  private:
    /// False: its catalog cannot be loaded.
    Result<bool> open(nebula::Salvage salvage, bool repair, Salvaged& into, CheckReport& report);

    /// Where no checkpoint can be used, as `report` says last: goes through all of the log instead.
    Result<void> open_whole_log(bool repair, Salvaged& into, CheckReport& report);

    const io::Env& env_;
    const std::string& directory_;
    const PoolCheckOptions& options_;
};

Result<bool> PoolCheck::open(nebula::Salvage salvage, bool repair, Salvaged& into,
                             CheckReport& report) {
    constexpr uint64_t kCacheBytes = 16 * kMiB;
    nebula::StoreOptions store = options_.store;
    store.read_only = !repair;
    into = {};
    STELLARIUM_ASSIGN(into.store, SalvagedStore::open(env_, directory_, store, salvage));
    STELLARIUM_ASSIGN(report.counts, into.store->check(options_.check, [&report](Finding finding) {
        report.findings.push_back(std::move(finding));
    }));
    into.cache = std::make_unique<NodeCache>(kCacheBytes);
    into.catalog = std::make_unique<Catalog>(*into.store, *into.cache);
    const auto loaded = into.catalog->load(into.store->checkpoint_payload());
    if (loaded) {
        return true;
    }
    if (!is_damage(loaded.error())) {
        return std::unexpected(loaded.error());
    }
    report.findings.push_back(
        {.kind = Finding::Kind::kObject,
         .what = "the list of all volumes and images cannot be read: " + loaded.error().message(),
         .file = fmt::format("{}/{}", directory_, nebula::kSuperblockName),
         .consequence = "the pool cannot be opened",
         .advice = "--repair takes the checkpoint before it"});
    return false;
}

Result<void> PoolCheck::open_whole_log(bool repair, Salvaged& into, CheckReport& report) {
    // The last finding says why no checkpoint can be used.
    CheckReport whole;
    const auto opened = open(nebula::Salvage::kWholeLog, repair, into, whole);
    if (!opened) {
        if (!is_damage(opened.error())) {
            return std::unexpected(opened.error());
        }
        report.usable = false;
        Finding& finding = report.findings.back();
        finding.advice = fmt::format(
            "restore the store from a backup: it cannot be made anew from its log, because {}",
            opened.error().message());
        return {};
    }
    report.findings.back().repairable = true;
    report.findings.back().advice =
        "--repair makes it anew: the log still holds every change from the first one on";
    // What the look at the log found is all that was found before, and more.
    whole.findings.push_back(std::move(report.findings.back()));
    report = std::move(whole);
    return {};
}

Result<CheckReport> PoolCheck::run(bool repair) {
    CheckReport report;
    std::unique_ptr<io::File> lock;
    if (!repair) {
        STELLARIUM_ASSIGN(lock, lock_quietly(env_, directory_));
    }
    Salvaged salvaged;
    auto opened = open(nebula::Salvage::kNewestCheckpoint, repair, salvaged, report);
    if (opened && !*opened) {
        // The older checkpoint's findings are the same, and some more.
        CheckReport older;
        auto reopened = open(nebula::Salvage::kOlderCheckpoint, repair, salvaged, older);
        if (reopened && *reopened) {
            older.findings.push_back(std::move(report.findings.back()));
            report = std::move(older);
            opened = true;
        } else if (!reopened && reopened.error().code() != ErrorCode::kNotFound &&
                   !is_damage(reopened.error())) {
            return std::unexpected(reopened.error());
        }
    }
    if (!opened && opened.error().code() != ErrorCode::kCorrupt &&
        opened.error().code() != ErrorCode::kNotFound) {
        return std::unexpected(opened.error());
    }
    if (!opened) {
        const std::string segments = directory_ + "/segments";
        STELLARIUM_ASSIGN(const bool there, env_.files->exists(segments));
        report.findings.push_back(
            {.kind = there ? Finding::Kind::kSuperblock : Finding::Kind::kLog,
             .what = opened.error().code() == ErrorCode::kNotFound ? "the superblock is missing"
                                                                   : opened.error().message(),
             .file = there ? fmt::format("{}/{}", directory_, nebula::kSuperblockName) : segments,
             .consequence = "the pool cannot be opened, and nothing more of it checked",
             .advice = there ? "restore what is missing from a backup of the same store"
                             : "put the folder back, or restore the store from a backup"});
        if (!there) {
            report.usable = false;
            return report;
        }
    }
    if (!opened || !*opened) {
        STELLARIUM_TRY(open_whole_log(repair, salvaged, report));
        if (!report.usable) {
            return report;
        }
    }
    SalvageSink sink(*salvaged.catalog, report.findings);
    STELLARIUM_TRY(salvaged.store->replay(sink));
    STELLARIUM_TRY(Walk(*salvaged.store, *salvaged.catalog, options_.check, report).run());
    if (repair && report.repairable()) {
        STELLARIUM_ASSIGN(const std::vector<std::byte> payload,
                          Catalog::save(*salvaged.store, salvaged.catalog->freeze()));
        STELLARIUM_ASSIGN(report.repair, salvaged.store->repair(payload));
        STELLARIUM_TRY(salvaged.store->close());
    }
    return report;
}

}  // namespace

bool CheckReport::damaged() const {
    return std::ranges::any_of(findings, [](const Finding& finding) { return !finding.harmless; });
}

bool CheckReport::repairable() const {
    return usable && std::ranges::any_of(findings, [](const Finding& finding) {
               return !finding.harmless && finding.repairable;
           });
}

Result<CheckReport> check_pool(const io::Env& env, const std::string& directory,
                               const PoolCheckOptions& options) {
    STELLARIUM_ASSIGN(const bool there, env.files->exists(directory + "/segments"));
    STELLARIUM_ASSIGN(const bool superblock,
                      env.files->exists(fmt::format("{}/{}", directory, nebula::kSuperblockName)));
    if (!superblock && !there) {
        return fail(ErrorCode::kNotFound,
                    fmt::format("{} holds no store (there is no superblock): create one with "
                                "'stellarctl init'",
                                directory));
    }
    PoolCheck check(env, directory, options);
    STELLARIUM_ASSIGN(CheckReport report, check.run(options.repair));
    if (!report.repair) {
        return report;
    }
    // What is left is what another look finds.
    STELLARIUM_ASSIGN(CheckReport after, check.run(false));
    after.repaired = std::move(report.findings);
    after.repair = report.repair;
    return after;
}

}  // namespace stellarium::nova
