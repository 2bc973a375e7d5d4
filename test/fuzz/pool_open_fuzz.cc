// A whole pool whose files were changed behind its back: opening it, reading everything, writing,
// collecting, closing and opening it again.
//
// What must hold whatever the files say: nothing crashes, and a pool that could be opened, written
// and closed can be opened again and has what was written. What must hold when one place of a
// cleanly closed pool has rotted: every byte that is served is right (crash-model.md, promise 4).
//
// Input: which pool; flags (1: checksums are made right again, 2: use it after opening); then
// changes, each of file, kind, place and bytes.
#include <map>
#include <optional>
#include <string>

#include <fmt/format.h>

#include "io/simulated.h"
#include "nebula/dead_map.h"
#include "nebula/format.h"
#include "nebula/index.h"
#include "nova/format.h"
#include "nova/pool.h"
#include "test/fuzz/fuzz.h"

namespace stellarium::fuzz {
namespace {

using nova::Pool;
using nova::PoolOptions;

constexpr const char* kDirectory = "/pool";
constexpr const char* kRuntime = "/run";
constexpr size_t kPageBytes = nebula::kPageBytes;
constexpr uint64_t kVolumeBytes = 3 << 20;
constexpr uint32_t kMaxChanges = 4;

PoolOptions options() {
    PoolOptions out;
    out.store.segment_bytes = nebula::kMinSegmentBytes;
    out.runtime_directory = kRuntime;
    out.dirty_budget_bytes = nova::kMinDirtyBudgetBytes;
    out.node_cache_bytes = 1 << 20;
    out.hash_threads = 1;
    out.background = false;
    return out;
}

/// Pages that differ from each other, some of which chunks end at.
Input content(uint64_t seed, size_t pages) {
    Input out(pages * kPageBytes);
    io::SeededRandom(seed).fill(out);
    for (size_t page = 3; page < pages; page += 5) {
        std::fill_n(out.begin() + static_cast<std::ptrdiff_t>((page + 1) * kPageBytes - 64), 64,
                    std::byte{0});
    }
    return out;
}

void write(BlockDevice& device, uint64_t offset, Bytes data) {
    // The interface takes the iovec of the system, which knows no const.
    const iovec part{.iov_base = const_cast<std::byte*>(data.data()), .iov_len = data.size()};
    must(device.write(offset, std::span(&part, 1), IoMode::kMayBlock));
}

Result<void> flush(BlockDevice& device) {
    Result<void> done = fail(ErrorCode::kIo, "the flush did not end");
    device.flush_async([&](Result<void> result) { done = std::move(result); });
    return done;
}

/// What a source holds: nothing if it cannot be read.
Result<Input> read_all(Pool& pool, const std::string& source, uint64_t max_bytes) {
    STELLARIUM_ASSIGN(const auto reader, pool.open_reader(source));
    Input out(std::min(reader->size_bytes(), max_bytes));
    uint64_t offset = 0;
    while (offset < out.size()) {
        STELLARIUM_ASSIGN(const auto range, reader->next_data(offset));
        if (!range || range->first >= out.size()) {
            break;
        }
        require(range->first >= offset && range->second > 0 &&
                    range->first + range->second <= reader->size_bytes(),
                "ranges of data ascend and lie within the size");
        const uint64_t length = std::min(range->second, out.size() - range->first);
        STELLARIUM_TRY(reader->read(range->first, MutableBytes(out).subspan(range->first, length)));
        offset = range->first + length;
    }
    return out;
}

/// A pool on disk, and what is in it.
struct Base {
    std::unique_ptr<io::SimulatedMachine> machine;
    std::map<std::string, Input> truth;  ///< By source.
    std::vector<std::string> files;
    bool strict = false;  ///< It was closed, so that nothing in it may be lost silently.
};

void fill(Pool& pool, Base& base, uint64_t seed, bool more) {
    Input image = content(seed, 40);
    std::ranges::fill(std::span(image).subspan(20 * kPageBytes, 6 * kPageBytes), std::byte{0});
    auto import = must(pool.begin_import("image"));
    must(import->append(0, image));
    must(import->finish(kVolumeBytes));
    image.resize(kVolumeBytes);
    base.truth["image"] = image;
    must(pool.clone("image", {"a", "b"}));
    base.truth["b"] = image;
    Input a = image;
    {
        const auto device = must(pool.attach("a", {}));
        for (unsigned i = 0; i < 6; ++i) {
            const Input data = content(seed + 1 + i, 1 + i % 3);
            const uint64_t offset = (i * 97 % 500) * kPageBytes;
            write(*device, offset, data);
            std::ranges::copy(data, a.begin() + static_cast<std::ptrdiff_t>(offset));
        }
        must(flush(*device));
        must(pool.create_snapshot("a", "s"));
        base.truth["a@s"] = a;
        must(device->discard(2 * kPageBytes, 7 * kPageBytes, IoMode::kMayBlock));
        std::fill_n(a.begin() + static_cast<std::ptrdiff_t>(2 * kPageBytes), 7 * kPageBytes,
                    std::byte{0});
        if (more) {
            for (unsigned round = 0; round < 20; ++round) {
                const Input data = content(seed + 100 + round, 8);
                write(*device, uint64_t{600} * kPageBytes, data);
                must(flush(*device));
                std::ranges::copy(data, a.begin() + std::ptrdiff_t{600} * kPageBytes);
            }
        }
        must(flush(*device));
    }
    base.truth["a"] = a;
    must(pool.create_volume("empty", 1 << 20));
    base.truth["empty"] = Input(1 << 20);
}

void list_files(Base& base, const std::string& directory) {
    for (const io::DirectoryEntry& entry : must(base.machine->files().list(directory))) {
        const std::string path = directory + "/" + entry.name;
        if (entry.is_directory) {
            list_files(base, path);
        } else if (entry.name != "lock") {
            base.files.push_back(path);
        }
    }
}

Base make_base(unsigned which) {
    Base base;
    base.machine = std::make_unique<io::SimulatedMachine>(which + 1);
    base.machine->files().mount(kRuntime, {.kind = io::FileSystemKind::kMemory, .name = "tmpfs"});
    must(Pool::create(base.machine->env(), kDirectory, options()));
    auto pool = must(Pool::open(base.machine->process_env(), kDirectory, options()));
    fill(*pool, base, which * 1000, which == 2);
    switch (which) {
        case 0:  // Closed: nothing to replay.
            must(pool->close());
            base.strict = true;
            break;
        case 1: {  // Killed: a log to replay, and writes in the arena.
            must(pool->checkpoint());
            const auto device = must(pool->attach("b", {}));
            write(*device, 0, content(7, 2));
            must(flush(*device));
            write(*device, 64 * kPageBytes, content(8, 3));
            must(pool->clone("a", {"c"}));
            base.machine->kill_process();
            base.truth.clear();
            break;
        }
        default:  // With a dead map, and holes in segments.
            must(pool->remove({"b"}));
            must(pool->checkpoint());
            must(pool->gc({}));
            must(pool->close());
            base.truth.erase("b");
            base.strict = true;
    }
    pool.reset();
    list_files(base, kDirectory);
    list_files(base, kRuntime);
    std::ranges::sort(base.files);
    return base;
}
constexpr unsigned kBases = 3;

const Base& base_of(unsigned which) {
    static std::array<std::optional<Base>, kBases> bases;
    if (!bases.at(which)) {
        bases.at(which) = make_base(which);
        if (bases.at(which)->strict) {
            // What is demanded of a damaged copy holds for an undamaged one.
            io::SimulatedMachine machine(bases.at(which)->machine->files().fork(), 9);
            const auto pool = must(Pool::open(machine.process_env(), kDirectory, options()));
            for (const auto& [source, bytes] : bases.at(which)->truth) {
                require(must(read_all(*pool, source, UINT64_MAX)) == bytes,
                        "the undamaged pool holds what was written");
            }
        }
    }
    return *bases.at(which);
}

// ---- Changing files -------------------------------------------------------------------------

class FileBytes {
  public:
    FileBytes(io::FileSystem& files, const std::string& path)
        : file_(must(files.open(path, io::OpenMode::kReadWrite))) {}
    uint64_t size() { return must(file_->size_bytes()); }
    Input read(uint64_t offset, size_t length) {
        Input out(length);
        must(io::read_exact(*file_, out, offset));
        return out;
    }
    void write(uint64_t offset, Bytes bytes) { must(io::write_all(*file_, bytes, offset)); }
    void truncate(uint64_t bytes) { must(file_->truncate(bytes)); }
    void sync() { must(file_->datasync()); }

