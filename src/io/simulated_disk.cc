#include "io/simulated_disk.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <unordered_set>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace stellarium::io {
namespace {

[[noreturn]] void stop(const char* what) {
    std::perror(what);
    std::abort();
}

// ---- What a crash makes of one file -------------------------------------------------------------

enum class Fate : uint8_t {
    kKeep,
    kDrop,
    kPrefix,   ///< Effects happened up to some point, the next one in part.
    kShuffle,  ///< Each effect happened or not, in any order.
    kSectors,  ///< Each sector of each effect was written or not.
};
constexpr uint64_t kFateCount = 5;

/// Bytes [begin, end) of a write, put into `image`. Whole pages are shared, not copied.
void put_write(SparsePages& image, const Effect& effect, uint64_t begin, uint64_t end) {
    const uint64_t first_page = effect.offset_bytes / kPageBytes;
    while (begin < end) {
        const uint64_t page = begin / kPageBytes;
        const uint64_t part_end = std::min(end, (page + 1) * kPageBytes);
        const SparsePages::PageRef& source = effect.pages[page - first_page];
        if (part_end - begin == kPageBytes) {
            image.set_page(page, source);
        } else {
            image.write(Bytes(*source).subspan(begin % kPageBytes, part_end - begin), begin);
        }
        begin = part_end;
    }
}

void put_whole(SparsePages& image, const Effect& effect) {
    switch (effect.kind) {
        case Effect::Kind::kWrite:
            put_write(image, effect, effect.offset_bytes,
                      effect.offset_bytes + effect.length_bytes);
            return;
        case Effect::Kind::kPunch:
            image.zero(effect.offset_bytes, effect.length_bytes);
            return;
        case Effect::Kind::kTruncate:
            image.zero_from(effect.offset_bytes);
            return;
    }
}

using Sector = std::array<std::byte, kSectorBytes>;

/// A sector that was being written when the power went: garbage, zeros, or partly the new version.
void scramble_sector(SparsePages& image, const Effect& effect, uint64_t sector, SplitMix64& dice) {
    const uint64_t sector_begin = sector * kSectorBytes;
    Sector bytes{};
    switch (dice.below(4)) {
        case 0:
            break;
        case 1: {
            Sector before{};
            image.read(before, sector_begin);
            put_write(
                image, effect, std::max(sector_begin, effect.offset_bytes),
                std::min(sector_begin + kSectorBytes, effect.offset_bytes + effect.length_bytes));
            image.read(bytes, sector_begin);
            const auto cut = static_cast<std::ptrdiff_t>(1 + dice.below(kSectorBytes - 1));
            std::copy(before.begin() + cut, before.end(), bytes.begin() + cut);
            break;
        }
        default:
            for (std::byte& byte : bytes) {
                byte = static_cast<std::byte>(dice.next());
            }
    }
    image.write(bytes, sector_begin);
}

/// Calls step(sector, begin, end) for the part of a write in each sector, until it says false.
template <typename Step>
void for_each_sector(const Effect& effect, Step&& step) {
    const uint64_t end = effect.offset_bytes + effect.length_bytes;
    uint64_t begin = effect.offset_bytes;
    while (begin < end) {
        const uint64_t sector = begin / kSectorBytes;
        const uint64_t sector_end = std::min(end, (sector + 1) * kSectorBytes);
        if (!step(sector, begin, sector_end)) {
            return;
        }
        begin = sector_end;
    }
}

class FileCrash {
  public:
    FileCrash(const Inode& file, const std::vector<Effect>& effects, SplitMix64 dice)
        : effects_(effects),
          dice_(dice),
          scrambles_(dice_.one_in(2)),
          image_(file.durable),
          size_bytes_(file.durable_size_bytes) {}

