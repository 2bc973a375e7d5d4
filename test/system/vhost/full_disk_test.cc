// The real daemon on a small ext4 that is filled to the last byte, by its guests and by a
// neighbour: guests get errors and nothing else, what frees room works, and with room everything
// goes on.
#include <algorithm>
#include <array>
#include <chrono>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <sys/mount.h>
#include <sys/statvfs.h>

#include "frontend/vhost_client/test_bench.h"
#include "test/system/vhost/process.h"

namespace stellarium::vhost {
namespace {

constexpr std::chrono::seconds kDeadline{120};
constexpr size_t kPieceBytes = 256 * kKiB;

class FullDiskTest : public ::testing::Test {
  protected:
    void SetUp() override {
        // Before any thread is started.
        ::setenv("STELLARIUM_RUNTIME_DIR", (folder_ / "run").c_str(), 1);
        mount_ = folder_ / "mount";
        store_ = mount_ + "/store";
        std::filesystem::create_directory(mount_);
        const std::string image = folder_ / "ext4.img";
        std::ofstream(image).close();
        ASSERT_EQ(::truncate(image.c_str(), 192 * kMiB), 0);
        if (run({"/sbin/mkfs.ext4", "-q", "-F", image}) != 0 ||
            run({"/bin/mount", "-o", "loop", image, mount_}) != 0) {
            GTEST_SKIP() << "this system mounts no file system from a file (root, a loop device)";
        }
        mounted_ = true;
        take(40 * kMiB);
        ctl({"init"});
        ctl({"volume", "create", "big", "--size", "1GiB"});
        ctl({"volume", "create", "victim", "--size", "64MiB"});
        daemon_ = start();
        ctl({"attach", "big", "--vhost-user", folder_ / "big.sock"});
        ctl({"attach", "victim", "--vhost-user", folder_ / "victim.sock"});
    }
    void TearDown() override {
        daemon_.reset();
        if (mounted_) {
            EXPECT_EQ(::umount2(mount_.c_str(), MNT_DETACH), 0);
        }
        ::unsetenv("STELLARIUM_RUNTIME_DIR");
    }

    static int run(const std::vector<std::string>& words) { return Process(words).wait(); }
    void ctl(const std::vector<std::string>& words) const {
        EXPECT_EQ(run(all_words(words)), 0) << words[0] << " " << words[1 % words.size()];
    }
    std::vector<std::string> all_words(const std::vector<std::string>& words) const {
        std::vector<std::string> all = {STELLARIUM_CTL, "--store", store_};
        all.insert(all.end(), words.begin(), words.end());
        return all;
    }
    /// The command's output, as far as `text`, which must be in it.
    void expect_says(const std::vector<std::string>& words, std::string_view text) const {
        Process process(all_words(words));
        process.wait_for(text);
        process.drain();
        process.wait();
    }
    std::unique_ptr<Process> start() const {
        auto daemon = std::make_unique<Process>(
            std::vector<std::string>{STELLARIUM_DAEMON, "--store", store_, "--threads", "2",
                                     "--memory", "32MiB", "--writeback-age-ms", "50", "--no-gc"},
            STDERR_FILENO);
        daemon->wait_for("event=ready");
        return daemon;
    }

    uint64_t free_bytes() const {
        struct statvfs space{};
        EXPECT_EQ(::statvfs(mount_.c_str(), &space), 0);
        return space.f_bavail * space.f_frsize;
    }
    /// Another file takes so much.
    void take(uint64_t bytes) const {
        std::ofstream other(mount_ + "/other", std::ios::binary | std::ios::app);
        const std::vector<char> piece(kMiB, 'x');
        for (uint64_t taken = 0; taken < bytes; taken += piece.size()) {
            ASSERT_TRUE(other.write(piece.data(), static_cast<std::streamsize>(piece.size())));
        }
    }
    /// It takes everything that is left.
    void fill_up() const {
        std::ofstream other(mount_ + "/other", std::ios::binary | std::ios::app);
        const std::vector<char> zeros(64 * kKiB, 'x');
        for (size_t piece = zeros.size(); piece >= 512; piece /= 2) {
            while (other.write(zeros.data(), static_cast<std::streamsize>(piece)).flush()) {
            }
            other.clear();
        }
    }

