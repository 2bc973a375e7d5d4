#include "io/simulated.h"

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

#include <fmt/format.h>
#include <sys/mman.h>

#include "io/failure.h"
#include "io/simulated_disk.h"

namespace stellarium::io {
namespace {

constexpr uint64_t kMaxFileBytes = uint64_t{16} << 40;
constexpr uint64_t kUnlimitedBytes = uint64_t{1} << 50;
constexpr size_t kMaxNameBytes = 255;
constexpr int kFirstProcessId = 1000;
constexpr std::string_view kBootIdPath = "/proc/sys/kernel/random/boot_id";

bool is_transfer(OperationKind kind) {
    return kind == OperationKind::kRead || kind == OperationKind::kReadNoWait ||
           kind == OperationKind::kWrite;
}

bool is_sync(OperationKind kind) {
    return kind == OperationKind::kDatasync || kind == OperationKind::kSyncDirectory;
}

/// "/a/./b//c/.." gives {"a", "b"}.
std::vector<std::string> components_of(std::string_view path) {
    std::vector<std::string> components;
    while (!path.empty()) {
        const size_t slash = std::min(path.find('/'), path.size());
        const std::string_view component = path.substr(0, slash);
        path.remove_prefix(std::min(slash + 1, path.size()));
        if (component == "..") {
            if (!components.empty()) {
                components.pop_back();
            }
        } else if (!component.empty() && component != ".") {
            components.emplace_back(component);
        }
    }
    return components;
}

class CopiedBytes final : public MappedBytes {
  public:
    explicit CopiedBytes(std::vector<std::byte> bytes) : bytes_(std::move(bytes)) {}
    Bytes bytes() const override { return bytes_; }
    Result<void> fetch(uint64_t /*offset_bytes*/, uint64_t /*length_bytes*/) const override {
        return {};
    }

  private:
    std::vector<std::byte> bytes_;
};

struct ArmedFault {
    Fault fault;
    uint64_t matches = 0;
    bool spent = false;
};

/// What admit() found for an operation that may go ahead, though perhaps not to a good end.
struct Admission {
    int errno_value = 0;  ///< Fail with this, if not 0.
    bool lose_unsynced = false;
    bool short_transfer = false;
    bool dies = false;  ///< Do it, then report that the machine has halted.
};

}  // namespace

// ---- The machine --------------------------------------------------------------------------------

struct SimulatedFileSystem::State {
    mutable std::mutex mutex;
    InodeRef root;
    uint64_t next_inode_id = 1;
    uint64_t next_name_sequence = 1;
    uint64_t boots = 1;
    uint64_t space_limit_bytes = kUnlimitedBytes;

    // The running process. Files and locks of an earlier epoch are dead, for the reason named.
    uint64_t epoch = 0;
    std::string last_death;
    int process_id = kFirstProcessId;
    std::map<const Inode*, int> locks;              ///< To the holder's pid.
    std::map<const Inode*, unsigned> shared_locks;  ///< How many there are.

    std::vector<ArmedFault> faults;
    uint64_t faults_fired = 0;
    OperationCounts counts;
    uint64_t mutations_until_halt = 0;  ///< 0: no halt point.
    HaltSide halt_side = HaltSide::kInFlight;
    bool halted = false;

    std::mutex observer_mutex;
    std::shared_ptr<const std::function<void(OperationKind, std::string_view)>> observer;

    /// Without the lock, before each operation.
    void notify(OperationKind kind, std::string_view path) {
        std::shared_ptr<const std::function<void(OperationKind, std::string_view)>> calls;
        {
            const std::lock_guard guard(observer_mutex);
            calls = observer;
        }
        if (calls) {
            (*calls)(kind, path);
        }
    }

    std::unexpected<Error> halted_error(std::string_view path) const {
        return fail(ErrorCode::kIo, fmt::format("{}: the simulated machine has halted", path));
    }

    /// Counts the operation, applies the halt point and the faults.
    Result<Admission> admit(OperationKind kind, std::string_view path, bool mutating) {
        if (halted) {
            return halted_error(path);
        }
        ++counts.total;
        ++counts.by_kind[static_cast<size_t>(kind)];
        Admission admission;
        if (mutating) {
            ++counts.mutating;
            const bool halts = mutations_until_halt == 1;
            if (mutations_until_halt > 0) {
                --mutations_until_halt;
            }
            if (halts) {
                halted = true;
                if (halt_side == HaltSide::kBefore ||
                    (halt_side != HaltSide::kAfter && is_sync(kind))) {
                    return halted_error(path);
                }
                admission.dies = true;
                admission.short_transfer = halt_side == HaltSide::kPartial && is_transfer(kind);
                return admission;
            }
        }
        for (ArmedFault& armed : faults) {
            const Fault& fault = armed.fault;
            if (armed.spent || (fault.kind && *fault.kind != kind) ||
                path.find(fault.path_part) == std::string_view::npos ||
                ++armed.matches < fault.nth) {
                continue;
            }
            armed.spent = !fault.for_ever;
            ++faults_fired;
            if (fault.short_transfer) {
                admission.short_transfer = is_transfer(kind);
            } else if (fault.errno_value != EINTR || is_transfer(kind)) {
                admission.errno_value = fault.errno_value;
                admission.lose_unsynced = fault.lose_unsynced;
            }
        }
        return admission;
    }