    void run(Fate fate) {
        switch (fate) {
            case Fate::kDrop:
                break;
            case Fate::kKeep:
                for (const Effect& effect : effects_) {
                    put_whole(image_, effect);
                    size_bytes_ = effect.size_after_bytes;
                }
                break;
            case Fate::kPrefix:
                keep_prefix();
                break;
            case Fate::kShuffle:
                choose_size();
                keep_shuffled();
                break;
            case Fate::kSectors:
                choose_size();
                keep_sectors();
                break;
        }
        image_.zero_from(size_bytes_);
    }

    SparsePages image() && { return std::move(image_); }
    uint64_t size_bytes() const { return size_bytes_; }

  private:
    void keep_prefix() {
        const uint64_t whole = dice_.below(effects_.size() + 1);
        for (uint64_t i = 0; i < whole; ++i) {
            put_whole(image_, effects_[i]);
            size_bytes_ = effects_[i].size_after_bytes;
        }
        if (whole == effects_.size() || effects_[whole].kind != Effect::Kind::kWrite) {
            return;
        }
        const Effect& torn = effects_[whole];
        const uint64_t sectors = torn.length_bytes / kSectorBytes + 1;
        uint64_t left = dice_.below(sectors + 1);
        uint64_t reached = torn.offset_bytes;
        for_each_sector(torn, [&](uint64_t sector, uint64_t begin, uint64_t end) {
            if (left-- == 0) {
                if (scrambles_) {
                    scramble_sector(image_, torn, sector, dice_);
                    reached = end;
                }
                return false;
            }
            put_write(image_, torn, begin, end);
            reached = end;
            return true;
        });
        if (reached > torn.offset_bytes) {
            size_bytes_ = std::max(size_bytes_, reached);
        }
    }

    /// Any size the file had, or one on the way from it to the next.
    void choose_size() {
        const uint64_t at = dice_.below(effects_.size() + 1);
        if (at > 0) {
            size_bytes_ = effects_[at - 1].size_after_bytes;
        }
        if (at < effects_.size() && effects_[at].kind == Effect::Kind::kWrite &&
            effects_[at].size_after_bytes > size_bytes_ && dice_.one_in(4)) {
            const uint64_t between =
                size_bytes_ + dice_.below(effects_[at].size_after_bytes - size_bytes_);
            size_bytes_ = std::max(size_bytes_, between / kSectorBytes * kSectorBytes);
        }
    }

    void keep_shuffled() {
        std::vector<const Effect*> order;
        order.reserve(effects_.size());
        for (const Effect& effect : effects_) {
            order.push_back(&effect);
        }
        for (size_t i = order.size(); i > 1; --i) {
            std::swap(order[i - 1], order[dice_.below(i)]);
        }
        for (const Effect* effect : order) {
            if (dice_.one_in(2)) {
                put_whole(image_, *effect);
            }
            if (scrambles_ && effect->kind == Effect::Kind::kWrite && dice_.one_in(4)) {
                const uint64_t first = effect->offset_bytes / kSectorBytes;
                const uint64_t last =
                    (effect->offset_bytes + effect->length_bytes - 1) / kSectorBytes;
                scramble_sector(image_, *effect, first + dice_.below(last - first + 1), dice_);
            }
        }
    }

    void keep_sectors() {
        for (const Effect& effect : effects_) {
            switch (effect.kind) {
                case Effect::Kind::kWrite:
                    for_each_sector(effect, [&](uint64_t sector, uint64_t begin, uint64_t end) {
                        if (scrambles_ && dice_.one_in(8)) {
                            scramble_sector(image_, effect, sector, dice_);
                        } else if (dice_.one_in(2)) {
                            put_write(image_, effect, begin, end);
                        }
                        return true;
                    });
                    break;
                case Effect::Kind::kPunch:
                    keep_pages_of_hole(effect);
                    break;
                case Effect::Kind::kTruncate:
                    if (dice_.one_in(2)) {
                        put_whole(image_, effect);
                    }
                    break;
            }
        }
    }

