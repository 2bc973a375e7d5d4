// The connection with the kernel: requests in, answers out.
//
// Each of a fixed number of threads reads a request, does it, waiting for the disk if need be, and
// answers. All read from ONE descriptor. (FUSE_DEV_IOC_CLONE would give each a queue of its own,
// and the kernel aborts what was in flight on such a queue when its descriptor closes: with the
// daemon. The holder's descriptor keeps this one open over the daemon's death, and requests with
// it.)
//
// No writeback cache: the kernel would acknowledge writes that only it has, and would own the size.
#define FUSE_USE_VERSION 314
#include "frontend/fuse/mount.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <fuse3/fuse_lowlevel.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/unique_fd.h"
#include "frontend/fuse/files.h"
#include "frontend/fuse/limits.h"
#include "frontend/fuse/open_table.h"
#include "frontend/fuse/session.h"
#include "frontend/fuse/tree.h"
#include "frontend/fuse/waiting.h"

namespace stellarium::fuse {
namespace {

// Newer than the headers of Debian 12 (Linux 6.9); the kernel's interface does not change.
constexpr uint32_t kHasResendFlag2 = 1U << (39 - 32);
constexpr int32_t kNotifyResend = 7;
constexpr uint64_t kResentMark = uint64_t{1} << 63;

/// A removal or renaming is seen after this.
constexpr double kNameSeconds = 1;
/// A volume's size, blocks.
constexpr double kVolumeSeconds = 1;
constexpr double kImmutableSeconds = 3600;

/// Interrupts a thread that waits for a request.
constexpr int kWakeSignal = SIGUSR1;
constexpr std::chrono::milliseconds kWakeInterval{10};
constexpr std::chrono::milliseconds kSettleTimeout{1000};

void on_wake(int /*signal*/) {}

int errno_of(const Error& error) {
    switch (error.code()) {
        case ErrorCode::kInvalidArgument:
        case ErrorCode::kNotFound:
        case ErrorCode::kBusy:
        case ErrorCode::kNoSpace:
        case ErrorCode::kReadOnly:
        case ErrorCode::kPermissionDenied:
        case ErrorCode::kUnsupported:
            return error_mapping(error.code()).errno_value;
        case ErrorCode::kLimitExceeded:
            return ENFILE;
        default:
            return EIO;  // What a disk says.
    }
}

/// Memory of a thread. All of it is there from the start: were the kernel to fault a page in while
/// it copies a request, and the daemon be killed then, that request would fail.
class Buffer {
  public:
    explicit Buffer(size_t bytes)
        : bytes_(bytes),
          memory_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0)) {
        if (made()) {
            // Where the limit of locked memory allows; else it might be swapped out.
            static_cast<void>(mlock(memory_, bytes_));
        }
    }
    ~Buffer() {
        if (made()) {
            munmap(memory_, bytes_);
        }
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    bool made() const { return memory_ != MAP_FAILED; }
    MutableBytes bytes() const { return {static_cast<std::byte*>(memory_), bytes_}; }

  private:
    size_t bytes_;
    void* memory_;
};

/// What a thread is doing. libfuse does not show a request's number, and calls the operations below
/// on the thread that read the request.
struct Worker {
    Buffer request{kRequestBufferBytes};
    Buffer answer{kAnswerBufferBytes};
    uint64_t unique = 0;  ///< Without the mark.
    bool resent = false;
    FileRequest kind = FileRequest::kOther;
};

FileRequest kind_of(uint32_t opcode) {
    switch (opcode) {
        case FUSE_OPEN:
            return FileRequest::kOpen;
        case FUSE_READ:
            return FileRequest::kRead;
        case FUSE_WRITE:
            return FileRequest::kWrite;
        case FUSE_FSYNC:
            return FileRequest::kFlush;
        case FUSE_FALLOCATE:
            return FileRequest::kDiscard;
        default:
            return FileRequest::kOther;
    }
}

/// FileRequestTotals, as threads count them.
struct Counts {
    std::atomic<uint64_t> requests{0};
    std::atomic<uint64_t> bytes{0};
    std::atomic<uint64_t> errors{0};
};

thread_local Worker* this_worker = nullptr;

}  // namespace