    InodeRef make_inode(bool is_directory, const Inode& parent) {
        const auto inode = std::make_shared<Inode>();
        inode->id = next_inode_id++;
        inode->is_directory = is_directory;
        inode->in_memory = parent.in_memory;
        inode->file_system_id = parent.file_system_id;
        return inode;
    }

    Result<InodeRef> find(std::string_view operation, const std::string& path) const {
        InodeRef at = root;
        for (const std::string& name : components_of(path)) {
            if (!at->is_directory) {
                return failed(ENOTDIR, operation, path);
            }
            const auto entry = at->entries.find(name);
            if (entry == at->entries.end()) {
                return failed(ENOENT, operation, path);
            }
            at = entry->second;
        }
        return at;
    }

    struct Place {
        InodeRef directory;
        std::string name;
        InodeRef inode;  ///< Null when the name is free.
    };

    /// The directory that holds the last name of a path.
    Result<Place> find_place(std::string_view operation, const std::string& path) const {
        std::vector<std::string> components = components_of(path);
        if (components.empty()) {
            return failed(EBUSY, operation, path);
        }
        Place place;
        place.name = std::move(components.back());
        if (place.name.size() > kMaxNameBytes) {
            return failed(ENAMETOOLONG, operation, path);
        }
        place.directory = root;
        components.pop_back();
        for (const std::string& name : components) {
            const auto entry = place.directory->entries.find(name);
            if (entry == place.directory->entries.end()) {
                return failed(ENOENT, operation, path);
            }
            if (!entry->second->is_directory) {
                return failed(ENOTDIR, operation, path);
            }
            place.directory = entry->second;
        }
        const auto entry = place.directory->entries.find(place.name);
        if (entry != place.directory->entries.end()) {
            place.inode = entry->second;
        }
        return place;
    }

    void set_name(const Place& place, InodeRef inode) {
        NameChange change;
        change.sequence = next_name_sequence++;
        change.sets.emplace_back(place.name, std::move(inode));
        place.directory->change_names(std::move(change));
    }

    uint64_t free_bytes() const {
        const uint64_t used = allocated_pages_in_tree(*root) * kPageBytes;
        return used < space_limit_bytes ? space_limit_bytes - used : 0;
    }

    /// How many of the bytes at `offset` can get space: all, unless the limit is near.
    uint64_t bytes_with_space(const Inode& file, uint64_t offset, uint64_t length) const {
        if (space_limit_bytes == kUnlimitedBytes || file.in_memory || file.shared) {
            return length;
        }
        uint64_t free_pages = free_bytes() / kPageBytes;
        uint64_t at = offset;
        while (at < offset + length) {
            if (!file.seen.is_allocated(at / kPageBytes)) {
                if (free_pages == 0) {
                    return at - offset;
                }
                --free_pages;
            }
            at = (at / kPageBytes + 1) * kPageBytes;
        }
        return length;
    }

    /// What Linux says at kBootIdPath: another value after each loss of power.
    void write_boot_id() {
        std::vector<std::string> names = components_of(kBootIdPath);
        const std::string name = std::move(names.back());
        names.pop_back();
        InodeRef at = root;
        for (const std::string& each : names) {
            InodeRef& child = at->entries[each];
            if (!child) {
                child = make_inode(true, *at);
                // Not of any disk: nothing of it is queued, counted or kept.
                child->in_memory = true;
            }
            if (at == root) {
                at->durable_entries[each] = child;
                child->mounted = FileSystemType{FileSystemKind::kMemory, "proc"};
                child->file_system_id = child->id;
            }
            at = InodeRef(child);
        }
        const InodeRef file = make_inode(false, *at);
        file->write(bytes_of(std::string_view(fmt::format("simulated boot {}\n", boots))), 0);
        at->entries[name] = file;
    }

    void start_process(std::string why) {
        ++epoch;
        ++process_id;
        last_death = std::move(why);
        locks.clear();
        shared_locks.clear();
        faults.clear();
        mutations_until_halt = 0;
        halted = false;
    }

    /// A machine that continues from `root_of_copy`, without what runs on this one.
    std::shared_ptr<State> copy_with(InodeRef root_of_copy) const {
        auto copy = std::make_shared<State>();
        copy->root = std::move(root_of_copy);
        copy->next_inode_id = next_inode_id;
        copy->next_name_sequence = next_name_sequence;
        copy->boots = boots;
        copy->space_limit_bytes = space_limit_bytes;
        copy->process_id = process_id + 1;
        return copy;
    }
};

// ---- Files and locks ----------------------------------------------------------------------------

class SimulatedFile final : public File {
  public:
    using State = SimulatedFileSystem::State;

    SimulatedFile(std::shared_ptr<State> state, InodeRef inode, std::string path, bool writable)
        : state_(std::move(state)),
          inode_(std::move(inode)),
          path_(std::move(path)),
          writable_(writable),
          epoch_(state_->epoch) {}

    ~SimulatedFile() override {
        for (const MutableBytes mapping : mappings_) {
            if (::munmap(mapping.data(), mapping.size()) != 0) {
                std::perror("stellarium: munmap");
                std::abort();
            }
        }
        if (holds_lock_ || holds_shared_lock_) {
            const std::lock_guard guard(state_->mutex);
            if (epoch_ == state_->epoch) {
                unlock();
            }
        }
    }
    SimulatedFile(const SimulatedFile&) = delete;
    SimulatedFile& operator=(const SimulatedFile&) = delete;

    const std::string& path() const override { return path_; }