    void keep_pages_of_hole(const Effect& hole) {
        for (const uint64_t page : image_.allocated_in(hole.offset_bytes, hole.length_bytes)) {
            if (dice_.one_in(2)) {
                const uint64_t begin = std::max(hole.offset_bytes, page * kPageBytes);
                const uint64_t end =
                    std::min(hole.offset_bytes + hole.length_bytes, (page + 1) * kPageBytes);
                image_.zero(begin, end - begin);
            }
        }
    }

    const std::vector<Effect>& effects_;
    SplitMix64 dice_;
    bool scrambles_;
    SparsePages image_;
    uint64_t size_bytes_;
};

/// The effects of a file that is mapped shared: what differs from the durable bytes, page by page.
std::vector<Effect> effects_of_shared(const Inode& file) {
    std::vector<Effect> effects;
    if (file.seen_size_bytes != file.durable_size_bytes) {
        effects.push_back({.kind = Effect::Kind::kTruncate,
                           .offset_bytes = file.seen_size_bytes,
                           .size_after_bytes = file.seen_size_bytes,
                           .pages = {}});
    }
    for (uint64_t offset = 0; offset < file.seen_size_bytes; offset += kPageBytes) {
        SparsePages::PageRef now;
        SparsePages::Page before{};
        const uint64_t length = std::min(kPageBytes, file.seen_size_bytes - offset);
        file.shared->read(MutableBytes(now.mutate()).first(length), offset);
        file.durable.read(before, offset);
        if (*now != before) {
            effects.push_back({.offset_bytes = offset,
                               .length_bytes = length,
                               .size_after_bytes = file.seen_size_bytes,
                               .pages = {std::move(now)}});
        }
    }
    return effects;
}

// ---- Copying and crashing trees -----------------------------------------------------------------

using InodeMap = std::unordered_map<const Inode*, InodeRef>;

class TreeCopy {
  public:
    InodeRef copy(const InodeRef& from) { return from ? copy(*from) : nullptr; }

    InodeRef copy(const Inode& from) {
        InodeRef& known = copies_[&from];
        if (known) {
            return known;
        }
        const InodeRef to = std::make_shared<Inode>();
        known = to;  // Before the children; `known` may not be used after they are added.
        to->id = from.id;
        to->file_system_id = from.file_system_id;
        to->is_directory = from.is_directory;
        to->in_memory = from.in_memory;
        to->seen = from.seen;
        to->durable = from.durable;
        to->seen_size_bytes = from.seen_size_bytes;
        to->durable_size_bytes = from.durable_size_bytes;
        to->effects = from.effects;
        if (from.shared) {
            to->shared = from.shared->copy(from.seen_size_bytes);
        }
        to->mounted = from.mounted;
        for (const auto& [name, child] : from.entries) {
            to->entries.emplace(name, copy(child));
        }
        for (const auto& [name, child] : from.durable_entries) {
            to->durable_entries.emplace(name, copy(child));
        }
        for (const NameChange& change : from.name_changes) {
            NameChange& copied = to->name_changes.emplace_back();
            copied.sequence = change.sequence;
            for (const auto& [name, child] : change.sets) {
                copied.sets.emplace_back(name, copy(child));
            }
            if (const InodeRef target = change.target_directory.lock()) {
                copied.target_directory = copy(target);
            }
        }
        return to;
    }

