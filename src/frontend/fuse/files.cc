#include "frontend/fuse/files.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <set>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/uio.h>

#include "base/flush_device.h"
#include "frontend/fuse/tree.h"
#include "nova/iovecs.h"
#include "nova/limits.h"

namespace stellarium::fuse {
namespace {

using nova::kSectorBytes;
using nova::to_iovec;

constexpr uint64_t down(uint64_t bytes) {
    return bytes / kSectorBytes * kSectorBytes;
}
constexpr uint64_t up(uint64_t bytes) {
    return nova::round_up_to_sectors(bytes);
}

/// A lock of whole sectors, or kWouldBlock where it is not to be waited for.
template <typename Lock>
Result<Lock> locked(std::shared_mutex& mutex, IoMode mode) {
    if (mode != IoMode::kNoWait) {
        return Lock(mutex);
    }
    Lock lock(mutex, std::try_to_lock);
    if (!lock.owns_lock()) {
        return fail(ErrorCode::kWouldBlock, "a part of a sector is being written");
    }
    return lock;
}

iovec part_of(Bytes bytes) {
    // A vector for writing is read only.
    return {.iov_base = const_cast<std::byte*>(bytes.data()), .iov_len = bytes.size()};
}

}  // namespace

struct Files::Node {
    explicit Node(uint64_t number_in) : number(number_in) {}

    const uint64_t number;
    /// Whole sectors are written with it shared; what reads a sector first to change a part of it
    /// holds it exclusively.
    std::shared_mutex sectors;

