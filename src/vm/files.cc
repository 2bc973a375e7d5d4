#include "vm/files.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <fstream>
#include <sstream>
#include <thread>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include "control/locations.h"

namespace stellarium::vm {
namespace {

constexpr std::string_view kFileSystem = "fuse.stellarium";
/// Names are as much as a second old in the kernel.
constexpr std::chrono::seconds kNameTimeout{5};
constexpr std::chrono::milliseconds kNamePoll{5};
constexpr uint64_t kReadBytes = uint64_t{1} << 20;

/// mountinfo writes blanks and the like as \ and three octal digits.
std::string unescaped(std::string_view text) {
    std::string result;
    for (size_t i = 0; i < text.size(); ++i) {
        const auto is_octal = [&](size_t at) { return text[at] >= '0' && text[at] <= '7'; };
        if (text[i] == '\\' && i + 3 < text.size() && is_octal(i + 1) && is_octal(i + 2) &&
            is_octal(i + 3)) {
            result += static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 +
                                        (text[i + 3] - '0'));
            i += 3;
        } else {
            result += text[i];
        }
    }
    return result;
}

}  // namespace

Result<std::string> find_files(const std::string& store_directory, const std::string& mount_info) {
    const std::string store = control::real_path(store_directory);
    std::string found;
    std::istringstream lines(mount_info);
    for (std::string line; std::getline(lines, line);) {
        // ID PARENT DEVICE ROOT DIRECTORY OPTIONS [FIELDS...] - TYPE SOURCE OPTIONS
        std::istringstream words(line);
        std::string word;
        std::string directory;
        for (int i = 0; i < 5; ++i) {
            words >> directory;
        }
        while (words >> word && word != "-") {
        }
        std::string type;
        std::string source;
        if (words >> type >> source && type == kFileSystem &&
            control::real_path(unescaped(source)) == store) {
            found = unescaped(directory);  // The last one covers those before it.
        }
    }
    if (found.empty()) {
        return fail(ErrorCode::kUnavailable,
                    fmt::format("machines use the store's files, and {} is mounted nowhere: "
                                "stellarctl mount DIR",
                                store_directory));
    }
    return found;
}

Result<std::string> find_files(const std::string& store_directory) {
    std::ifstream file("/proc/self/mountinfo");
    std::ostringstream text;
    text << file.rdbuf();
    return find_files(store_directory, std::move(text).str());
}

Result<UniqueFd> open_file(const std::string& path, int flags) {
    const auto deadline = std::chrono::steady_clock::now() + kNameTimeout;
    while (true) {
        UniqueFd file(::open(path.c_str(), flags | O_CLOEXEC));
        if (file) {
            return file;
        }
        if (errno != EINTR && (errno != ENOENT || std::chrono::steady_clock::now() >= deadline)) {
            return std::unexpected(Error::from_errno(errno, "open " + path));
        }
        std::this_thread::sleep_for(kNamePoll);
    }
}

Result<uint64_t> size_of_file(int fd, const std::string& path) {
    struct stat status{};
    if (fstat(fd, &status) != 0) {
        return std::unexpected(Error::from_errno(errno, "look at " + path));
    }
    return static_cast<uint64_t>(status.st_size);
}

Result<void> read_at(int fd, const std::string& path, uint64_t offset_bytes, MutableBytes into) {
    while (!into.empty()) {
        const ssize_t got = pread(fd, into.data(), into.size(), static_cast<off_t>(offset_bytes));
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            return std::unexpected(Error::from_errno(
                got < 0 ? errno : EIO, fmt::format("read {} at {}", path, offset_bytes)));
        }
        offset_bytes += static_cast<uint64_t>(got);
        into = into.subspan(static_cast<size_t>(got));
    }
    return {};
}

Result<void> write_at(int fd, const std::string& path, uint64_t offset_bytes, Bytes from) {
    while (!from.empty()) {
        const ssize_t put = pwrite(fd, from.data(), from.size(), static_cast<off_t>(offset_bytes));
        if (put < 0 && errno == EINTR) {
            continue;
        }
        if (put <= 0) {
            return std::unexpected(Error::from_errno(
                put < 0 ? errno : ENOSPC, fmt::format("write {} at {}", path, offset_bytes)));
        }
        offset_bytes += static_cast<uint64_t>(put);
        from = from.subspan(static_cast<size_t>(put));
    }
    return {};
}

Result<uint64_t> read_all_data(int fd, int map_fd, const std::string& path, Unreadable& bad,
                               const std::function<bool()>& cancelled) {
    STELLARIUM_ASSIGN(const uint64_t size, size_of_file(map_fd, path));
    std::vector<std::byte> buffer(kReadBytes);
    uint64_t total = 0;
    for (uint64_t at = 0; at < size;) {
        const off_t data = lseek(map_fd, static_cast<off_t>(at), SEEK_DATA);
        if (data < 0 && errno == ENXIO) {
            break;  // Only a hole follows.
        }
        const off_t hole = data < 0 ? data : lseek(map_fd, data, SEEK_HOLE);
        if (hole < 0) {
            return std::unexpected(
                Error::from_errno(errno, fmt::format("look for data in {} at {}", path, at)));
        }
        const uint64_t end = std::min(static_cast<uint64_t>(hole), size);
        for (at = static_cast<uint64_t>(data); at < end;) {
            if (cancelled()) {
                return fail(ErrorCode::kCancelled, "interrupted");
            }
            const uint64_t length = std::min(kReadBytes, end - at);
            if (const Result<void> read = read_at(fd, path, at, MutableBytes(buffer).first(length));
                !read) {
                bad = {.offset_bytes = at, .length_bytes = length};
                return fail(read.error().code() == ErrorCode::kIo ? ErrorCode::kCorrupt
                                                                  : read.error().code(),
                            read.error().message());
            }
            total += length;
            at += length;
        }
    }
    return total;
}

}  // namespace stellarium::vm