struct Mount::Impl {
    Impl(nova::Pool& pool_in, HolderClient holder_in, MountOptions options_in,
         HolderStatus status_in)
        : pool(pool_in),
          options(std::move(options_in)),
          holder(std::move(holder_in)),
          holder_status(std::move(status_in)),
          tree(pool_in, {.uid = geteuid(),
                         .gid = options.group.value_or(getegid()),
                         .for_group = options.group.has_value(),
                         .boots = options.boots}) {}

    void log(LogLevel level, const std::string& message) const { options.log(level, message); }
    Result<void> adopt();
    Result<void> make_session();
    void work(Worker& worker);
    bool take(Worker& worker, size_t length);
    Result<void> resend();
    void join();

    Counts& counts_of(FileRequest kind) { return counts[static_cast<size_t>(kind)]; }

    /// What a disk would call an I/O error is for the log as well.
    void reply_error(fuse_req_t request, const Error& error) {
        reply_error(request, error, this_worker->kind);
    }
    void reply_error(fuse_req_t request, const Error& error, FileRequest kind) {
        counts_of(kind).errors.fetch_add(1, std::memory_order_relaxed);
        const int number = errno_of(error);
        if (number == EIO) {
            log(LogLevel::kError, error.message());
        }
        fuse_reply_err(request, number);
    }

    // One for each operation; see the table below.
    void open(fuse_req_t request, fuse_ino_t node, int flags);
    void set_attributes(fuse_req_t request, fuse_ino_t node, const struct stat& wanted, int which);
    void write(fuse_req_t request, fuse_ino_t node, Bytes data, uint64_t offset_bytes,
               bool durable);
    void wrote(fuse_req_t request, fuse_ino_t node, const Result<size_t>& written, bool durable);
    void flush(fuse_req_t request, fuse_ino_t node, size_t written);
    void list(fuse_req_t request, fuse_ino_t node, size_t size, off_t offset, uint64_t handle);
    void space(fuse_req_t request);
    void allocate(fuse_req_t request, fuse_ino_t node, int mode, off_t offset, off_t length);
    void zero(fuse_req_t request, fuse_ino_t node, uint64_t offset_bytes, uint64_t length_bytes,
              bool discard);
    void answer(fuse_req_t request, const Result<void>& done, FileRequest kind);

    nova::Pool& pool;
    const MountOptions options;
    std::mutex holder_mutex;
    HolderClient holder;  ///< Guarded by holder_mutex.
    const HolderStatus holder_status;
    Tree tree;

    int fuse = -1;      ///< The session's, as soon as there is one.
    UniqueFd own_fuse;  ///< Until then.
    std::unique_ptr<OpenTable> table;
    std::unique_ptr<Files> files;
    Session session;
    std::vector<std::unique_ptr<Worker>> workers;
    std::vector<std::thread> threads;
    std::atomic<unsigned> running{0};  ///< Threads.
    std::atomic<bool> stopping{false};
    std::atomic<bool> connected{true};
    std::atomic<bool> resends{false};
    std::atomic<unsigned> busy{0};  ///< Threads that do a request.
    std::atomic<uint64_t> repeated{0};
    std::array<Counts, kFileRequestKinds> counts{};
    bool adopted = false;
    bool stopped = false;
    WaitingRequests waiting{
        {.of_node = kMaxWaitingOfFile, .in_all = kMaxWaitingOfFiles, .kept_bytes = kMaxKeptBytes}};
    std::atomic<uint64_t> last_listing{0};

    mutable std::mutex flushes_mutex;
    std::condition_variable flushes_done;
    unsigned flushes = 0;  ///< Under way. Guarded by flushes_mutex.
};

// --- Operations ----------------------------------------------------------------------------------

namespace {

Mount::Impl* impl_of(fuse_req_t request);

}  // namespace

void Mount::Impl::open(fuse_req_t request, fuse_ino_t node, int flags) {
    const auto opened = files->open(node, flags, this_worker->unique, this_worker->resent);
    if (!opened) {
        return reply_error(request, opened.error());
    }
    fuse_open_out out{};
    out.fh = opened->handle;
    out.open_flags = (opened->direct ? FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES : 0U) |
                     (opened->keep_cache ? FOPEN_KEEP_CACHE : 0U);
    // fuse_reply_open() of libfuse 3.14 does not know parallel direct writes.
    if (fuse_reply_buf(request, reinterpret_cast<const char*>(&out), sizeof out) == -ENOENT) {
        files->release(opened->handle);  // Who opened it has gone.
    }
}

