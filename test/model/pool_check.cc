#include "test/model/pool_check.h"

#include <algorithm>
#include <cstring>
#include <span>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include "nova/check.h"
#include "nova/testing/test_pool.h"

namespace stellarium::nova::model {

using testing::must;

bool PoolCheck::content(const std::string& source, const Content& expected, BlockDevice& device,
                        ShadowVolume* volume, bool after_crash) {
    const uint64_t size = expected.size_bytes();
    Versions uncertain;
    if (volume != nullptr) {
        uncertain.swap(volume->uncertain);
    }
    for (uint64_t offset = 0; offset < size; offset += kPieceBytes) {
        const size_t length = std::min<uint64_t>(kPieceBytes, size - offset);
        const size_t padded = (length + kSectorBytes - 1) / kSectorBytes * kSectorBytes;
        // What is not filled is found.
        std::memset(actual_.data(), 0xee, padded);
        const iovec part{.iov_base = actual_.data(), .iov_len = padded};
        must(device.read(offset, std::span(&part, 1), IoMode::kMayBlock));
        bytes_ += length;
        expected.read(offset, MutableBytes(expected_).first(length));
        if (std::memcmp(actual_.data(), expected_.data(), length) != 0 &&
            !sectors(source, offset, length, volume, uncertain, after_crash)) {
            return false;
        }
    }
    if (volume == nullptr) {
        return true;
    }
    if (after_crash) {
        volume->older.clear();
        return true;
    }
    for (auto& [sector, versions] : uncertain) {
        auto& older = volume->older[sector];
        older.insert(older.end(), versions.begin(), versions.end());
    }
    return true;
}

bool PoolCheck::sectors(const std::string& source, uint64_t offset_bytes, size_t length,
                        ShadowVolume* volume, const Versions& uncertain, bool after_crash) {
    for (size_t done = 0; done < length; done += kSectorBytes) {
        const size_t step = std::min<size_t>(kSectorBytes, length - done);
        if (std::memcmp(actual_.data() + done, expected_.data() + done, step) == 0) {
            continue;
        }
        const uint64_t number = (offset_bytes + done) / kSectorBytes;
        const auto is_one_of = [&](const Versions& versions) {
            const auto it = versions.find(number);
            return it != versions.end() &&
                   std::any_of(it->second.begin(), it->second.end(), [&](const Sector& s) {
                       return std::memcmp(s.data(), actual_.data() + done, step) == 0;
                   });
        };
        if (volume == nullptr ||
            !(is_one_of(uncertain) || (after_crash && is_one_of(volume->older)))) {
            const auto start_of = [&](const std::vector<std::byte>& bytes) {
                return fmt::format(
                    "{:02x}", fmt::join(Bytes(bytes).subspan(done, std::min<size_t>(step, 8)), ""));
            };
            ADD_FAILURE() << source << " differs in sector " << number << ": it begins with "
                          << start_of(actual_) << ", not with " << start_of(expected_);
            return false;
        }
        volume->older[number].push_back(volume->content.sector(number));
        volume->content.write(offset_bytes + done, Bytes(actual_).subspan(done, step));
    }
    return true;
}

void PoolCheck::everything(Pool& pool, Shadow& shadow, bool after_crash) {
    size_t images = 0;
    size_t volumes = 0;
    std::map<std::string, std::string> attachments;
    for (auto& [name, volume] : shadow) {
        const auto info = pool.find(name);
        if (!info) {
            ADD_FAILURE() << info.error().message();
            return;
        }
        ++(volume.is_image ? images : volumes);
        EXPECT_EQ(info->size_bytes, volume.content.size_bytes()) << name;
        EXPECT_EQ(info->parent, volume.parent) << name;
        EXPECT_EQ(info->parent_removed, volume.parent_removed) << name;
        EXPECT_EQ(info->snapshots, volume.snapshots.size()) << name;
        if (!volume.attachment.empty()) {
            attachments[name] = volume.attachment;
        }
        if (!volume.boot.empty()) {
            EXPECT_EQ(must(pool.boot_root(name)), volume.boot_root) << name;
            EXPECT_TRUE(must(pool.boot_manifest(volume.boot_root)) == volume.boot)
                << "the boot manifest of " << name;
        }
        const auto device = must(pool.attach(name, {.read_only = true}));
        content(name, volume.content, *device, &volume, after_crash);
        for (const auto& [snapshot, expected] : volume.snapshots) {
            const std::string source = name + "@" + snapshot;
            const auto reader = must(pool.attach(source, {.read_only = true}));
            content(source, expected, *reader, nullptr, false);
        }
    }
    EXPECT_EQ(pool.images().size(), images);
    EXPECT_EQ(pool.volumes().size(), volumes);
    std::map<std::string, std::string> found;
    for (const Pool::AttachmentRecord& record : pool.attachments()) {
        found[record.source] = record.label;
    }
    EXPECT_EQ(found, attachments);
}

void check_structure(const io::SimulatedFileSystem& files, bool recovered, bool data) {
    io::SimulatedMachine copy(files.fork(), 1);
    PoolCheckOptions options;
    options.check.data = data;
    const auto report = check_pool(copy.env(), testing::TestPool::kDirectory, options);
    if (!report) {
        ADD_FAILURE() << "fsck: " << report.error().message();
        return;
    }
    for (const nebula::Finding& finding : report->findings) {
        EXPECT_TRUE(finding.harmless ||
                    (!recovered && finding.kind == nebula::Finding::Kind::kSuperblock))
            << "fsck: " << to_string(finding.kind) << ": " << finding.what << " ("
            << finding.consequence << ")";
    }
    EXPECT_TRUE(report->lost.empty() && report->unknown.empty());
}

}  // namespace stellarium::nova::model