    Result<size_t> pread(MutableBytes into, uint64_t offset_bytes) override {
        const iovec one{.iov_base = into.data(), .iov_len = into.size()};
        return preadv(std::span(&one, 1), offset_bytes, IoMode::kMayBlock);
    }

    Result<size_t> preadv(std::span<const iovec> into, uint64_t offset_bytes,
                          IoMode mode) override {
        const OperationKind kind =
            mode == IoMode::kNoWait ? OperationKind::kReadNoWait : OperationKind::kRead;
        state_->notify(kind, path_);
        const std::lock_guard guard(state_->mutex);
        STELLARIUM_ASSIGN(const Admission admission, admit(kind, "read", false));
        const uint64_t size = inode_->seen_size_bytes;
        uint64_t wanted = 0;
        for (const iovec& part : into) {
            wanted += part.iov_len;
        }
        uint64_t left = offset_bytes < size ? std::min(wanted, size - offset_bytes) : 0;
        if (admission.short_transfer && left > 1) {
            left /= 2;
        }
        const uint64_t total = left;
        for (const iovec& part : into) {
            const size_t step = std::min<uint64_t>(left, part.iov_len);
            inode_->read({static_cast<std::byte*>(part.iov_base), step},
                         offset_bytes + (total - left));
            left -= step;
        }
        return total;
    }

    Result<size_t> pwrite(Bytes from, uint64_t offset_bytes) override {
        state_->notify(OperationKind::kWrite, path_);
        const std::lock_guard guard(state_->mutex);
        STELLARIUM_TRY(check_writable("write"));
        STELLARIUM_ASSIGN(const Admission admission, admit(OperationKind::kWrite, "write", true));
        if (from.empty()) {
            return size_t{0};
        }
        STELLARIUM_TRY(check_range("write", offset_bytes, from.size()));
        if (admission.short_transfer && from.size() > 1) {
            from = from.first(from.size() / 2);
        }
        from = from.first(state_->bytes_with_space(*inode_, offset_bytes, from.size()));
        if (from.empty()) {
            return failed_at(ENOSPC, "write", offset_bytes);
        }
        inode_->write(from, offset_bytes);
        return ended(admission, from.size());
    }

    Result<size_t> pwritev(std::span<const iovec> from, uint64_t offset_bytes,
                           Caching /*caching*/) override {
        std::vector<std::byte> gathered;
        for (const iovec& part : from) {
            const auto* begin = static_cast<const std::byte*>(part.iov_base);
            gathered.insert(gathered.end(), begin, begin + part.iov_len);
        }
        return pwrite(gathered, offset_bytes);
    }

    Result<void> datasync() override {
        state_->notify(OperationKind::kDatasync, path_);
        const std::lock_guard guard(state_->mutex);
        STELLARIUM_TRY(check_not_poisoned("sync"));
        STELLARIUM_TRY(check_alive("sync"));
        STELLARIUM_ASSIGN(const Admission admission,
                          state_->admit(OperationKind::kDatasync, path_, true));
        if (admission.errno_value != 0) {
            poisoned_ = true;
            if (admission.lose_unsynced) {
                inode_->lose_unsynced();
            }
            return fail(
                ErrorCode::kIo,
                Error::from_errno(admission.errno_value, fmt::format("sync {}", path_)).message() +
                    "; written data may be lost, so this file takes no more writes");
        }
        inode_->sync_data();
        return ended(admission);
    }

    Result<uint64_t> size_bytes() override {
        state_->notify(OperationKind::kQuery, path_);
        const std::lock_guard guard(state_->mutex);
        STELLARIUM_TRY(admit(OperationKind::kQuery, "stat", false));
        return inode_->seen_size_bytes;
    }

    Result<void> truncate(uint64_t size_bytes) override {
        state_->notify(OperationKind::kTruncate, path_);
        const std::lock_guard guard(state_->mutex);
        STELLARIUM_TRY(check_writable("set the size of"));
        STELLARIUM_ASSIGN(const Admission admission,
                          admit(OperationKind::kTruncate, "set the size of", true));
        STELLARIUM_TRY(check_range("set the size of", size_bytes, 0));
        inode_->truncate(size_bytes);
        return ended(admission);
    }

    Result<void> punch_hole(uint64_t offset_bytes, uint64_t length_bytes) override {
        state_->notify(OperationKind::kPunchHole, path_);
        const std::lock_guard guard(state_->mutex);
        STELLARIUM_TRY(check_writable("punch a hole in"));
        STELLARIUM_ASSIGN(const Admission admission,
                          admit(OperationKind::kPunchHole, "punch a hole in", true));
        STELLARIUM_TRY(check_range("punch a hole in", offset_bytes, length_bytes));
        if (length_bytes > 0) {
            inode_->punch(offset_bytes, length_bytes);
        }
        return ended(admission);
    }

    Result<void> allocate(uint64_t offset_bytes, uint64_t length_bytes) override {
        state_->notify(OperationKind::kAllocate, path_);
        const std::lock_guard guard(state_->mutex);
        STELLARIUM_TRY(check_writable("allocate"));
        STELLARIUM_ASSIGN(const Admission admission,
                          admit(OperationKind::kAllocate, "allocate", true));
        STELLARIUM_TRY(check_range("allocate", offset_bytes, length_bytes));
        if (state_->bytes_with_space(*inode_, offset_bytes, length_bytes) < length_bytes) {
            return failed_at(ENOSPC, "allocate", offset_bytes);
        }
        const uint64_t end = offset_bytes + length_bytes;
        for (uint64_t page = offset_bytes / kPageBytes; !inode_->shared && page * kPageBytes < end;
             ++page) {
            inode_->seen.allocate(page);
        }
        return ended(admission);
    }