  private:
    InodeMap copies_;
};

/// Calls visit for every inode that something in the tree refers to, once.
template <typename Visit>
void visit_tree(const Inode& inode, std::unordered_set<const Inode*>& visited, Visit&& visit) {
    if (!visited.insert(&inode).second) {
        return;
    }
    visit(inode);
    for (const auto& [name, child] : inode.entries) {
        visit_tree(*child, visited, visit);
    }
    for (const auto& [name, child] : inode.durable_entries) {
        visit_tree(*child, visited, visit);
    }
    for (const NameChange& change : inode.name_changes) {
        for (const auto& [name, child] : change.sets) {
            if (child) {
                visit_tree(*child, visited, visit);
            }
        }
    }
}

class TreeCrash {
  public:
    TreeCrash(const Inode& root, uint64_t seed, CrashStyle style) : seed_(seed) {
        SplitMix64 dice(seed);
        const uint64_t mood = dice.below(8);
        if (style == CrashStyle::kKeepAll || (style == CrashStyle::kSeeded && mood == 0)) {
            everything_ = Fate::kKeep;
        } else if (style == CrashStyle::kLoseAll || (style == CrashStyle::kSeeded && mood == 1)) {
            everything_ = Fate::kDrop;
        } else if (dice.one_in(2)) {
            std::set<uint64_t> sequences;
            std::unordered_set<const Inode*> visited;
            visit_tree(root, visited, [&](const Inode& inode) {
                for (const NameChange& change : inode.name_changes) {
                    sequences.insert(change.sequence);
                }
            });
            auto last_kept = sequences.begin();
            std::advance(last_kept, static_cast<std::ptrdiff_t>(dice.below(sequences.size() + 1)));
            first_lost_name_change_ = last_kept == sequences.end() ? UINT64_MAX : *last_kept;
        }
    }

    InodeRef crash(const Inode& from) {
        if (const auto known = survivors_.find(&from); known != survivors_.end()) {
            return known->second;
        }
        const InodeRef to = std::make_shared<Inode>();
        survivors_.emplace(&from, to);
        to->id = from.id;
        to->file_system_id = from.file_system_id;
        to->is_directory = from.is_directory;
        to->in_memory = from.in_memory;
        to->mounted = from.mounted;
        if (!from.is_directory) {
            crash_file(from, *to);
        } else if (!from.in_memory) {
            crash_directory(from, *to);
        }
        return to;
    }

  private:
    void crash_file(const Inode& from, Inode& to) const {
        SplitMix64 dice(SplitMix64(seed_ ^ SplitMix64(from.id).next()).next());
        std::vector<Effect> of_shared;
        if (from.shared) {
            of_shared = effects_of_shared(from);
        }
        const Fate fate = everything_.value_or(static_cast<Fate>(dice.below(kFateCount)));
        FileCrash file(from, from.shared ? of_shared : from.effects, dice);
        file.run(fate);
        to.durable_size_bytes = to.seen_size_bytes = file.size_bytes();
        to.durable = std::move(file).image();
        to.seen = to.durable;
    }

    void crash_directory(const Inode& from, Inode& to) {
        std::map<std::string, InodeRef> names = from.durable_entries;
        for (const NameChange& change : from.name_changes) {
            if (!happened(change)) {
                continue;
            }
            for (const auto& [name, child] : change.sets) {
                if (child) {
                    names[name] = child;
                } else {
                    names.erase(name);
                }
            }
        }
        for (const auto& [name, child] : names) {
            to.durable_entries.emplace(name, crash(*child));
        }
        to.entries = to.durable_entries;
    }

    /// Decided by the change's number alone, so that both halves of a rename between directories
    /// agree.
    bool happened(const NameChange& change) const {
        if (everything_) {
            return *everything_ == Fate::kKeep;
        }
        if (first_lost_name_change_) {
            return change.sequence < *first_lost_name_change_;
        }
        return SplitMix64(seed_ + SplitMix64(change.sequence).next()).one_in(2);
    }

    uint64_t seed_;
    std::optional<Fate> everything_;
    std::optional<uint64_t> first_lost_name_change_;  ///< Empty: each change by itself.
    InodeMap survivors_;
};

}  // namespace

// ---- SharedMemory -------------------------------------------------------------------------------

SharedMemory::SharedMemory() : descriptor_(::memfd_create("stellarium-simulated", MFD_CLOEXEC)) {
    if (descriptor_ < 0) {
        stop("stellarium: memfd_create");
    }
}

SharedMemory::~SharedMemory() {
    if (::close(descriptor_) != 0) {
        stop("stellarium: close a memfd");
    }
}