void Mount::Impl::set_attributes(fuse_req_t request, fuse_ino_t node, const struct stat& wanted,
                                 int which) {
    const auto found = tree.stat(node);
    if (!found) {
        return reply_error(request, found.error());
    }
    if ((which & ~FUSE_SET_ATTR_SIZE) != 0 || is_folder(node)) {
        fuse_reply_err(request, EPERM);  // Owner, mode and times are the store's.
        return;
    }
    if (found->immutable) {
        fuse_reply_err(request, EROFS);
        return;
    }
    // As on a block device, to truncate to nothing (O_TRUNC) does nothing; and nothing else changes
    // the size of a volume but `stellarctl volume resize`.
    if (wanted.st_size != 0 && wanted.st_size != found->attributes.st_size) {
        fuse_reply_err(request, EINVAL);
        return;
    }
    fuse_reply_attr(request, &found->attributes, kVolumeSeconds);
}

/// Where there is no room for it now, it waits, with a thread or without (waiting.h).
void Mount::Impl::write(fuse_req_t request, fuse_ino_t node, Bytes data, uint64_t offset_bytes,
                        bool durable) {
    const auto written = files->write(node, offset_bytes, data, IoMode::kNoWait);
    if (written || written.error().code() != ErrorCode::kWouldBlock) {
        return wrote(request, node, written, durable);
    }
    const auto wait_and_write = [this, request, node, offset_bytes, durable](Bytes bytes) {
        wrote(request, node, files->write(node, offset_bytes, bytes), durable);
    };
    waiting.wait(
        node, data.size(), [&] { wait_and_write(data); },
        [&]() -> WaitingRequests::Job {
            return [wait_and_write, copy = std::vector<std::byte>(data.begin(), data.end())] {
                wait_and_write(copy);
            };
        });
}

void Mount::Impl::wrote(fuse_req_t request, fuse_ino_t node, const Result<size_t>& written,
                        bool durable) {
    if (!written) {
        return reply_error(request, written.error(), FileRequest::kWrite);
    }
    counts_of(FileRequest::kWrite).bytes.fetch_add(*written, std::memory_order_relaxed);
    if (durable && *written > 0) {
        return flush(request, node, *written);
    }
    fuse_reply_write(request, *written);
}

/// Answers with `written` bytes, or for 0 with nothing but success, when all is durable.
void Mount::Impl::flush(fuse_req_t request, fuse_ino_t node, size_t written) {
    {
        const std::lock_guard lock(flushes_mutex);
        ++flushes;
    }
    files->flush_async(node, [this, request, written](const Result<void>& result) {
        if (!result) {
            reply_error(request, result.error(),
                        written > 0 ? FileRequest::kWrite : FileRequest::kFlush);
        } else if (written > 0) {
            fuse_reply_write(request, written);
        } else {
            fuse_reply_err(request, 0);
        }
        const std::lock_guard lock(flushes_mutex);
        --flushes;
        flushes_done.notify_all();
    });
}

void Mount::Impl::list(fuse_req_t request, fuse_ino_t node, size_t size, off_t offset,
                       uint64_t handle) {
    // A place is the node's number, above those of "." and "..": it means the same after a restart.
    constexpr off_t kPlaces = 16;
    const auto listing = tree.list(node, handle);
    if (!listing) {
        return reply_error(request, listing.error());
    }
    char* const out = reinterpret_cast<char*>(this_worker->answer.bytes().data());
    size = std::min(size, kMaxFileTransferBytes);
    size_t used = 0;
    const auto add = [&](const char* name, uint64_t number, mode_t type, off_t place) {
        struct stat attributes{};
        attributes.st_ino = number;
        attributes.st_mode = type;
        const size_t needed =
            fuse_add_direntry(request, out + used, size - used, name, &attributes, place);
        if (needed > size - used) {
            return false;
        }
        used += needed;
        return true;
    };
    bool room = true;
    if (offset < 1) {
        room = add(".", node, S_IFDIR, 1);
    }
    if (room && offset < 2) {
        room = add("..", kRoot, S_IFDIR, 2);
    }
    const uint64_t last = offset < kPlaces ? 0 : static_cast<uint64_t>(offset - kPlaces);
    auto next = std::ranges::upper_bound(**listing, last, {}, &Entry::node);
    for (; room && next != (*listing)->end(); ++next) {
        room = add(next->name.c_str(), next->node, next->type,
                   static_cast<off_t>(next->node) + kPlaces);
    }
    fuse_reply_buf(request, out, used);
}