    Result<std::optional<std::pair<uint64_t, uint64_t>>> next_data(uint64_t offset_bytes) override {
        state_->notify(OperationKind::kQuery, path_);
        const std::lock_guard guard(state_->mutex);
        STELLARIUM_TRY(admit(OperationKind::kQuery, "seek to data in", false));
        return inode_->next_data(offset_bytes);
    }

    void drop_cache(uint64_t /*offset_bytes*/, uint64_t /*length_bytes*/) override {}
    void read_ahead(uint64_t /*offset_bytes*/, uint64_t /*length_bytes*/) override {}

    Result<std::unique_ptr<MappedBytes>> map(uint64_t offset_bytes,
                                             uint64_t length_bytes) override {
        state_->notify(OperationKind::kMap, path_);
        const std::lock_guard guard(state_->mutex);
        STELLARIUM_TRY(admit(OperationKind::kMap, "map", false));
        STELLARIUM_TRY(check_mappable(offset_bytes, length_bytes));
        std::vector<std::byte> bytes(length_bytes);
        inode_->read(bytes, offset_bytes);
        return std::make_unique<CopiedBytes>(std::move(bytes));
    }

    Result<MutableBytes> map_shared(uint64_t offset_bytes, uint64_t length_bytes) override {
        state_->notify(OperationKind::kMapShared, path_);
        const std::lock_guard guard(state_->mutex);
        STELLARIUM_TRY(check_not_poisoned("map"));
        STELLARIUM_TRY(admit(OperationKind::kMapShared, "map", false));
        STELLARIUM_TRY(check_mappable(offset_bytes, length_bytes));
        if (!writable_) {
            return failed_at(EACCES, "map", offset_bytes);
        }
        if (length_bytes == 0) {
            return MutableBytes();
        }
        inode_->make_shared();
        void* data = ::mmap(nullptr, length_bytes, PROT_READ | PROT_WRITE, MAP_SHARED,
                            inode_->shared->descriptor(), static_cast<off_t>(offset_bytes));
        if (data == MAP_FAILED) {  // NOLINT(performance-no-int-to-ptr)
            return failed_at(errno, "map", offset_bytes);
        }
        mappings_.emplace_back(static_cast<std::byte*>(data), length_bytes);
        return mappings_.back();
    }

    Result<FileIdentity> identity() override {
        state_->notify(OperationKind::kQuery, path_);
        const std::lock_guard guard(state_->mutex);
        STELLARIUM_TRY(admit(OperationKind::kQuery, "stat", false));
        return FileIdentity{.device = inode_->file_system_id, .inode = inode_->id};
    }

    Result<void> lock() override {
        state_->notify(OperationKind::kLock, path_);
        const std::lock_guard guard(state_->mutex);
        STELLARIUM_TRY(admit(OperationKind::kLock, "lock", false));
        const auto shared = state_->shared_locks.find(inode_.get());
        const unsigned own = holds_shared_lock_ ? 1 : 0;
        if (!holds_lock_ && (state_->locks.contains(inode_.get()) ||
                             (shared != state_->shared_locks.end() && shared->second > own))) {
            return fail(ErrorCode::kBusy, fmt::format("{} is in use", path_));
        }
        unlock();
        state_->locks.emplace(inode_.get(), state_->process_id);
        holds_lock_ = true;
        return {};
    }
    Result<void> lock_shared() override {
        state_->notify(OperationKind::kLock, path_);
        const std::lock_guard guard(state_->mutex);
        STELLARIUM_TRY(admit(OperationKind::kLock, "lock", false));
        if (!holds_lock_ && state_->locks.contains(inode_.get())) {
            return fail(ErrorCode::kBusy, fmt::format("{} is in use", path_));
        }
        unlock();
        ++state_->shared_locks[inode_.get()];
        holds_shared_lock_ = true;
        return {};
    }

    int descriptor() const override { return -1; }

  private:
    /// The state's mutex is held.
    void unlock() {
        if (std::exchange(holds_lock_, false)) {
            state_->locks.erase(inode_.get());
        }
        if (std::exchange(holds_shared_lock_, false)) {
            const auto shared = state_->shared_locks.find(inode_.get());
            if (--shared->second == 0) {
                state_->shared_locks.erase(shared);
            }
        }
    }

    std::unexpected<Error> failed_at(int errno_value, std::string_view operation,
                                     uint64_t offset_bytes) const {
        return std::unexpected(Error::from_errno(
            errno_value, fmt::format("{} {} at offset {}", operation, path_, offset_bytes)));
    }

    Result<void> check_alive(std::string_view operation) const {
        if (epoch_ != state_->epoch) {
            return fail(ErrorCode::kIo, fmt::format("{} {}: {} since this file was opened",
                                                    operation, path_, state_->last_death));
        }
        return {};
    }

    Result<void> check_not_poisoned(std::string_view operation) const {
        if (poisoned_) {
            return fail(ErrorCode::kIo,
                        fmt::format("{} {}: refused because an earlier sync of this file failed "
                                    "and written data may be lost",
                                    operation, path_));
        }
        return {};
    }