void SharedMemory::read(MutableBytes into, uint64_t offset_bytes) const {
    while (!into.empty()) {
        const ssize_t got =
            ::pread(descriptor_, into.data(), into.size(), static_cast<off_t>(offset_bytes));
        if (got <= 0) {
            stop("stellarium: read a memfd");
        }
        into = into.subspan(static_cast<size_t>(got));
        offset_bytes += static_cast<size_t>(got);
    }
}

void SharedMemory::write(Bytes from, uint64_t offset_bytes) {
    while (!from.empty()) {
        const ssize_t put =
            ::pwrite(descriptor_, from.data(), from.size(), static_cast<off_t>(offset_bytes));
        if (put <= 0) {
            stop("stellarium: write a memfd");
        }
        from = from.subspan(static_cast<size_t>(put));
        offset_bytes += static_cast<size_t>(put);
    }
}

void SharedMemory::resize(uint64_t size_bytes) {
    if (::ftruncate(descriptor_, static_cast<off_t>(size_bytes)) != 0) {
        stop("stellarium: resize a memfd");
    }
}

void SharedMemory::zero(uint64_t offset_bytes, uint64_t length_bytes) {
    if (::fallocate(descriptor_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    static_cast<off_t>(offset_bytes), static_cast<off_t>(length_bytes)) != 0) {
        stop("stellarium: punch a hole in a memfd");
    }
}

std::optional<std::pair<uint64_t, uint64_t>> SharedMemory::next_data(uint64_t offset_bytes) const {
    const off_t data = ::lseek(descriptor_, static_cast<off_t>(offset_bytes), SEEK_DATA);
    if (data < 0) {
        return std::nullopt;
    }
    const off_t hole = ::lseek(descriptor_, data, SEEK_HOLE);
    return std::pair(static_cast<uint64_t>(data), static_cast<uint64_t>(hole - data));
}

std::shared_ptr<SharedMemory> SharedMemory::copy(uint64_t size_bytes) const {
    constexpr uint64_t kStepBytes = uint64_t{256} << 10;
    auto made = std::make_shared<SharedMemory>();
    made->resize(size_bytes);
    std::vector<std::byte> step;
    uint64_t offset = 0;
    while (const auto extent = next_data(offset)) {
        offset = extent->first;
        const uint64_t end = offset + extent->second;
        while (offset < end) {
            step.resize(std::min(kStepBytes, end - offset));
            read(step, offset);
            made->write(step, offset);
            offset += step.size();
        }
    }
    return made;
}

// ---- Inode --------------------------------------------------------------------------------------

void Inode::read(MutableBytes into, uint64_t offset_bytes) const {
    if (shared) {
        shared->read(into, offset_bytes);
    } else {
        seen.read(into, offset_bytes);
    }
}

void Inode::write(Bytes from, uint64_t offset_bytes) {
    const uint64_t end = offset_bytes + from.size();
    if (shared) {
        shared->write(from, offset_bytes);
        seen_size_bytes = std::max(seen_size_bytes, end);
        return;
    }
    Effect effect{.kind = Effect::Kind::kWrite,
                  .offset_bytes = offset_bytes,
                  .length_bytes = from.size(),
                  .size_after_bytes = std::max(seen_size_bytes, end),
                  .pages = {}};
    seen_size_bytes = effect.size_after_bytes;
    if (in_memory) {
        seen.write(from, offset_bytes);
        return;
    }
    effect.pages.reserve(from.size() / kPageBytes + 2);
    while (!from.empty()) {
        const size_t part = std::min(from.size(), kPageBytes - offset_bytes % kPageBytes);
        effect.pages.push_back(seen.write_in_page(from.first(part), offset_bytes));
        from = from.subspan(part);
        offset_bytes += part;
    }
    effects.push_back(std::move(effect));
}