void Mount::Impl::space(fuse_req_t request) {
    const nova::PoolStats stats = pool.stats();
    struct statvfs out{};
    out.f_bsize = nebula::kPageBytes;
    out.f_frsize = nebula::kPageBytes;
    out.f_blocks = stats.space.total_bytes / nebula::kPageBytes;
    out.f_bfree = stats.space.free_bytes / nebula::kPageBytes;
    out.f_bavail = out.f_bfree;
    out.f_files = stats.images + stats.volumes + stats.snapshots;
    out.f_namemax = 257;  // VOLUME@NAME.
    fuse_reply_statfs(request, &out);
}

void Mount::Impl::allocate(fuse_req_t request, fuse_ino_t node, int mode, off_t offset,
                           off_t length) {
    const auto start = static_cast<uint64_t>(offset);
    const auto bytes = static_cast<uint64_t>(length);
    Result<void> done;
    switch (mode & ~FALLOC_FL_KEEP_SIZE) {
        case 0:
            // Room is taken when it is written to, as everywhere in a volume.
            if ((mode & FALLOC_FL_KEEP_SIZE) == 0) {
                done = files->check_within(node, start, bytes);
            }
            break;
        case FALLOC_FL_PUNCH_HOLE:
            return zero(request, node, start, bytes, /*discard=*/true);
        case FALLOC_FL_ZERO_RANGE:
            return zero(request, node, start, bytes, (mode & FALLOC_FL_KEEP_SIZE) != 0);
        default:
            done = fail(ErrorCode::kUnsupported, "no such way to allocate");
            break;
    }
    answer(request, done, FileRequest::kDiscard);
}

/// As write().
void Mount::Impl::zero(fuse_req_t request, fuse_ino_t node, uint64_t offset_bytes,
                       uint64_t length_bytes, bool discard) {
    const auto done = files->zero(node, offset_bytes, length_bytes, discard, IoMode::kNoWait);
    if (done || done.error().code() != ErrorCode::kWouldBlock) {
        return answer(request, done, FileRequest::kDiscard);
    }
    const WaitingRequests::Job wait_and_zero = [=, this] {
        answer(request, files->zero(node, offset_bytes, length_bytes, discard),
               FileRequest::kDiscard);
    };
    waiting.wait(node, 0, wait_and_zero, [&] { return WaitingRequests::Job(wait_and_zero); });
}

void Mount::Impl::answer(fuse_req_t request, const Result<void>& done, FileRequest kind) {
    if (!done) {
        return reply_error(request, done.error(), kind);
    }
    fuse_reply_err(request, 0);
}