    /// Bytes that are their place's and this version's.
    static std::vector<std::byte> content(uint64_t piece, uint64_t version) {
        std::vector<std::byte> bytes(kPieceBytes);
        std::mt19937_64 random(piece * 1000 + version);
        for (size_t at = 0; at < bytes.size(); at += 8) {
            const uint64_t word = random();
            std::memcpy(bytes.data() + at, &word, 8);
        }
        return bytes;
    }
    /// The virtio status of a write, and of a flush after it when that succeeded.
    static uint8_t write_and_flush(TestGuest& guest, uint64_t piece, uint64_t version) {
        const uint8_t status =
            value_of(guest.driver().write(piece * kPieceBytes, content(piece, version)), "write");
        return status != kBlkStatusOk ? status : value_of(guest.driver().flush(), "flush");
    }
    /// Writes until it fails. What was flushed stays below the returned piece.
    static uint64_t write_until_full(TestGuest& guest, uint64_t piece) {
        for (; piece < 1 * kGiB / kPieceBytes; ++piece) {
            const uint8_t status = write_and_flush(guest, piece, 1);
            if (status != kBlkStatusOk) {
                EXPECT_EQ(status, kBlkStatusIoError);
                return piece;
            }
        }
        ADD_FAILURE() << "the disk is never full";
        return piece;
    }
    static void expect_content(TestGuest& guest, uint64_t end) {
        for (uint64_t piece = 0; piece < end; piece += 1 + end / 40) {
            std::vector<std::byte> found(kPieceBytes);
            ASSERT_EQ(value_of(guest.driver().read(piece * kPieceBytes, found), "read"),
                      kBlkStatusOk)
                << piece;
            ASSERT_TRUE(found == content(piece, 1)) << piece;
        }
    }
    /// Without a restart; how soon is up to the write-back.
    static void expect_writable(TestGuest& guest, uint64_t piece) {
        const auto end = std::chrono::steady_clock::now() + kDeadline;
        while (write_and_flush(guest, piece, 1) != kBlkStatusOk) {
            ASSERT_LT(std::chrono::steady_clock::now(), end) << "it stays full";
            std::this_thread::sleep_for(std::chrono::milliseconds(50));
        }
    }

    TemporaryFolder folder_;
    std::string mount_;
    std::string store_;
    bool mounted_ = false;
    std::unique_ptr<Process> daemon_;
};

TEST_F(FullDiskTest, GuestsGetErrorsAndRoomCanBeMade) {
    TestGuest victim;
    victim.connect(folder_ / "victim.sock");
    for (uint64_t piece = 0; piece < 48 * kMiB / kPieceBytes; ++piece) {
        ASSERT_EQ(write_and_flush(victim, piece, 7), kBlkStatusOk);
    }
    TestGuest guest;
    guest.connect(folder_ / "big.sock");
    uint64_t end = write_until_full(guest, 0);
    ASSERT_GT(end, 16 * kMiB / kPieceBytes);
    fill_up();
    EXPECT_LT(free_bytes(), 64 * kKiB);
    expect_says({"status"}, "the disk is full");
    expect_content(guest, end);
    EXPECT_NE(write_and_flush(guest, end, 1), kBlkStatusOk);

    // Removing and collecting need no room of others.
    victim.client.reset();
    ctl({"detach", "victim"});
    ctl({"volume", "rm", "victim"});
    ctl({"gc"});
    EXPECT_GT(free_bytes(), 24 * kMiB);
    expect_writable(guest, end);
    end = write_until_full(guest, end + 1);

    // The operator makes room.
    fill_up();
    EXPECT_NE(write_and_flush(guest, end, 1), kBlkStatusOk);
    ASSERT_EQ(::unlink((mount_ + "/other").c_str()), 0);
    expect_writable(guest, end);
    take(20 * kMiB);
    end = write_until_full(guest, end + 1);

    // It stops and starts on a full disk; what was acknowledged is there.
    fill_up();
    guest.client.reset();
    daemon_->terminate();
    daemon_->drain();
    EXPECT_EQ(daemon_->wait(), 0) << "a clean stop";
    ctl({"volume", "ls"});
    daemon_ = start();
    TestGuest again;
    again.connect(folder_ / "big.sock");
    expect_content(again, end);
    ASSERT_EQ(::unlink((mount_ + "/other").c_str()), 0);
    expect_writable(again, end);
    again.client.reset();
    ctl({"scrub"});
    daemon_->terminate();
    daemon_->drain();
    EXPECT_EQ(daemon_->wait(), 0);
}

}  // namespace
}  // namespace stellarium::vhost