  private:
    std::unique_ptr<io::File> file_;
};

template <typename Number>
void put(Input& bytes, size_t at, Number value) {
    std::memcpy(bytes.data() + at, &value, sizeof(value));
}

void fix_superblock(FileBytes& file) {
    for (uint64_t at = 0; at + kPageBytes <= file.size(); at += kPageBytes) {
        Input page = file.read(at, kPageBytes);
        const auto slot = load<nebula::SuperblockSlot>(page);
        if (slot.payload_bytes == sizeof(nova::format::CatalogRoot)) {
            constexpr size_t kSum = offsetof(nova::format::CatalogRoot, checksum);
            const size_t payload = offsetof(nebula::SuperblockSlot, payload);
            put(page, payload + kSum, U64Le(checksum64(Bytes(page).subspan(payload, kSum))));
        }
        put(page, 8, U64Le(checksum64(Bytes(page).subspan(16))));
        file.write(at, page);
    }
}

void fix_segment(FileBytes& file) {
    const uint64_t pages = file.size() / kPageBytes;
    for (uint64_t page = 0; page < pages; ++page) {
        Input first = file.read(page * kPageBytes, kPageBytes);
        const uint64_t magic = load<U64Le>(first);
        if (magic == nebula::kSegmentHeaderMagic) {
            put(first, 8, U64Le(checksum64(Bytes(first).subspan(16))));
            file.write(page * kPageBytes, first);
        } else if (magic == nebula::kBatchMagic) {
            const uint64_t length = load<nebula::BatchHeader>(first).header_pages;
            if (length > 0 && length <= pages - page) {
                Input all = file.read(page * kPageBytes, length * kPageBytes);
                put(all, 8, U64Le(checksum64(Bytes(all).subspan(16))));
                file.write(page * kPageBytes, Bytes(all).first(16));
            }
        }
    }
    if (pages < 2) {
        return;
    }
    const uint64_t trailer_at = pages * kPageBytes - sizeof(nebula::FooterTrailer);
    Input trailer = file.read(trailer_at, sizeof(nebula::FooterTrailer));
    const uint64_t from = uint64_t{load<nebula::FooterTrailer>(trailer).footer_page} * kPageBytes;
    if (load<U64Le>(trailer) == nebula::kFooterMagic && from < trailer_at) {
        const uint64_t before = checksum64(file.read(from, trailer_at - from));
        put(trailer, 8, U64Le(checksum64(Bytes(trailer).subspan(16), before)));
        file.write(trailer_at, trailer);
    }
}

void fix_index(FileBytes& file) {
    using nebula::IndexCheckpointHeader;
    using nebula::IndexShardRow;
    constexpr size_t kTable = nebula::kIndexShards * sizeof(IndexShardRow);
    if (file.size() < sizeof(IndexCheckpointHeader) + kTable) {
        return;
    }
    Input table = file.read(sizeof(IndexCheckpointHeader), kTable);
    for (uint32_t i = 0; i < nebula::kIndexShards; ++i) {
        const auto row = load<IndexShardRow>(Bytes(table).subspan(i * sizeof(IndexShardRow)));
        const uint64_t length =
            (uint64_t{row.buckets} * 64 + uint64_t{row.overflow_slots} * 8 + 63) / 64 * 64;
        if (length > 0 && row.offset_bytes <= file.size() &&
            length <= file.size() - row.offset_bytes) {
            put(table, i * sizeof(IndexShardRow) + offsetof(IndexShardRow, checksum),
                U64Le(checksum64(file.read(row.offset_bytes, length), i)));
        }
    }
    file.write(sizeof(IndexCheckpointHeader), table);
    Input header = file.read(0, sizeof(IndexCheckpointHeader));
    put(header, offsetof(IndexCheckpointHeader, table_checksum), U64Le(checksum64(table)));
    constexpr size_t kSum = offsetof(IndexCheckpointHeader, checksum);
    put(header, kSum, U64Le(checksum64(Bytes(header).first(kSum))));
    file.write(0, header);
}

void fix_arena(FileBytes& file) {
    if (file.size() < 2 * kPageBytes) {
        return;
    }
    Input header = file.read(0, kPageBytes);
    constexpr size_t kSum = offsetof(nova::format::ArenaHeader, checksum);
    put(header, kSum, U64Le(checksum64(Bytes(header).first(kSum))));
    file.write(0, header);
    constexpr size_t kSlotSum = offsetof(nova::format::ArenaSlot, checksum);
    for (uint64_t slot = 0; slot < nova::kMinDirtyBudgetBytes / kPageBytes; ++slot) {
        const uint64_t at = kPageBytes + slot * sizeof(nova::format::ArenaSlot);
        if (at + sizeof(nova::format::ArenaSlot) > file.size()) {
            break;
        }
        Input bytes = file.read(at, sizeof(nova::format::ArenaSlot));
        const auto entry = load<nova::format::ArenaSlot>(bytes);
        if (entry.kind != 0) {
            const uint64_t sum = checksum64(Bytes(bytes).first(kSlotSum));
            put(bytes, kSlotSum, U64Le(sum == 0 ? 1 : sum));
            file.write(at, bytes);
        }
    }
}

void fix_checksums(io::FileSystem& files, const std::string& path) {
    FileBytes file(files, path);
    if (path.ends_with("/superblock")) {
        fix_superblock(file);
    } else if (path.ends_with(".seg")) {
        fix_segment(file);
    } else if (path.starts_with(kRuntime)) {
        fix_arena(file);
    } else if (path.ends_with(".map")) {
        Input all = file.read(0, file.size());
        if (all.size() > 16) {
            put(all, 8, U64Le(checksum64(Bytes(all).subspan(16))));
            file.write(0, all);
        }
    } else {
        fix_index(file);
    }
    file.sync();
}

/// Makes one change; false when nothing was done. `rot`: what was done is one place gone bad.
bool change(Feed& feed, io::SimulatedFileSystem& files, const Base& base, bool& rot,
            std::string& changed) {
    const std::string& path = base.files[feed.below(static_cast<uint32_t>(base.files.size()))];
    const uint32_t kind = feed.below(8);
    if (!must(files.exists(path))) {
        return false;
    }
    changed = path;
    rot = true;
    FileBytes file(files, path);
    const uint64_t size = file.size();
    // Two of three places are near the start of a page, where headers and tables are.
    const uint32_t where = feed.u32();
    const uint64_t pages = size / kPageBytes;
    uint64_t at = where % std::max<uint64_t>(size, 1);
    if (where % 3 != 0 && pages > 0) {
        at = (where >> 8) % pages * kPageBytes + (where & 0xFF);
    }
    const uint64_t room = size - std::min(at, size);
    switch (kind) {
        case 0:
        case 1: {
            const Bytes bytes = feed.bytes(1 + feed.below(64));
            file.write(at, bytes.first(std::min<size_t>(bytes.size(), room)));
            break;
        }
        case 2: {
            if (room > 0) {
                Input byte = file.read(at, 1);
                byte[0] ^= static_cast<std::byte>(feed.u8() | 1);
                file.write(at, byte);
            }
            break;
        }
        case 3:
            file.truncate(at);
            break;
        case 4:
            file.write(at, Input(std::min<uint64_t>(room, kPageBytes)));
            break;
        case 5: {  // A page of some file in the place of another one.
            const std::string& from =
                base.files[feed.below(static_cast<uint32_t>(base.files.size()))];
            rot = false;
            if (pages > 0 && must(files.exists(from))) {
                FileBytes source(files, from);
                const uint64_t source_pages = source.size() / kPageBytes;
                if (source_pages > 0) {
                    file.write((where >> 8) % pages * kPageBytes,
                               source.read(feed.u32() % source_pages * kPageBytes, kPageBytes));
                }
            }
            break;
        }
        case 6:
            rot = !path.ends_with("/superblock");
            must(files.remove(path));
            return true;
        default: {
            rot = false;
            const Bytes bytes = feed.bytes(feed.below(64));
            file.write(size, bytes);
        }
    }
    file.sync();
    return true;
}

// ---- Using the pool ---------------------------------------------------------------------------

void check_truth(Pool& pool, const Base& base) {
    for (const auto& [source, bytes] : base.truth) {
        const auto found = pool.find(source);
        if (!found) {
            require(pool.read_only_reason().has_value() || !found.error().message().empty(),
                    "what is missing is missed");
            require(pool.read_only_reason().has_value(),
                    "an image, volume or snapshot does not vanish from a pool that is well");
            continue;
        }
        // Page by page, so that damage of one page hides no other.
        const auto reader = pool.open_reader(source);
        if (!reader) {
            continue;
        }
        require((*reader)->size_bytes() == bytes.size(), "a size does not change");
        constexpr size_t kStep = 8 * kPageBytes;
        Input step(kStep);
        for (size_t at = 0; at < bytes.size(); at += kStep) {
            if ((*reader)->read(at, step)) {
                require(equal(step, Bytes(bytes).subspan(at, kStep)),
                        "no byte that is served is wrong: " + source + " at " + std::to_string(at));
            }
        }
    }
}

void look(Pool& pool) {
    for (const auto& entities : {pool.images(), pool.volumes()}) {
        for (const nova::EntityInfo& entity : entities) {
            (void)read_all(pool, entity.name, 8 << 20);
            (void)pool.detail(entity.name);
        }
    }
    if (const auto snapshots = pool.snapshots(""); snapshots) {
        for (const nova::EntityInfo& entity : *snapshots) {
            (void)read_all(pool, entity.name, 8 << 20);
        }
    }
    (void)pool.diff("a", "a@s", [](nova::DiffRange) -> Result<void> { return {}; });
    (void)pool.stats();
    (void)pool.warnings();
}

/// Writes and removes; what was written must be there after the pool was closed and opened.
void use(io::SimulatedMachine& machine, std::unique_ptr<Pool> pool) {
    const Input data = content(4711, 4);
    bool written = false;
    if (pool->create_volume("written", 1 << 20)) {
        if (const auto device = pool->attach("written", {}); device) {
            const iovec part{.iov_base = const_cast<std::byte*>(data.data()),
                             .iov_len = data.size()};
            written = (*device)->write(3 * kPageBytes, std::span(&part, 1), IoMode::kMayBlock) &&
                      flush(**device);
        }
    }
    if (const auto device = pool->attach("a", {}); device) {
        const iovec part{.iov_base = const_cast<std::byte*>(data.data()), .iov_len = 512};
        (void)(*device)->write(512, std::span(&part, 1), IoMode::kMayBlock);
        (void)flush(**device);
    }
    (void)pool->rollback("a", "s");
    (void)pool->resize("b", 1 << 20);
    (void)pool->remove({"c"});
    (void)pool->gc({});
    (void)pool->checkpoint();
    if (!pool->close()) {
        return;
    }
    pool.reset();
    auto again = Pool::open(machine.process_env(), kDirectory, options());
    require(again.has_value(),
            again ? std::string()
                  : "a pool that was closed opens again: " + std::string(again.error().message()));
    if (written) {
        Input expected(1 << 20);
        std::ranges::copy(data, expected.begin() + std::ptrdiff_t{3} * kPageBytes);
        const auto now = read_all(**again, "written", UINT64_MAX);
        require(now && *now == expected, "what was flushed is there");
    }
}

void run(Feed& feed) {
    const Base& base = base_of(feed.below(kBases));
    const uint8_t flags = feed.u8();
    io::SimulatedMachine machine(base.machine->files().fork(), 99);
    uint32_t changes = 0;
    bool rot = false;
    std::vector<std::string> changed;
    while (!feed.empty() && changes < kMaxChanges) {
        std::string path;
        if (change(feed, machine.files(), base, rot, path)) {
            ++changes;
            changed.push_back(path);
        }
    }
    if ((flags & 1) != 0) {
        for (const std::string& path : changed) {
            if (must(machine.files().exists(path))) {
                fix_checksums(machine.files(), path);
            }
        }
    }
    auto pool = Pool::open(machine.process_env(), kDirectory, options());
    if (!pool) {
        require(!pool.error().message().empty(), "a refusal says why");
        return;
    }
    if (base.strict && changes <= 1 && (changes == 0 || rot) && (flags & 1) == 0) {
        check_truth(**pool, base);
    }
    look(**pool);
    if ((flags & 2) != 0) {
        use(machine, *std::move(pool));
    }
}

}  // namespace

void add_seeds(std::vector<Input>& out) {
    // Each file of each pool, each kind of change, at a few places.
    for (unsigned which = 0; which < kBases; ++which) {
        const size_t files = base_of(which).files.size();
        for (unsigned i = 0; i < files * 8; ++i) {
            Input input;
            append_byte(input, which);
            append_byte(input, i % 4);
            append_byte(input, i % static_cast<unsigned>(files));
            append_byte(input, i / static_cast<unsigned>(files));
            append_number(input, 1 + 256 * (i * 7) + (i * 5) % 100);
            append_number(input, uint64_t{i} * 0x0101'0101'0101U);
            out.push_back(std::move(input));
        }
    }
}

}  // namespace stellarium::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    stellarium::fuzz::Feed feed(data, size);
    stellarium::fuzz::run(feed);
    return 0;
}