namespace {

Mount::Impl* impl_of(fuse_req_t request) {
    return static_cast<Mount::Impl*>(fuse_req_userdata(request));
}

void do_init(void* /*impl*/, fuse_conn_info* connection) {
    // The same of every daemon that adopts a connection: the kernel hears it once. A change here is
    // a new version of the table (open_table.cc).
    // Not among them: a truncation with the opening (it would set the kernel's size to 0), dropping
    // pages by time of change (volumes have none), and moving pages through pipes, which gains
    // nothing where data is gathered from many places and verified.
    connection->want =
        connection->capable & (FUSE_CAP_ASYNC_READ | FUSE_CAP_ASYNC_DIO | FUSE_CAP_PARALLEL_DIROPS);
    connection->max_background = kMaxBackgroundRequests;
    connection->congestion_threshold = kMaxBackgroundRequests * 3 / 4;
    connection->time_gran = 1;
}

void do_lookup(fuse_req_t request, fuse_ino_t folder, const char* name) {
    Mount::Impl& impl = *impl_of(request);
    const auto found = impl.tree.lookup(folder, name);
    if (!found) {
        const bool absent = found.error().code() == ErrorCode::kNotFound ||
                            found.error().code() == ErrorCode::kInvalidArgument;
        return absent ? static_cast<void>(fuse_reply_err(request, ENOENT))
                      : impl.reply_error(request, found.error());
    }
    fuse_entry_param entry{};
    entry.ino = found->attributes.st_ino;
    entry.attr = found->attributes;
    entry.attr_timeout = found->immutable ? kImmutableSeconds : kVolumeSeconds;
    entry.entry_timeout = is_fixed_folder(entry.ino) ? kImmutableSeconds : kNameSeconds;
    fuse_reply_entry(request, &entry);
}

void do_getattr(fuse_req_t request, fuse_ino_t node, fuse_file_info* /*file*/) {
    Mount::Impl& impl = *impl_of(request);
    const auto found = impl.tree.stat(node);
    if (!found) {
        return impl.reply_error(request, found.error());
    }
    fuse_reply_attr(request, &found->attributes,
                    found->immutable ? kImmutableSeconds : kVolumeSeconds);
}

void do_setattr(fuse_req_t request, fuse_ino_t node, struct stat* wanted, int which,
                fuse_file_info* /*file*/) {
    impl_of(request)->set_attributes(request, node, *wanted, which);
}

void do_open(fuse_req_t request, fuse_ino_t node, fuse_file_info* file) {
    impl_of(request)->open(request, node, file->flags);
}

void do_read(fuse_req_t request, fuse_ino_t node, size_t size, off_t offset, fuse_file_info* file) {
    Mount::Impl& impl = *impl_of(request);
    const auto bytes = impl.files->read(node, file->fh, static_cast<uint64_t>(offset), size,
                                        this_worker->answer.bytes());
    if (!bytes) {
        return impl.reply_error(request, bytes.error());
    }
    impl.counts_of(FileRequest::kRead).bytes.fetch_add(bytes->size(), std::memory_order_relaxed);
    fuse_reply_buf(request, reinterpret_cast<const char*>(bytes->data()), bytes->size());
}

void do_write(fuse_req_t request, fuse_ino_t node, const char* data, size_t size, off_t offset,
              fuse_file_info* file) {
    impl_of(request)->write(request, node, std::as_bytes(std::span(data, size)),
                            static_cast<uint64_t>(offset), (file->flags & (O_SYNC | O_DSYNC)) != 0);
}

void do_release(fuse_req_t request, fuse_ino_t /*node*/, fuse_file_info* file) {
    impl_of(request)->files->release(file->fh);
    fuse_reply_err(request, 0);
}

void do_fsync(fuse_req_t request, fuse_ino_t node, int /*data_only*/, fuse_file_info* /*file*/) {
    impl_of(request)->flush(request, node, 0);
}

void do_opendir(fuse_req_t request, fuse_ino_t node, fuse_file_info* file) {
    Mount::Impl& impl = *impl_of(request);
    const auto found = impl.tree.stat(node);
    if (!found) {
        return impl.reply_error(request, found.error());
    }
    file->fh = impl.last_listing.fetch_add(1) + 1;
    fuse_reply_open(request, file);
}

void do_readdir(fuse_req_t request, fuse_ino_t node, size_t size, off_t offset,
                fuse_file_info* file) {
    impl_of(request)->list(request, node, size, offset, file->fh);
}

void do_releasedir(fuse_req_t request, fuse_ino_t /*node*/, fuse_file_info* file) {
    impl_of(request)->tree.forget(file->fh);
    fuse_reply_err(request, 0);
}

void do_statfs(fuse_req_t request, fuse_ino_t /*node*/) {
    impl_of(request)->space(request);
}

void do_fallocate(fuse_req_t request, fuse_ino_t node, int mode, off_t offset, off_t length,
                  fuse_file_info* /*file*/) {
    impl_of(request)->allocate(request, node, mode, offset, length);
}

void do_lseek(fuse_req_t request, fuse_ino_t node, off_t offset, int whence,
              fuse_file_info* /*file*/) {
    Mount::Impl& impl = *impl_of(request);
    if (whence != SEEK_DATA && whence != SEEK_HOLE) {
        fuse_reply_err(request, EINVAL);
        return;
    }
    const auto found = impl.files->seek(node, static_cast<uint64_t>(offset), whence == SEEK_DATA);
    if (!found) {
        return impl.reply_error(request, found.error());
    }
    if (!*found) {
        fuse_reply_err(request, ENXIO);
        return;
    }
    fuse_reply_lseek(request, static_cast<off_t>(**found));
}

// Names are made and removed by stellarctl. (Root alone gets here; others the kernel refuses by the
// modes of the folders.)
void refuse(fuse_req_t request) {
    fuse_reply_err(request, EPERM);
}

fuse_lowlevel_ops make_operations() {
    fuse_lowlevel_ops ops{};
    ops.init = do_init;
    ops.lookup = do_lookup;
    ops.getattr = do_getattr;
    ops.setattr = do_setattr;
    ops.open = do_open;
    ops.read = do_read;
    ops.write = do_write;
    ops.release = do_release;
    ops.fsync = do_fsync;
    ops.opendir = do_opendir;
    ops.readdir = do_readdir;
    ops.releasedir = do_releasedir;
    ops.statfs = do_statfs;
    ops.fallocate = do_fallocate;
    ops.lseek = do_lseek;
    ops.mknod = [](fuse_req_t r, fuse_ino_t, const char*, mode_t, dev_t) { refuse(r); };
    ops.mkdir = [](fuse_req_t r, fuse_ino_t, const char*, mode_t) { refuse(r); };
    ops.unlink = [](fuse_req_t r, fuse_ino_t, const char*) { refuse(r); };
    ops.rmdir = [](fuse_req_t r, fuse_ino_t, const char*) { refuse(r); };
    ops.symlink = [](fuse_req_t r, const char*, fuse_ino_t, const char*) { refuse(r); };
    ops.link = [](fuse_req_t r, fuse_ino_t, fuse_ino_t, const char*) { refuse(r); };
    ops.rename = [](fuse_req_t r, fuse_ino_t, const char*, fuse_ino_t, const char*, unsigned) {
        refuse(r);
    };
    ops.create = [](fuse_req_t r, fuse_ino_t, const char*, mode_t, fuse_file_info*) { refuse(r); };
    return ops;
}

/// The kernel has no better way to end an interrupt; requests here are not ended early.
void decline_interrupts(int fuse, uint64_t unique) {
    fuse_out_header out{};
    out.len = sizeof out;
    out.error = -ENOSYS;
    out.unique = unique;
    // ENOENT: the interrupted request is done.
    [[maybe_unused]] const ssize_t told = write(fuse, &out, sizeof out);
}

}  // namespace