    std::mutex mutex;
    // Set with the first attachment, with the mutex held, and the same from then on:
    nova::EntityKind kind = nova::EntityKind::kVolume;
    std::string name;          ///< In messages: DIRECTORY/volumes/NAME, when it was opened.
    uint64_t image_bytes = 0;  ///< True size of what is no volume.
    // Guarded by mutex:
    std::shared_ptr<BlockDevice> writer;  ///< As long as anybody holds.
    std::shared_ptr<BlockDevice> reader;  ///< As long as there are others.
    std::shared_ptr<nova::Reader> map;    ///< Where an image has data; made when asked for.
    size_t holding = 0;                   ///< Open files with kOpenHolds.
    size_t others = 0;                    ///< Without.
    bool gone = false;                    ///< Not in nodes_ any more: look again.
    std::optional<Error> failure;         ///< Why an earlier daemon's files cannot be served.
};

Files::Files(nova::Pool& pool, OpenTable& table, FilesOptions options)
    : pool_(pool), table_(table), options_(std::move(options)) {}

Files::~Files() {
    stop();
}

Result<Files::NodePtr> Files::find(uint64_t node) const {
    const std::shared_lock lock(mutex_);
    const auto found = nodes_.find(node);
    if (found == nodes_.end()) {
        return fail(ErrorCode::kIo, fmt::format("node {} is not open", node));
    }
    return found->second;
}

Files::NodePtr Files::find_or_make(uint64_t node) {
    const std::lock_guard lock(mutex_);
    NodePtr& entry = nodes_[node];
    if (!entry) {
        entry = std::make_shared<Node>(node);
    }
    return entry;
}

// --- Attaching -----------------------------------------------------------------------------------
// With the node's mutex held.

Result<void> Files::attach(Node& node, bool writing) {
    STELLARIUM_ASSIGN(const nova::EntityInfo info, pool_.find(entity_of(node.number)));
    if (node.name.empty()) {
        node.kind = info.kind;
        node.image_bytes = info.size_bytes;
        node.name = fmt::format("{}/{}", options_.directory, path_of(info));
    }
    if (writing) {
        // Also one that could not be restored: whose it is, is on record.
        for (const nova::Pool::AttachmentRecord& record : pool_.attachments()) {
            if (record.source == info.name) {
                return fail(ErrorCode::kBusy, fmt::format("'{}' is attached elsewhere ({})",
                                                          info.name, record.label));
            }
        }
    }
    STELLARIUM_ASSIGN(auto device, pool_.attach(info.name, {.read_only = !writing,
                                                            .label = "file " + node.name,
                                                            .id = info.id}));
    if (options_.resized) {
        device->set_resize_listener(
            [this, number = node.number](uint64_t) { options_.resized(number); });
    }
    (writing ? node.writer : node.reader) = std::move(device);
    return {};
}

/// Ends attachments that nobody needs, and the node when nothing is open.
void Files::let_go(Node& node) {
    const auto release = [](std::shared_ptr<BlockDevice>& device) {
        device->set_resize_listener({});
        device.reset();
    };
    if (node.holding == 0 && node.writer) {
        if (const Result<void> flushed = flush_device(*node.writer); !flushed) {
            options_.warn(fmt::format("{}: {}", node.name, flushed.error().message()));
        }
        release(node.writer);
    }
    if (node.others == 0) {
        if (node.reader) {
            release(node.reader);
        }
        node.map.reset();
    }
    if (node.holding == 0 && node.others == 0) {
        node.gone = true;
        const std::lock_guard lock(mutex_);
        nodes_.erase(node.number);
    }
}

void Files::adopt() {
    std::map<uint64_t, std::vector<OpenFile>> open;
    for (const OpenFile& file : table_.files()) {
        open[file.node].push_back(file);
    }
    for (const auto& [number, files] : open) {
        const NodePtr node = find_or_make(number);
        const std::lock_guard lock(node->mutex);
        for (const OpenFile& file : files) {
            ++((file.flags & kOpenHolds) != 0 ? node->holding : node->others);
        }
        Result<void> attached;
        if (node->holding > 0) {
            attached = attach(*node, true);
        }
        if (attached && node->others > 0) {
            attached = attach(*node, false);
        }
        if (!attached) {
            node->failure = attached.error();
            options_.warn(
                fmt::format("{} is open, and cannot be served: {}",
                            node->name.empty() ? fmt::format("node {}", number) : node->name,
                            attached.error().message()));
        }
    }
}

/// The flags that the file has in the table.
Result<uint32_t> Files::attach_for(Node& node, int flags) {
    const bool writing = (flags & O_ACCMODE) != O_RDONLY;
    const bool direct = (flags & O_DIRECT) != 0;
    if (node.failure) {
        return std::unexpected(*node.failure);
    }
    STELLARIUM_ASSIGN(const nova::EntityInfo info, pool_.find(entity_of(node.number)));
    const bool volume = info.kind == nova::EntityKind::kVolume;
    if (writing && !volume) {
        return fail(ErrorCode::kReadOnly,
                    fmt::format("'{}' does not change: write to a clone of it", info.name));
    }
    uint32_t result = 0;
    if (writing) {
        result |= kOpenWriting | kOpenHolds;
    }
    if (!direct && (!volume || writing || node.writer)) {
        result |= kOpenCached | (volume ? kOpenHolds : 0U);
    }
    const bool holds = (result & kOpenHolds) != 0;
    if (holds ? !node.writer : !node.reader) {
        STELLARIUM_TRY(attach(node, holds));
        if (options_.attached) {
            options_.attached(info.name);
        }
    }
    return result;
}

Result<Opened> Files::open_locked(Node& node, int flags, uint64_t unique, bool resent) {
    if (resent) {
        // Done by an earlier daemon, whose answer did not arrive. Its pages are those of before.
        if (const auto left = table_.find_left(unique); left && left->node == node.number) {
            return Opened{.handle = left->handle,
                          .direct = (left->flags & kOpenCached) == 0,
                          .keep_cache = node.kind != nova::EntityKind::kVolume};
        }
    }
    const bool was_held = node.writer != nullptr;
    STELLARIUM_ASSIGN(const uint32_t kept, attach_for(node, flags));
    STELLARIUM_ASSIGN(
        const uint64_t handle,
        table_.add({.unique = unique, .node = node.number, .flags = kept, .handle = 0}));
    ++((kept & kOpenHolds) != 0 ? node.holding : node.others);
    return Opened{.handle = handle,
                  .direct = (kept & kOpenCached) == 0,
                  .keep_cache = node.kind != nova::EntityKind::kVolume || was_held};
}

Result<Opened> Files::open(uint64_t number, int flags, uint64_t unique, bool resent) {
    while (true) {
        const NodePtr node = find_or_make(number);
        const std::lock_guard lock(node->mutex);
        if (node->gone) {
            continue;
        }
        auto opened = open_locked(*node, flags, unique, resent);
        if (!opened) {
            if (opened.error().code() == ErrorCode::kBusy) {
                options_.warn(
                    fmt::format("a file is not opened for writing: {}", opened.error().message()));
            }
            let_go(*node);
        }
        return opened;
    }
}

void Files::release(uint64_t handle) {
    const auto file = table_.find(handle);
    if (!file) {
        return;  // Done by an earlier daemon, whose answer did not arrive.
    }
    const auto node = find(file->node);
    if (!node) {
        table_.remove(handle);
        return;
    }
    const std::lock_guard lock((*node)->mutex);
    --((file->flags & kOpenHolds) != 0 ? (*node)->holding : (*node)->others);
    let_go(**node);
    table_.remove(handle);
}

std::vector<std::string> Files::open_names(size_t at_most) const {
    std::set<uint64_t> nodes;
    for (const OpenFile& file : table_.files()) {
        nodes.insert(file.node);
    }
    std::vector<std::string> names;
    for (const uint64_t node : nodes) {
        if (names.size() == at_most) {
            break;
        }
        const auto info = pool_.find(entity_of(node));
        names.push_back(info ? path_of(*info) : fmt::format("node {}", node));
    }
    return names;
}

void Files::stop() {
    std::unordered_map<uint64_t, NodePtr> nodes;
    {
        const std::lock_guard lock(mutex_);
        nodes.swap(nodes_);
    }
    for (const auto& [number, node] : nodes) {
        const std::lock_guard lock(node->mutex);
        node->holding = 0;
        node->others = 0;
        let_go(*node);
    }
}

// --- Reading and writing -------------------------------------------------------------------------

Result<std::shared_ptr<BlockDevice>> Files::device_of(Node& node, bool writing) const {
    const std::lock_guard lock(node.mutex);
    if (node.failure) {
        return std::unexpected(*node.failure);
    }
    if (node.writer) {
        return node.writer;
    }
    if (writing || !node.reader) {
        return fail(writing ? ErrorCode::kReadOnly : ErrorCode::kIo,
                    fmt::format("{} is not open for that", node.name));
    }
    return node.reader;
}

Result<Bytes> Files::read(uint64_t number, uint64_t handle, uint64_t offset_bytes,
                          size_t length_bytes, MutableBytes scratch) {
    STELLARIUM_ASSIGN(const NodePtr node, find(number));
    STELLARIUM_ASSIGN(const auto device, device_of(*node, false));
    // An image need not end with a whole sector, and its device does.
    const uint64_t size =
        node->kind == nova::EntityKind::kVolume ? device->size_bytes() : node->image_bytes;
    if (offset_bytes >= size) {
        return Bytes();
    }
    length_bytes = std::min(length_bytes, size - offset_bytes);
    const uint64_t start = down(offset_bytes);
    const uint64_t end = up(offset_bytes + length_bytes);
    if (end - start > scratch.size()) {
        return fail(ErrorCode::kInvalidArgument,
                    fmt::format("a read of {} bytes is longer than was agreed on", length_bytes));
    }
    const auto file = table_.find(handle);
    const bool cached = file && (file->flags & kOpenCached) != 0;
    const iovec part = to_iovec(scratch.first(end - start));
    STELLARIUM_TRY(
        device->read(start, {&part, 1}, cached ? IoMode::kMayBlockOnce : IoMode::kMayBlock));
    return Bytes(scratch.subspan(offset_bytes - start, length_bytes));
}

Result<size_t> Files::write(uint64_t number, uint64_t offset_bytes, Bytes data, IoMode mode) {
    STELLARIUM_ASSIGN(const NodePtr node, find(number));
    STELLARIUM_ASSIGN(const auto device, device_of(*node, true));
    const uint64_t size = device->size_bytes();
    if (data.empty()) {
        return size_t{0};
    }
    if (offset_bytes >= size) {
        return fail(
            ErrorCode::kNoSpace,
            fmt::format("{} ends at {}: enlarge it (stellarctl volume resize)", node->name, size));
    }
    data = data.first(std::min<uint64_t>(data.size(), size - offset_bytes));
    const uint64_t end_bytes = offset_bytes + data.size();
    if (offset_bytes % kSectorBytes == 0 && end_bytes % kSectorBytes == 0) {
        STELLARIUM_ASSIGN(const auto lock,
                          locked<std::shared_lock<std::shared_mutex>>(node->sectors, mode));
        const iovec part = part_of(data);
        STELLARIUM_TRY(device->write(offset_bytes, {&part, 1}, mode));
        return data.size();
    }
    // The first and the last sector are written with what they hold beside the data.
    STELLARIUM_ASSIGN(const auto lock,
                      locked<std::unique_lock<std::shared_mutex>>(node->sectors, mode));
    const uint64_t start = down(offset_bytes);
    const uint64_t stop = up(end_bytes);
    std::array<std::byte, kSectorBytes> first;
    std::array<std::byte, kSectorBytes> last;
    const auto load = [&](uint64_t sector, std::array<std::byte, kSectorBytes>& into) {
        const iovec part = to_iovec(MutableBytes(into));
        return device->read(sector, {&part, 1}, mode);
    };
    std::vector<iovec> parts;
    Bytes rest = data;
    if (offset_bytes % kSectorBytes != 0) {
        STELLARIUM_TRY(load(start, first));
        const size_t count = std::min<uint64_t>(rest.size(), start + kSectorBytes - offset_bytes);
        std::memcpy(first.data() + offset_bytes % kSectorBytes, rest.data(), count);
        parts.push_back(part_of(Bytes(first)));
        rest = rest.subspan(count);
    }
    if (const size_t whole = down(rest.size()); whole > 0) {
        parts.push_back(part_of(rest.first(whole)));
        rest = rest.subspan(whole);
    }
    if (!rest.empty()) {
        STELLARIUM_TRY(load(stop - kSectorBytes, last));
        std::memcpy(last.data(), rest.data(), rest.size());
        parts.push_back(part_of(Bytes(last)));
    }
    STELLARIUM_TRY(device->write(start, parts, mode));
    return data.size();
}

Result<void> Files::zero(uint64_t number, uint64_t offset_bytes, uint64_t length_bytes,
                         bool discard, IoMode mode) {
    STELLARIUM_ASSIGN(const NodePtr node, find(number));
    STELLARIUM_ASSIGN(const auto device, device_of(*node, true));
    const uint64_t size = device->size_bytes();
    if (discard) {
        offset_bytes = std::min(offset_bytes, size);
        length_bytes = std::min(length_bytes, size - offset_bytes);
    }
    STELLARIUM_TRY(check_within(number, offset_bytes, length_bytes));
    const uint64_t end_bytes = offset_bytes + length_bytes;
    const uint64_t first = std::min(up(offset_bytes), end_bytes);
    const uint64_t last = std::max(first, down(end_bytes));
    static constexpr std::array<std::byte, kSectorBytes> kZeros{};
    if (first > offset_bytes) {
        STELLARIUM_TRY(
            write(number, offset_bytes, Bytes(kZeros).first(first - offset_bytes), mode));
    }
    if (last > first) {
        STELLARIUM_ASSIGN(const auto lock,
                          locked<std::shared_lock<std::shared_mutex>>(node->sectors, mode));
        STELLARIUM_TRY(discard ? device->discard(first, last - first, mode)
                               : device->write_zeroes(first, last - first, mode));
    }
    if (end_bytes > last) {
        STELLARIUM_TRY(write(number, last, Bytes(kZeros).first(end_bytes - last), mode));
    }
    return {};
}

Result<void> Files::check_within(uint64_t number, uint64_t offset_bytes, uint64_t length_bytes) {
    STELLARIUM_ASSIGN(const NodePtr node, find(number));
    STELLARIUM_ASSIGN(const auto device, device_of(*node, true));
    const uint64_t size = device->size_bytes();
    if (offset_bytes > size || length_bytes > size - offset_bytes) {
        return fail(
            ErrorCode::kNoSpace,
            fmt::format("{} ends at {}: enlarge it (stellarctl volume resize)", node->name, size));
    }
    return {};
}

void Files::flush_async(uint64_t number, std::function<void(Result<void>)> done) {
    const auto node = find(number);
    if (!node) {
        return done(std::unexpected(node.error()));
    }
    std::shared_ptr<BlockDevice> writer;
    {
        const std::lock_guard lock((*node)->mutex);
        if ((*node)->failure) {
            return done(std::unexpected(*(*node)->failure));
        }
        writer = (*node)->writer;
    }
    if (!writer) {
        return done({});  // Nothing is written through here.
    }
    writer->flush_async(std::move(done));
}

Result<std::optional<uint64_t>> Files::seek(uint64_t number, uint64_t offset_bytes, bool data) {
    using Found = std::optional<uint64_t>;
    STELLARIUM_ASSIGN(const NodePtr node, find(number));
    STELLARIUM_ASSIGN(const auto device, device_of(*node, false));
    std::shared_ptr<nova::Reader> map;
    {
        const std::lock_guard lock(node->mutex);
        if (node->kind != nova::EntityKind::kVolume && !node->map) {
            STELLARIUM_ASSIGN(const nova::EntityInfo info, pool_.find(entity_of(number)));
            STELLARIUM_ASSIGN(node->map, pool_.open_reader(info.name));
        }
        map = node->map;
    }
    const uint64_t size = map ? map->size_bytes() : device->size_bytes();
    if (offset_bytes >= size) {
        return Found();
    }
    if (!map) {
        return Found(data ? offset_bytes : size);
    }
    uint64_t position = offset_bytes;
    while (position < size) {
        STELLARIUM_ASSIGN(const auto range, map->next_data(position));
        if (data) {
            return range ? Found(range->first) : Found();
        }
        if (!range || range->first > position) {
            return Found(position);
        }
        position = range->first + range->second;
    }
    return Found(size);
}

}  // namespace stellarium::fuse
