// Images, volumes and snapshots of a real pool, chosen by NBD clients.
#include "daemon/nbd_host.h"

#include <filesystem>
#include <mutex>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <sys/stat.h>

#include "base/units.h"
#include "frontend/nbd_client/client.h"
#include "io/posix.h"
#include "nova/testing/test_pool.h"

namespace stellarium::daemon {
namespace {

using nbd::Answer;
using nbd::TestClient;
using nova::testing::must;

constexpr uint64_t kSize = 8 * kMiB;

std::vector<std::byte> filled(size_t length, uint8_t value) {
    std::vector<std::byte> bytes(length, static_cast<std::byte>(value));
    bytes[0] = std::byte{0xA5};
    return bytes;
}

/// In place of an answer that did not come.
Answer no_answer() {
    Answer none;
    none.error = 0xFFFF;
    return none;
}

class NbdHostTest : public testing::Test {
  protected:
    NbdHostTest() {
        std::string name =
            (std::filesystem::temp_directory_path() / "nbd-host-test-XXXXXX").string();
        folder_ = mkdtemp(name.data());
        options_.runtime_directory = folder_;
        options_.dirty_budget_bytes = 16 * kMiB;
        must(nova::Pool::create(env_, folder_ + "/store", options_));
        open();
        // An end that is no whole sector.
        auto import = must(pool_->begin_import("image"));
        must(import->append(kMiB, filled(kMiB, 1)));
        must(import->finish(4 * kMiB + 100));
        must(pool_->create_volume("vm-1", kSize));
    }
    ~NbdHostTest() override {
        host_.reset();
        pool_.reset();
        std::error_code ignored;
        std::filesystem::remove_all(folder_, ignored);
    }
    NbdHostTest(const NbdHostTest&) = delete;
    NbdHostTest& operator=(const NbdHostTest&) = delete;

    void open() {
        pool_ = must(nova::Pool::open(env_, folder_ + "/store", options_));
        host_ = std::make_unique<NbdHost>(
            *pool_,
            NbdHostOptions{.socket_path = socket(),
                           .socket_gid = {},
                           .threads = 1,
                           .attached =
                               [this](const std::string& source) {
                                   const std::scoped_lock lock(told_mutex_);
                                   told_.push_back(source);
                               }},
            log_);
        must(host_->start());
    }
    void close() {
        host_->stop();
        host_.reset();
        must(pool_->close());
        pool_.reset();
    }
    std::string socket() const { return folder_ + "/nbd.sock"; }
    std::unique_ptr<TestClient> client(std::string_view name) {
        auto made = std::make_unique<TestClient>(socket());
        EXPECT_TRUE(made->go(name)) << name;
        return made;
    }
    /// What a client is told that chooses it.
    std::string refusal(std::string_view name) {
        const auto answers = TestClient(socket()).ask(nbd::kOptGo, TestClient::info_payload(name));
        return answers.empty() ? "no answer" : answers.back().text();
    }
    std::vector<std::string> told() {
        const std::scoped_lock lock(told_mutex_);
        return told_;
    }
    bool attached(std::string_view name) { return must(pool_->find(name)).attached; }