// --- The connection ------------------------------------------------------------------------------

Result<void> Mount::Impl::make_session() {
    static const fuse_lowlevel_ops kOperations = make_operations();
    std::string name = "stellariumd";
    std::array<char*, 2> words = {name.data(), nullptr};
    fuse_args arguments = FUSE_ARGS_INIT(1, words.data());
    session.reset(fuse_session_new(&arguments, &kOperations, sizeof kOperations, this));
    fuse_opt_free_args(&arguments);
    const std::string place = fmt::format("/dev/fd/{}", fuse);
    if (!session || fuse_session_mount(session.get(), place.c_str()) != 0) {
        return fail(ErrorCode::kUnsupported, "libfuse does not take over a mounted directory");
    }
    own_fuse.release();
    return {};
}

/// Requests that an earlier daemon had read, and not answered, are queued again, with a mark.
///
/// Doing one twice is safe. Nobody was told that it was done, so nobody may rely on what it left: a
/// write or a discard that is done again leaves what it left the first time, unless another write
/// of the same range was under way at the same time, and then their order was open anyway; the
/// kernel keeps a page that it writes back from being written again before it is answered. Reads,
/// flushes and questions change nothing. For OPEN and RELEASE see open_table.h.
Result<void> Mount::Impl::resend() {
    fuse_out_header out{};
    out.len = sizeof out;
    out.error = kNotifyResend;
    if (::write(fuse, &out, sizeof out) < 0) {
        return std::unexpected(Error::from_errno(errno, "have requests repeated"));
    }
    return {};
}