    /// The checks that the real file makes before it asks the system.
    Result<void> check_writable(std::string_view operation) const {
        STELLARIUM_TRY(check_not_poisoned(operation));
        if (!writable_) {
            return failed(EBADF, operation, path_);
        }
        return {};
    }

    Result<void> check_range(std::string_view operation, uint64_t offset_bytes,
                             uint64_t length_bytes) const {
        if (offset_bytes > kMaxFileBytes || length_bytes > kMaxFileBytes - offset_bytes) {
            return failed_at(EFBIG, operation, offset_bytes);
        }
        return {};
    }

    Result<void> check_mappable(uint64_t offset_bytes, uint64_t length_bytes) const {
        if (offset_bytes % kPageBytes != 0) {
            return failed_at(EINVAL, "map", offset_bytes);
        }
        const uint64_t size = inode_->seen_size_bytes;
        if (offset_bytes > size || length_bytes > size - offset_bytes) {
            return fail(ErrorCode::kInvalidArgument,
                        fmt::format("map {}: {} bytes at offset {} reach past the end at {}", path_,
                                    length_bytes, offset_bytes, size));
        }
        return {};
    }

    /// Whether the operation may be carried out. An injected error comes back as one.
    Result<Admission> admit(OperationKind kind, std::string_view operation, bool mutating) {
        STELLARIUM_TRY(check_alive(operation));
        STELLARIUM_ASSIGN(const Admission admission, state_->admit(kind, path_, mutating));
        if (admission.errno_value != 0) {
            return failed(admission.errno_value, operation, path_);
        }
        return admission;
    }

    Result<void> ended(const Admission& admission) const {
        if (admission.dies) {
            return state_->halted_error(path_);
        }
        return {};
    }
    Result<size_t> ended(const Admission& admission, size_t transferred) const {
        STELLARIUM_TRY(ended(admission));
        return transferred;
    }

    const std::shared_ptr<State> state_;
    const InodeRef inode_;
    const std::string path_;
    const bool writable_;
    const uint64_t epoch_;
    bool poisoned_ = false;
    bool holds_lock_ = false;
    bool holds_shared_lock_ = false;
    std::vector<MutableBytes> mappings_;
};

class SimulatedLock final : public FileLock {
  public:
    SimulatedLock(std::shared_ptr<SimulatedFileSystem::State> state, InodeRef inode)
        : state_(std::move(state)), inode_(std::move(inode)), epoch_(state_->epoch) {}
    ~SimulatedLock() override {
        const std::lock_guard guard(state_->mutex);
        if (epoch_ == state_->epoch) {
            state_->locks.erase(inode_.get());
            if (!state_->halted) {
                inode_->truncate(0);
            }
        }
    }
    SimulatedLock(const SimulatedLock&) = delete;
    SimulatedLock& operator=(const SimulatedLock&) = delete;