    std::string folder_;
    Log log_{LogLevel::kError, LogFormat::kText};
    io::Env env_ = io::real_env();
    nova::PoolOptions options_;
    std::mutex told_mutex_;
    std::vector<std::string> told_;  ///< What was said to be attached. Guarded by told_mutex_.
    std::unique_ptr<nova::Pool> pool_;
    std::unique_ptr<NbdHost> host_;
};

TEST_F(NbdHostTest, TheFirstClientOfAnExportIsToldOf) {
    {
        const auto first = client("vm-1");
        const auto second = client("vm-1");
        EXPECT_EQ(told(), std::vector<std::string>{"vm-1"});
        EXPECT_NE(refusal("nothing"), "");
    }
    const auto image = client("image");
    EXPECT_EQ(told(), (std::vector<std::string>{"vm-1", "image"}));
}

TEST_F(NbdHostTest, EverythingThatHasANameIsAnExport) {
    must(pool_->create_snapshot("vm-1", "first"));
    must(pool_->create_snapshot("vm-1", "second"));
    EXPECT_EQ(must(host_->list("", 100)),
              (std::vector<std::string>{"image", "vm-1", "vm-1@first", "vm-1@second"}));
    EXPECT_EQ(must(host_->list("image", 2)), (std::vector<std::string>{"vm-1", "vm-1@first"}));
    EXPECT_TRUE(must(host_->list("vm-1@second", 2)).empty());
    const auto info = must(host_->find("image"));
    EXPECT_EQ(info.size_bytes, 4 * kMiB + 512) << "rounded up to whole sectors";
    EXPECT_TRUE(info.read_only);
    EXPECT_FALSE(must(host_->find("vm-1")).read_only);
    EXPECT_TRUE(must(host_->find("vm-1@first")).read_only);
    EXPECT_EQ(host_->find("nothing").error().code(), ErrorCode::kNotFound);
    EXPECT_EQ(host_->find("vm-1@nothing").error().code(), ErrorCode::kNotFound);
    EXPECT_FALSE(host_->find("../store"));

    const auto image = client("image");
    EXPECT_EQ(image->call(nbd::kCmdRead, kMiB, kMiB).value_or(no_answer()).content(kMiB, kMiB),
              filled(kMiB, 1));
    EXPECT_EQ(
        image->call(nbd::kCmdRead, 4 * kMiB, 512).value_or(no_answer()).content(4 * kMiB, 512),
        std::vector<std::byte>(512));
    EXPECT_EQ(image->call(nbd::kCmdTrim, 0, 512).value_or(no_answer()).error, nbd::kErrPermission);
    struct stat status{};
    ASSERT_EQ(::stat(socket().c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 07777U, 0600U);
}

TEST_F(NbdHostTest, AVolumeIsHeldByItsClientsAndByNobodyElse) {
    auto one = client("vm-1");
    auto other = client("vm-1");
    EXPECT_NE(must(pool_->find("vm-1")).attachment.find("NBD clients of "), std::string::npos);
    const auto refused = pool_->attach("vm-1", {});
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kBusy);
    EXPECT_NE(refused.error().message().find("NBD clients of "), std::string::npos);
    EXPECT_EQ(pool_->remove({"vm-1"}).error().code(), ErrorCode::kBusy);
    EXPECT_EQ(pool_->resize("vm-1", kMiB).error().code(), ErrorCode::kBusy) << "shrinking it";
    must(pool_->resize("vm-1", kSize + kMiB));
    EXPECT_EQ(one->call(nbd::kCmdRead, kSize, 512).value_or(no_answer()).error, 0U) << "growing it";
    // By another name it is the same one.
    must(pool_->rename("vm-1", "vm-2"));
    auto third = client("vm-2");
    ASSERT_TRUE(one->call(nbd::kCmdWrite, 0, 4096, 0, filled(4096, 5)));
    EXPECT_EQ(third->call(nbd::kCmdRead, 0, 4096).value_or(no_answer()).content(0, 4096),
              filled(4096, 5));
    one.reset();
    other.reset();
    EXPECT_EQ(third->call(nbd::kCmdRead, 0, 512).value_or(no_answer()).error, 0U);
    EXPECT_TRUE(attached("vm-2"));
    third.reset();
    EXPECT_TRUE(nbd::eventually([&] { return !attached("vm-2"); })) << "the last one releases it";
    EXPECT_EQ(must(pool_->find("vm-2")).dirty_bytes, 0U) << "flushed";
    {
        const auto guest = must(pool_->attach("vm-2", {.label = "a guest"}));
        EXPECT_NE(refusal("vm-2").find("a guest"), std::string::npos) << refusal("vm-2");
    }
    EXPECT_EQ(client("vm-2")->call(nbd::kCmdRead, 0, 4096).value_or(no_answer()).content(0, 4096),
              filled(4096, 5));
}

TEST_F(NbdHostTest, WhatIsChosenAgainAtOnceIsThereAgain) {
    for (unsigned i = 0; i < 50; ++i) {
        // The one before is released while this one asks.
        const auto next = client("vm-1");
        ASSERT_TRUE(next->call(nbd::kCmdWrite, uint64_t{i} * 4096, 4096, 0,
                               filled(4096, static_cast<uint8_t>(i))));
    }
    const auto last = client("vm-1");
    for (unsigned i = 0; i < 50; ++i) {
        const uint64_t offset = uint64_t{i} * 4096;
        ASSERT_EQ(
            last->call(nbd::kCmdRead, offset, 4096).value_or(no_answer()).content(offset, 4096),
            filled(4096, static_cast<uint8_t>(i)));
    }
}

TEST_F(NbdHostTest, HolesAreTrueAlsoOfWhatIsBeingWritten) {
    using Extents = std::vector<std::pair<uint32_t, uint32_t>>;
    constexpr uint32_t kHole = nbd::kStateHole | nbd::kStateZero;
    const auto map = [](TestClient& of, uint64_t size) {
        return of.call(nbd::kCmdBlockStatus, 0, static_cast<uint32_t>(size))
            .value_or(no_answer())
            .extents;
    };
    const auto image = client("image");
    EXPECT_EQ(map(*image, 4 * kMiB), (Extents{{kMiB, kHole}, {kMiB, 0}, {2 * kMiB, kHole}}));
    const auto volume = client("vm-1");
    EXPECT_EQ(map(*volume, kSize), (Extents{{kSize, kHole}}));
    ASSERT_TRUE(volume->call(nbd::kCmdWrite, 2 * kMiB, 8192, 0, filled(8192, 7)));
    const Extents written = {{2 * kMiB, kHole}, {8192, 0}, {6 * kMiB - 8192, kHole}};
    EXPECT_EQ(map(*volume, kSize), written) << "dirty or not";
    EXPECT_EQ(map(*volume, kSize), written) << "asked again";
    must(pool_->create_snapshot("vm-1", "before"));
    ASSERT_TRUE(volume->call(nbd::kCmdTrim, 2 * kMiB, 8192));
    EXPECT_EQ(map(*volume, kSize), (Extents{{kSize, kHole}}));
    EXPECT_EQ(map(*client("vm-1@before"), kSize), written);
    // Without its name, what is there cannot be told: then all of it counts as data.
    must(pool_->rename("vm-1", "renamed"));
    must(pool_->create_volume("vm-1", kSize));
    ASSERT_TRUE(volume->call(nbd::kCmdWrite, 0, 4096, 0, filled(4096, 7)));
    EXPECT_EQ(map(*volume, kSize), (Extents{{kSize, 0}}));
}

TEST_F(NbdHostTest, WhatWasWrittenIsThereAfterAStopWithClients) {
    const auto writer = client("vm-1");
    ASSERT_TRUE(writer->call(nbd::kCmdWrite, 4096, 4096, 0, filled(4096, 3)));
    host_->flush();
    ASSERT_TRUE(writer->call(nbd::kCmdWrite, 8192, 4096, 0, filled(4096, 4)));
    close();
    EXPECT_TRUE(writer->is_hung_up_on());
    EXPECT_FALSE(std::filesystem::exists(socket()));
    open();
    const auto reader = client("vm-1");
    EXPECT_EQ(reader->call(nbd::kCmdRead, 4096, 4096).value_or(no_answer()).content(4096, 4096),
              filled(4096, 3));
    EXPECT_EQ(reader->call(nbd::kCmdRead, 8192, 4096).value_or(no_answer()).content(8192, 4096),
              filled(4096, 4));
}

TEST_F(NbdHostTest, ASecondListenerIsRefused) {
    NbdHost second(*pool_, {.socket_path = socket(), .socket_gid = {}, .threads = 1}, log_);
    const auto started = second.start();
    ASSERT_FALSE(started);
    EXPECT_EQ(started.error().code(), ErrorCode::kBusy);
    EXPECT_TRUE(client("image")->connected()) << "the first one goes on";
}

}  // namespace
}  // namespace stellarium::daemon