Result<void> Mount::serve() {
    Impl& impl = *impl_;
    STELLARIUM_TRY(impl.make_session());
    const Bytes init = impl.table->init_request();
    if (!init.empty()) {
        impl.adopted = true;
        // libfuse wants to hear what the kernel offers before anything else. The answer to this
        // copy of it finds nobody waiting, unless the earlier daemon died before it answered.
        std::vector<std::byte> copy(init.begin(), init.end());
        fuse_buf buffer{};
        buffer.size = copy.size();
        buffer.mem = copy.data();
        fuse_session_process_buf(impl.session.get(), &buffer);
    }
    if (const Result<void> resent = impl.resend(); resent) {
        impl.resends = true;
    } else {
        impl.log(LogLevel::kWarning,
                 "this kernel does not repeat requests (Linux 6.9 does): when this daemon is "
                 "killed, whoever waits for an answer then waits until the directory is unmounted "
                 "by force (umount -f). A stop by SIGTERM leaves nobody waiting");
    }
    struct sigaction wake{};
    wake.sa_handler = on_wake;  // No SA_RESTART: the read returns.
    sigaction(kWakeSignal, &wake, nullptr);
    for (unsigned i = 0; i < kFileWorkers; ++i) {
        auto worker = std::make_unique<Worker>();
        if (!worker->request.made() || !worker->answer.made()) {
            return fail(ErrorCode::kLimitExceeded, "there is no memory for requests of files");
        }
        impl.workers.push_back(std::move(worker));
    }
    impl.running = kFileWorkers;
    for (const auto& worker : impl.workers) {
        impl.threads.emplace_back([&impl, &worker = *worker] {
            impl.work(worker);
            impl.running.fetch_sub(1);
        });
    }
    return {};
}

/// Does what was read; false: not for libfuse.
bool Mount::Impl::take(Worker& worker, size_t length) {
    fuse_in_header header{};
    std::memcpy(&header, worker.request.bytes().data(), sizeof header);
    if (header.opcode == FUSE_INTERRUPT) {
        decline_interrupts(fuse, header.unique);
        return false;
    }
    if (header.opcode == FUSE_INIT) {
        if (const auto saved = table->save_init(worker.request.bytes().first(length)); !saved) {
            log(LogLevel::kError, saved.error().message());
        }
        const auto* const init =
            reinterpret_cast<const fuse_init_in*>(worker.request.bytes().data() + sizeof header);
        if (length < sizeof header + sizeof(fuse_init_in) ||
            (init->flags2 & kHasResendFlag2) == 0) {
            resends = false;
        }
    }
    worker.unique = header.unique & ~kResentMark;
    worker.resent = (header.unique & kResentMark) != 0;
    worker.kind = kind_of(header.opcode);
    counts_of(worker.kind).requests.fetch_add(1, std::memory_order_relaxed);
    if (worker.resent) {
        repeated.fetch_add(1, std::memory_order_relaxed);
    }
    return true;
}

void Mount::Impl::work(Worker& worker) {
    pthread_setname_np(pthread_self(), "fuse");
    this_worker = &worker;
    const MutableBytes memory = worker.request.bytes();
    while (!stopping) {
        const ssize_t got = read(fuse, memory.data(), memory.size());
        if (got < 0) {
            if (errno == EINTR || errno == EAGAIN || errno == ENOENT) {
                continue;  // ENOENT: who asked has gone.
            }
            // ENODEV: unmounted. ECONNABORTED: by force.
            if (errno != ENODEV && errno != ECONNABORTED) {
                log(LogLevel::kError, Error::from_errno(errno, "read from /dev/fuse").message());
            } else if (connected.exchange(false)) {
                log(LogLevel::kInfo, fmt::format("{} is unmounted", holder_status.directory));
            }
            connected = false;
            break;
        }
        if (static_cast<size_t>(got) < sizeof(fuse_in_header)) {
            continue;
        }
        busy.fetch_add(1);
        if (take(worker, static_cast<size_t>(got))) {
            fuse_buf buffer{};
            buffer.size = static_cast<size_t>(got);
            buffer.mem = memory.data();
            fuse_session_process_buf(session.get(), &buffer);
        }
        busy.fetch_sub(1);
    }
    this_worker = nullptr;
}