void Inode::truncate(uint64_t size_bytes) {
    if (shared) {
        shared->resize(size_bytes);
    } else if (size_bytes < seen_size_bytes) {
        seen.zero_from(size_bytes);
    }
    seen_size_bytes = size_bytes;
    if (!shared && !in_memory) {
        effects.push_back({.kind = Effect::Kind::kTruncate,
                           .offset_bytes = size_bytes,
                           .size_after_bytes = size_bytes,
                           .pages = {}});
    }
}

void Inode::punch(uint64_t offset_bytes, uint64_t length_bytes) {
    if (shared) {
        shared->zero(offset_bytes, length_bytes);
        return;
    }
    seen.zero(offset_bytes, length_bytes);
    if (!in_memory) {
        effects.push_back({.kind = Effect::Kind::kPunch,
                           .offset_bytes = offset_bytes,
                           .length_bytes = length_bytes,
                           .size_after_bytes = seen_size_bytes,
                           .pages = {}});
    }
}

void Inode::sync_data() {
    if (in_memory) {
        return;
    }
    if (shared) {
        for (const Effect& effect : effects_of_shared(*this)) {
            put_whole(durable, effect);
        }
    } else {
        durable = seen;
        effects.clear();
    }
    durable_size_bytes = seen_size_bytes;
}

void Inode::lose_unsynced() {
    if (in_memory || shared) {
        return;  // No disk behind it, or no page cache of its own.
    }
    const uint64_t size = seen_size_bytes;
    seen = durable;
    effects.clear();
    seen_size_bytes = durable_size_bytes;
    if (size != durable_size_bytes) {
        truncate(size);
    }
}

std::optional<std::pair<uint64_t, uint64_t>> Inode::next_data(uint64_t offset_bytes) const {
    return shared ? shared->next_data(offset_bytes) : seen.next_data(offset_bytes, seen_size_bytes);
}

void Inode::make_shared() {
    if (shared) {
        return;
    }
    shared = std::make_shared<SharedMemory>();
    shared->resize(seen_size_bytes);
    SparsePages::Page page{};
    for (const uint64_t number : seen.allocated_in(0, seen_size_bytes)) {
        const uint64_t offset = number * kPageBytes;
        seen.read(page, offset);
        shared->write(Bytes(page).first(std::min(kPageBytes, seen_size_bytes - offset)), offset);
    }
    seen = SparsePages();
    effects.clear();
}

void Inode::change_names(NameChange change) {
    for (const auto& [name, child] : change.sets) {
        if (child) {
            entries[name] = child;
        } else {
            entries.erase(name);
        }
    }
    if (!in_memory) {
        name_changes.push_back(std::move(change));
    }
}

void Inode::sync_names() {
    // Taken out first: two directories may be each other's targets.
    const std::vector<NameChange> changes = std::exchange(name_changes, {});
    durable_entries = entries;
    for (const NameChange& change : changes) {
        if (const InodeRef target = change.target_directory.lock()) {
            target->sync_names();
        }
    }
}

InodeRef copy_tree(const Inode& root) {
    return TreeCopy().copy(root);
}

InodeRef crash_tree(const Inode& root, uint64_t seed, CrashStyle style) {
    return TreeCrash(root, seed, style).crash(root);
}

uint64_t unsynced_in_tree(const Inode& root) {
    uint64_t unsynced = 0;
    std::unordered_set<const Inode*> visited;
    visit_tree(root, visited, [&](const Inode& inode) {
        unsynced += inode.effects.size() + inode.name_changes.size();
        if (inode.shared && !inode.in_memory) {
            unsynced += effects_of_shared(inode).size();
        }
    });
    return unsynced;
}

uint64_t allocated_pages_in_tree(const Inode& root) {
    if (root.in_memory) {
        return 0;
    }
    uint64_t pages = root.shared ? (root.seen_size_bytes + kPageBytes - 1) / kPageBytes
                                 : root.seen.allocated_pages();
    for (const auto& [name, child] : root.entries) {
        pages += allocated_pages_in_tree(*child);
    }
    return pages;
}

}  // namespace stellarium::io