  private:
    const std::shared_ptr<SimulatedFileSystem::State> state_;
    const InodeRef inode_;
    const uint64_t epoch_;
};

// ---- The file system ----------------------------------------------------------------------------

namespace {

Result<Admission> without_injected_error(Result<Admission> admission, std::string_view operation,
                                         std::string_view path) {
    if (admission && admission->errno_value != 0) {
        return failed(admission->errno_value, operation, path);
    }
    return admission;
}

}  // namespace

SimulatedFileSystem::SimulatedFileSystem() : state_(std::make_shared<State>()) {
    state_->root = std::make_shared<Inode>();
    state_->root->id = state_->root->file_system_id = state_->next_inode_id++;
    state_->root->is_directory = true;
    state_->root->mounted = FileSystemType{FileSystemKind::kLocal, "simulated"};
    state_->write_boot_id();
}

SimulatedFileSystem::SimulatedFileSystem(std::shared_ptr<State> state) : state_(std::move(state)) {}

SimulatedFileSystem::~SimulatedFileSystem() = default;

std::unique_ptr<SimulatedFileSystem> SimulatedFileSystem::process_view() const {
    std::unique_ptr<SimulatedFileSystem> view(new SimulatedFileSystem(state_));
    const std::lock_guard guard(state_->mutex);
    view->epoch_ = state_->epoch;
    return view;
}

Result<void> SimulatedFileSystem::check_process(std::string_view path) const {
    if (epoch_ && *epoch_ != state_->epoch) {
        return fail(ErrorCode::kIo,
                    fmt::format("{}: {} since this process began", path, state_->last_death));
    }
    return {};
}

Result<std::unique_ptr<File>> SimulatedFileSystem::open(const std::string& path, OpenMode mode) {
    state_->notify(OperationKind::kOpen, path);
    const std::lock_guard guard(state_->mutex);
    STELLARIUM_TRY(check_process(path));
    auto place = state_->find_place("open", path);
    const bool may_create = mode == OpenMode::kCreate || mode == OpenMode::kCreateNew;
    const bool creates = place && !place->inode && may_create;
    STELLARIUM_ASSIGN(
        const Admission admission,
        without_injected_error(state_->admit(OperationKind::kOpen, path, creates), "open", path));
    if (!place) {
        return std::unexpected(std::move(place).error());
    }
    if (place->inode && mode == OpenMode::kCreateNew) {
        return failed(EEXIST, "open", path);
    }
    if (place->inode && place->inode->is_directory) {
        return failed(EISDIR, "open", path);
    }
    if (!place->inode && !creates) {
        return failed(ENOENT, "open", path);
    }
    if (creates) {
        place->inode = state_->make_inode(false, *place->directory);
        state_->set_name(*place, place->inode);
    }
    if (admission.dies) {
        return state_->halted_error(path);
    }
    return std::make_unique<SimulatedFile>(state_, place->inode, path, mode != OpenMode::kReadOnly);
}

Result<void> SimulatedFileSystem::make_directory(const std::string& path) {
    state_->notify(OperationKind::kMakeDirectory, path);
    const std::lock_guard guard(state_->mutex);
    STELLARIUM_TRY(check_process(path));
    STELLARIUM_ASSIGN(
        const Admission admission,
        without_injected_error(state_->admit(OperationKind::kMakeDirectory, path, true),
                               "create directory", path));
    if (components_of(path).empty()) {
        return failed(EEXIST, "create directory", path);
    }
    STELLARIUM_ASSIGN(const State::Place place, state_->find_place("create directory", path));
    if (place.inode) {
        return failed(EEXIST, "create directory", path);
    }
    state_->set_name(place, state_->make_inode(true, *place.directory));
    if (admission.dies) {
        return state_->halted_error(path);
    }
    return {};
}

Result<void> SimulatedFileSystem::rename(const std::string& from, const std::string& to) {
    const std::string both = from + " to " + to;
    state_->notify(OperationKind::kRename, both);
    const std::lock_guard guard(state_->mutex);
    STELLARIUM_TRY(check_process(from));
    STELLARIUM_ASSIGN(
        const Admission admission,
        without_injected_error(state_->admit(OperationKind::kRename, both, true), "rename", both));
    STELLARIUM_ASSIGN(const State::Place source, state_->find_place("rename", from));
    STELLARIUM_ASSIGN(const State::Place target, state_->find_place("rename to", to));
    if (!source.inode) {
        return failed(ENOENT, "rename", both);
    }
    if (source.directory->file_system_id != target.directory->file_system_id) {
        return failed(EXDEV, "rename", both);
    }
    if (source.inode->mounted || (target.inode && target.inode->mounted)) {
        return failed(EBUSY, "rename", both);
    }
    if (source.inode->is_directory) {
        const std::vector<std::string> below = components_of(to);
        const std::vector<std::string> above = components_of(from);
        if (below.size() > above.size() && std::equal(above.begin(), above.end(), below.begin())) {
            return failed(EINVAL, "rename", both);
        }
    }
    if (target.inode == source.inode) {
        return {};
    }
    if (target.inode) {
        if (target.inode->is_directory && !source.inode->is_directory) {
            return failed(EISDIR, "rename", both);
        }
        if (!target.inode->is_directory && source.inode->is_directory) {
            return failed(ENOTDIR, "rename", both);
        }
        if (!target.inode->entries.empty()) {
            return failed(ENOTEMPTY, "rename", both);
        }
    }
    NameChange change;
    change.sequence = state_->next_name_sequence++;
    change.sets.emplace_back(target.name, source.inode);
    if (source.directory == target.directory) {
        change.sets.emplace_back(source.name, nullptr);
    } else {
        NameChange removal;
        removal.sequence = change.sequence;
        removal.sets.emplace_back(source.name, nullptr);
        removal.target_directory = target.directory;
        source.directory->change_names(std::move(removal));
    }
    target.directory->change_names(std::move(change));
    if (admission.dies) {
        return state_->halted_error(both);
    }
    return {};
}

Result<void> SimulatedFileSystem::remove(const std::string& path) {
    state_->notify(OperationKind::kRemove, path);
    const std::lock_guard guard(state_->mutex);
    STELLARIUM_TRY(check_process(path));
    STELLARIUM_ASSIGN(
        const Admission admission,
        without_injected_error(state_->admit(OperationKind::kRemove, path, true), "remove", path));
    STELLARIUM_ASSIGN(const State::Place place, state_->find_place("remove", path));
    if (!place.inode) {
        return failed(ENOENT, "remove", path);
    }
    if (place.inode->mounted) {
        return failed(EBUSY, "remove", path);
    }
    if (!place.inode->entries.empty()) {
        return failed(ENOTEMPTY, "remove", path);
    }
    state_->set_name(place, nullptr);
    if (admission.dies) {
        return state_->halted_error(path);
    }
    return {};
}

Result<std::vector<DirectoryEntry>> SimulatedFileSystem::list(const std::string& directory) {
    state_->notify(OperationKind::kList, directory);
    const std::lock_guard guard(state_->mutex);
    STELLARIUM_TRY(check_process(directory));
    STELLARIUM_TRY(without_injected_error(state_->admit(OperationKind::kList, directory, false),
                                          "list", directory));
    STELLARIUM_ASSIGN(const InodeRef inode, state_->find("list", directory));
    if (!inode->is_directory) {
        return failed(ENOTDIR, "list", directory);
    }
    std::vector<DirectoryEntry> entries;
    for (const auto& [name, child] : inode->entries) {
        entries.push_back({name, child->is_directory});
    }
    return entries;
}

Result<bool> SimulatedFileSystem::exists(const std::string& path) {
    state_->notify(OperationKind::kQuery, path);
    const std::lock_guard guard(state_->mutex);
    STELLARIUM_TRY(check_process(path));
    STELLARIUM_TRY(
        without_injected_error(state_->admit(OperationKind::kQuery, path, false), "stat", path));
    return state_->find("stat", path).has_value();
}

Result<void> SimulatedFileSystem::sync_directory(const std::string& directory) {
    state_->notify(OperationKind::kSyncDirectory, directory);
    const std::lock_guard guard(state_->mutex);
    STELLARIUM_TRY(check_process(directory));
    STELLARIUM_ASSIGN(
        const Admission admission,
        without_injected_error(state_->admit(OperationKind::kSyncDirectory, directory, true),
                               "sync directory", directory));
    STELLARIUM_ASSIGN(const InodeRef inode, state_->find("open directory", directory));
    if (!inode->is_directory) {
        return failed(ENOTDIR, "open directory", directory);
    }
    inode->sync_names();
    if (admission.dies) {
        return state_->halted_error(directory);
    }
    return {};
}

Result<FileSystemSpace> SimulatedFileSystem::space(const std::string& path) {
    state_->notify(OperationKind::kQuery, path);
    const std::lock_guard guard(state_->mutex);
    STELLARIUM_TRY(check_process(path));
    constexpr std::string_view kOperation = "ask for the free space of";
    STELLARIUM_TRY(without_injected_error(state_->admit(OperationKind::kQuery, path, false),
                                          kOperation, path));
    STELLARIUM_ASSIGN(const InodeRef inode, state_->find(kOperation, path));
    if (inode->in_memory) {
        return FileSystemSpace{.total_bytes = kUnlimitedBytes, .free_bytes = kUnlimitedBytes};
    }
    return FileSystemSpace{.total_bytes = state_->space_limit_bytes,
                           .free_bytes = state_->free_bytes()};
}

Result<FileSystemType> SimulatedFileSystem::type(const std::string& path) {
    state_->notify(OperationKind::kQuery, path);
    const std::lock_guard guard(state_->mutex);
    STELLARIUM_TRY(check_process(path));
    constexpr std::string_view kOperation = "ask for the file system type of";
    STELLARIUM_TRY(without_injected_error(state_->admit(OperationKind::kQuery, path, false),
                                          kOperation, path));
    STELLARIUM_TRY(state_->find(kOperation, path));
    InodeRef at = state_->root;
    FileSystemType type = *at->mounted;
    for (const std::string& name : components_of(path)) {
        at = at->entries.at(name);
        if (at->mounted) {
            type = *at->mounted;
        }
    }
    return type;
}

Result<std::unique_ptr<FileLock>> SimulatedFileSystem::lock(const std::string& path) {
    state_->notify(OperationKind::kLock, path);
    const std::lock_guard guard(state_->mutex);
    STELLARIUM_TRY(check_process(path));
    auto place = state_->find_place("open lock file", path);
    STELLARIUM_ASSIGN(
        const Admission admission,
        without_injected_error(state_->admit(OperationKind::kLock, path, place && !place->inode),
                               "lock", path));
    if (!place) {
        return std::unexpected(std::move(place).error());
    }
    if (place->inode && place->inode->is_directory) {
        return failed(EISDIR, "open lock file", path);
    }
    if (!place->inode) {
        place->inode = state_->make_inode(false, *place->directory);
        state_->set_name(*place, place->inode);
    }
    if (const auto holder = state_->locks.find(place->inode.get()); holder != state_->locks.end()) {
        return fail(ErrorCode::kBusy,
                    fmt::format("{} is held by process {}", path, holder->second));
    }
    const std::string pid = fmt::format("{}\n", state_->process_id);
    place->inode->truncate(0);
    place->inode->write(bytes_of(std::string_view(pid)), 0);
    if (admission.dies) {
        return state_->halted_error(path);
    }
    state_->locks.emplace(place->inode.get(), state_->process_id);
    return std::make_unique<SimulatedLock>(state_, place->inode);
}

// ---- Set-up, disasters, faults, observation -----------------------------------------------------

void SimulatedFileSystem::make_directories(const std::string& path) {
    const std::lock_guard guard(state_->mutex);
    InodeRef at = state_->root;
    for (const std::string& name : components_of(path)) {
        InodeRef& child = at->entries[name];
        if (!child) {
            child = state_->make_inode(true, *at);
        }
        assert(child->is_directory);
        at->durable_entries[name] = child;
        at = InodeRef(child);
    }
}

void SimulatedFileSystem::mount(const std::string& path, FileSystemType type) {
    make_directories(path);
    const std::lock_guard guard(state_->mutex);
    const InodeRef inode = state_->find("mount", path).value();
    assert(inode->entries.empty());
    inode->file_system_id = inode->id;
    inode->in_memory = type.kind == FileSystemKind::kMemory;
    inode->mounted = std::move(type);
}

void SimulatedFileSystem::set_space_limit(uint64_t total_bytes) {
    const std::lock_guard guard(state_->mutex);
    state_->space_limit_bytes = total_bytes;
}

void SimulatedFileSystem::set_process_id(int pid) {
    const std::lock_guard guard(state_->mutex);
    state_->process_id = pid;
}

void SimulatedFileSystem::crash(uint64_t seed, CrashStyle style) {
    const std::lock_guard guard(state_->mutex);
    state_->root = crash_tree(*state_->root, seed, style);
    ++state_->boots;
    state_->write_boot_id();
    state_->start_process("the simulated machine has crashed");
}

void SimulatedFileSystem::kill_process() {
    const std::lock_guard guard(state_->mutex);
    // A copy, so that threads of the dead process that still run in this one cannot reach the
    // memory that its successor maps.
    state_->root = copy_tree(*state_->root);
    state_->start_process("the simulated process was killed");
}

std::unique_ptr<SimulatedFileSystem> SimulatedFileSystem::fork() const {
    const std::lock_guard guard(state_->mutex);
    return std::unique_ptr<SimulatedFileSystem>(
        new SimulatedFileSystem(state_->copy_with(copy_tree(*state_->root))));
}

std::unique_ptr<SimulatedFileSystem> SimulatedFileSystem::crashed_copy(uint64_t seed,
                                                                       CrashStyle style) const {
    const std::lock_guard guard(state_->mutex);
    const auto copy = state_->copy_with(crash_tree(*state_->root, seed, style));
    ++copy->boots;
    copy->write_boot_id();
    return std::unique_ptr<SimulatedFileSystem>(new SimulatedFileSystem(copy));
}

void SimulatedFileSystem::damage(const std::string& path, uint64_t offset_bytes,
                                 uint64_t length_bytes, uint64_t seed) {
    const std::lock_guard guard(state_->mutex);
    const InodeRef inode = state_->find("damage", path).value();
    SplitMix64 dice(seed);
    std::vector<std::byte> flips(length_bytes);
    for (std::byte& flip : flips) {
        flip = static_cast<std::byte>(1 + dice.below(255));
    }
    std::vector<std::byte> bytes(length_bytes);
    const auto flip_all = [&] {
        std::ranges::transform(bytes, flips, bytes.begin(),
                               [](std::byte byte, std::byte flip) { return byte ^ flip; });
    };
    inode->durable.read(bytes, offset_bytes);
    flip_all();
    inode->durable.write(bytes, offset_bytes);
    inode->read(bytes, offset_bytes);
    flip_all();
    if (inode->shared) {
        inode->shared->write(bytes, offset_bytes);
    } else {
        inode->seen.write(bytes, offset_bytes);
    }
}

void SimulatedFileSystem::inject(Fault fault) {
    assert(fault.nth > 0);
    const std::lock_guard guard(state_->mutex);
    state_->faults.push_back({.fault = std::move(fault)});
}

void SimulatedFileSystem::clear_faults() {
    const std::lock_guard guard(state_->mutex);
    state_->faults.clear();
}

uint64_t SimulatedFileSystem::faults_fired() const {
    const std::lock_guard guard(state_->mutex);
    return state_->faults_fired;
}

void SimulatedFileSystem::halt_at_mutation(uint64_t nth, HaltSide side) {
    const std::lock_guard guard(state_->mutex);
    state_->mutations_until_halt = nth;
    state_->halt_side = side;
}

bool SimulatedFileSystem::halted() const {
    const std::lock_guard guard(state_->mutex);
    return state_->halted;
}

OperationCounts SimulatedFileSystem::counts() const {
    const std::lock_guard guard(state_->mutex);
    return state_->counts;
}

void SimulatedFileSystem::reset_counts() {
    const std::lock_guard guard(state_->mutex);
    state_->counts = {};
}

void SimulatedFileSystem::set_observer(
    std::function<void(OperationKind, std::string_view path)> observer) {
    const std::lock_guard guard(state_->observer_mutex);
    if (observer) {
        state_->observer =
            std::make_shared<const std::function<void(OperationKind, std::string_view)>>(
                std::move(observer));
    } else {
        state_->observer.reset();
    }
}

uint64_t SimulatedFileSystem::unsynced_effects() const {
    const std::lock_guard guard(state_->mutex);
    return unsynced_in_tree(*state_->root);
}

// ---- Clock, randomness, machine -----------------------------------------------------------------

std::chrono::nanoseconds SimulatedClock::monotonic() {
    const int64_t step = auto_step_ns_.load();
    return std::chrono::nanoseconds(monotonic_ns_.fetch_add(step) + step);
}

std::chrono::nanoseconds SimulatedClock::wall() {
    return std::chrono::nanoseconds(monotonic_ns_.load() + wall_minus_monotonic_ns_.load());
}

void SimulatedClock::advance(std::chrono::nanoseconds by) {
    assert(by.count() >= 0);
    monotonic_ns_.fetch_add(by.count());
}

void SimulatedClock::set_auto_step(std::chrono::nanoseconds step) {
    assert(step.count() >= 0);
    auto_step_ns_.store(step.count());
}

void SimulatedClock::set_wall(std::chrono::nanoseconds since_1970) {
    wall_minus_monotonic_ns_.store(since_1970.count() - monotonic_ns_.load());
}

void SeededRandom::fill(MutableBytes into) {
    const std::lock_guard guard(mutex_);
    SplitMix64 generator(state_);
    for (std::byte& byte : into) {
        byte = static_cast<std::byte>(generator.next());
    }
    state_ = generator.next();
}

SimulatedMachine::SimulatedMachine(uint64_t seed)
    : SimulatedMachine(std::make_unique<SimulatedFileSystem>(), seed) {}

SimulatedMachine::SimulatedMachine(std::unique_ptr<SimulatedFileSystem> files, uint64_t seed)
    : files_(std::move(files)), random_(seed) {}

Env SimulatedMachine::env() {
    return {.files = files_.get(), .clock = &clock_, .random = &random_};
}

Env SimulatedMachine::process_env() {
    const std::lock_guard guard(processes_mutex_);
    processes_.push_back(files_->process_view());
    return {.files = processes_.back().get(), .clock = &clock_, .random = &random_};
}

}  // namespace stellarium::io