void Mount::Impl::join() {
    stopping = true;
    // Until each has seen it: a signal may come between its look at `stopping` and its read.
    while (running.load() > 0) {
        for (std::thread& thread : threads) {
            pthread_kill(thread.native_handle(), kWakeSignal);
        }
        std::this_thread::sleep_for(kWakeInterval);
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    threads.clear();
    std::unique_lock lock(flushes_mutex);
    flushes_done.wait(lock, [&] { return flushes == 0; });
}

// --- Life ----------------------------------------------------------------------------------------

Mount::Mount(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Mount::~Mount() {
    if (!impl_->threads.empty()) {
        stop();
    } else if (!impl_->session && !impl_->stopped) {
        // A start that failed. Files that are open wait for the next one.
        [[maybe_unused]] const auto unmounted = unmount();
    }
}

Result<std::unique_ptr<Mount>> Mount::adopt(nova::Pool& pool, HolderClient holder,
                                            MountOptions options) {
    STELLARIUM_ASSIGN(Adoption adopted, holder.adopt(pool.uuid()));
    auto impl = std::make_unique<Impl>(pool, std::move(holder), std::move(options),
                                       std::move(adopted.holder));
    STELLARIUM_ASSIGN(impl->table, OpenTable::map(std::move(adopted.table)));
    impl->own_fuse = std::move(adopted.fuse);
    impl->fuse = impl->own_fuse.get();
    Impl* const self = impl.get();
    impl->files = std::make_unique<Files>(
        pool, *impl->table,
        FilesOptions{
            .directory = impl->holder_status.directory,
            .warn = [self](const std::string& text) { self->log(LogLevel::kWarning, text); },
            .resized =
                [self](uint64_t node) {
                    // Attributes only: nothing that could wait for a request of ours.
                    if (self->session) {
                        fuse_lowlevel_notify_inval_inode(self->session.get(), node, -1, 0);
                    }
                },
            .attached = impl->options.attached});
    impl->files->adopt();
    return std::unique_ptr<Mount>(new Mount(std::move(impl)));
}

void Mount::settle() {
    const auto end = std::chrono::steady_clock::now() + kSettleTimeout;
    const auto quiet = [this] {
        pollfd look{.fd = impl_->fuse, .events = POLLIN, .revents = 0};
        return poll(&look, 1, 0) <= 0 || (look.revents & POLLIN) == 0;
    };
    while (impl_->connected && std::chrono::steady_clock::now() < end) {
        if (quiet() && impl_->busy.load() == 0) {
            // A thread may have taken a request just now, and not have said so yet.
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
            if (quiet() && impl_->busy.load() == 0) {
                return;
            }
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

Result<void> Mount::unmount() {
    const std::lock_guard lock(impl_->holder_mutex);
    STELLARIUM_TRY(impl_->holder.unmount());
    impl_->connected = false;
    return {};
}

void Mount::stop() {
    Impl& impl = *impl_;
    if (impl.connected) {
        // Served meanwhile: what was changed through mappings is written back.
        if (const Result<void> unmounted = unmount(); unmounted) {
            impl.log(LogLevel::kInfo, fmt::format("{} is unmounted", impl.holder_status.directory));
        } else {
            impl.log(LogLevel::kWarning,
                     fmt::format("{} stays mounted, and its {} open files wait for the next daemon "
                                 "(to end that instead: umount -f -l {}, and kill process {}): {}",
                                 impl.holder_status.directory, impl.files->open_files(),
                                 impl.holder_status.directory, impl.holder_status.pid,
                                 unmounted.error().message()));
        }
    }
    impl.join();
    impl.files->stop();
    impl.session.reset();
    impl.stopped = true;
}

MountStatus Mount::status() const {
    const Impl& impl = *impl_;
    MountStatus status{.directory = impl.holder_status.directory,
                       .holder_pid = impl.holder_status.pid,
                       .open_files = impl.files->open_files(),
                       .connected = impl.connected,
                       .resends = impl.resends,
                       .adopted = impl.adopted,
                       .repeated = impl.repeated};
    status.kept = impl.waiting.status().kept;
    {
        const std::lock_guard lock(impl.flushes_mutex);
        status.in_flight = impl.busy + impl.flushes + status.kept;
    }
    for (size_t kind = 0; kind < kFileRequestKinds; ++kind) {
        const Counts& counts = impl.counts[kind];
        status.totals[kind] = {
            .requests = counts.requests, .bytes = counts.bytes, .errors = counts.errors};
    }
    return status;
}

std::vector<std::string> Mount::open_names(size_t at_most) const {
    return impl_->files->open_names(at_most);
}

std::string_view file_request_name(FileRequest kind) {
    switch (kind) {
        case FileRequest::kOpen:
            return "open";
        case FileRequest::kRead:
            return "read";
        case FileRequest::kWrite:
            return "write";
        case FileRequest::kFlush:
            return "flush";
        case FileRequest::kDiscard:
            return "discard";
        case FileRequest::kOther:
            break;
    }
    return "other";
}

}  // namespace stellarium::fuse
