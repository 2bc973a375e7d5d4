// The server against real protocol bytes, with a disk in memory behind it.
#include "frontend/nbd/server.h"

#include <future>
#include <random>
#include <set>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/test_scale.h"
#include "base/units.h"
#include "frontend/nbd/memory_budget.h"
#include "frontend/nbd_client/client.h"

namespace stellarium::nbd {
namespace {

using vhost::MemoryDisk;

constexpr uint64_t kDiskBytes = 8 * kMiB;

std::vector<std::byte> pattern(size_t length, uint32_t seed) {
    std::vector<std::byte> out(length);
    std::minstd_rand random(seed + 1);
    for (std::byte& byte : out) {
        byte = static_cast<std::byte>(random() >> 8);
    }
    return out;
}

/// In place of one that did not come.
Answer no_answer() {
    Answer none;
    none.error = 0xFFFF;
    return none;
}

class NbdServer : public testing::Test {
  protected:
    void SetUp() override {
        auto disk = MemoryDisk::create(kDiskBytes);
        auto frozen = MemoryDisk::create(kMiB);
        ASSERT_TRUE(disk && frozen);
        disk_ = *std::move(disk);
        frozen_ = *std::move(frozen);
        frozen_->set_read_only(true);
        frozen_->fill(std::byte{0x5A});
        exports_.add("disk", disk_);
        exports_.add("frozen", frozen_);
    }
    void start(ServerOptions options = {}) {
        options.threads = 2;
        options.logger = [this](std::string_view, std::string_view message) {
            const std::scoped_lock lock(log_mutex_);
            log_.emplace_back(message);
        };
        server_ = std::make_unique<TestServer>(exports_, std::move(options));
        ASSERT_TRUE(server_->running());
    }
    bool logged(std::string_view part) {
        const std::scoped_lock lock(log_mutex_);
        return std::ranges::any_of(
            log_, [&](const std::string& line) { return line.find(part) != std::string::npos; });
    }
    std::unique_ptr<TestClient> client(std::string_view name = "disk", bool structured = true) {
        auto made = std::make_unique<TestClient>(server_->path());
        EXPECT_TRUE(made->connected());
        EXPECT_TRUE(made->go(name, structured));
        return made;
    }

    TestExports exports_;
    std::shared_ptr<MemoryDisk> disk_;
    std::shared_ptr<MemoryDisk> frozen_;
    std::mutex log_mutex_;
    std::vector<std::string> log_;
    std::unique_ptr<TestServer> server_;
};

// --- Handshake -----------------------------------------------------------------------------------

TEST_F(NbdServer, GreetsAndHangsUpOnWhoeverDoesNot) {
    start();
    TestClient polite(server_->path());
    ASSERT_TRUE(polite.greeting());
    EXPECT_EQ(polite.greeting()->magic, 0x4e42444d41474943);
    EXPECT_EQ(polite.greeting()->option_magic, 0x49484156454f5054);
    EXPECT_EQ(polite.greeting()->flags, 3);

    TestClient unknown_flags(server_->path(), false);
    unknown_flags.take<Greeting>();
    unknown_flags.put(U32Be(0x10));
    EXPECT_TRUE(unknown_flags.is_hung_up_on());

    TestClient no_magic(server_->path());
    no_magic.send(std::vector<std::byte>(16, std::byte{7}));
    EXPECT_TRUE(no_magic.is_hung_up_on());

    TestClient old(server_->path(), false);
    old.take<Greeting>();
    old.put(U32Be(0));
    old.option(kOptList);
    EXPECT_TRUE(old.is_hung_up_on()) << "options without the fixed newstyle handshake";
    EXPECT_EQ((*server_)->status().forced_disconnects, 3);
    EXPECT_EQ(polite.ask(kOptAbort).at(0).type, kRepAck) << "nobody else is the worse for it";
    EXPECT_TRUE(polite.is_hung_up_on());
}

TEST_F(NbdServer, RefusesOptionsAndGoesOn) {
    start();
    TestClient client(server_->path());
    const auto asked = [&](uint32_t option, Bytes payload = {}) {
        const auto answers = client.ask(option, payload);
        return answers.empty() ? OptionAnswer{} : answers.back();
    };
    const std::vector<std::byte> some(100, std::byte{1});
    EXPECT_EQ(asked(4711, some).type, kRepErrUnsupported);
    EXPECT_EQ(asked(11).type, kRepErrUnsupported) << "extended headers";
    EXPECT_EQ(asked(kOptStartTls).type, kRepErrPolicy);
    EXPECT_EQ(asked(kOptList, some).type, kRepErrInvalid);
    EXPECT_EQ(asked(kOptStructuredReply, some).type, kRepErrInvalid);
    EXPECT_EQ(asked(kOptGo, some).type, kRepErrInvalid) << "the name is longer than the option";
    EXPECT_EQ(asked(kOptGo).type, kRepErrInvalid);
    auto longer = TestClient::info_payload("disk");
    longer.push_back(std::byte{0});
    EXPECT_EQ(asked(kOptInfo, longer).type, kRepErrInvalid);
    const std::vector<std::byte> large(kMaxOptionBytes + 1);
    EXPECT_EQ(asked(kOptInfo, large).type, kRepErrTooBig);
    EXPECT_EQ(asked(4711, large).type, kRepErrTooBig);
    EXPECT_EQ(asked(kOptSetMetaContext, TestClient::meta_payload("disk", {})).type, kRepErrInvalid)
        << "before structured replies";
    const auto unknown = asked(kOptGo, TestClient::info_payload("nothing"));
    EXPECT_EQ(unknown.type, kRepErrUnknown);
    EXPECT_EQ(unknown.text(), "no disk has that name");
    const auto unnamed = asked(kOptGo, TestClient::info_payload(""));
    EXPECT_EQ(unnamed.type, kRepErrUnknown);
    EXPECT_NE(unnamed.text().find("--list"), std::string::npos) << "it says how to find names";
    EXPECT_EQ(asked(kOptInfo, TestClient::info_payload(std::string(5000, 'x'))).type,
              kRepErrUnknown);
    exports_.set_busy("disk");
    const auto busy = asked(kOptGo, TestClient::info_payload("disk"));
    EXPECT_EQ(busy.type, kRepErrPolicy);
    EXPECT_EQ(busy.text(), "a guest has it");
    EXPECT_EQ(asked(kOptInfo, TestClient::info_payload("disk")).type, kRepAck);
    exports_.set_busy("");
    EXPECT_EQ(asked(kOptGo, TestClient::info_payload("disk")).type, kRepAck) << "after all of this";

    TestClient endless(server_->path());
    endless.put(OptionHeader{.option = 4711, .length_bytes = 0xFFFF'FFFF});
    EXPECT_TRUE(endless.is_hung_up_on());
}

TEST_F(NbdServer, TellsWhatAnExportIs) {
    start();
    TestClient client(server_->path());
    for (const bool structured : {false, true}) {
        if (structured) {
            EXPECT_EQ(client.ask(kOptStructuredReply).at(0).type, kRepAck);
            EXPECT_EQ(client.ask(kOptStructuredReply).at(0).type, kRepErrInvalid);
        }
        const auto answers =
            client.ask(kOptInfo, TestClient::info_payload("frozen", {kInfoName, kInfoDescription}));
        ASSERT_EQ(answers.size(), 5U);
        const auto info = load<InfoExport>(answers[0].payload);
        EXPECT_EQ(info.type, kInfoExport);
        EXPECT_EQ(info.size_bytes, kMiB);
        const unsigned df = structured ? kFlagSendDf : 0;
        EXPECT_EQ(info.flags, kFlagHasFlags | kFlagReadOnly | kFlagSendFlush | kFlagSendFua |
                                  kFlagCanMultiConn | kFlagSendCache | df);
        const auto sizes = load<InfoBlockSize>(answers[1].payload);
        EXPECT_EQ(sizes.type, kInfoBlockSize);
        EXPECT_EQ(sizes.minimum_bytes, 512);
        EXPECT_EQ(sizes.preferred_bytes, 4096);
        EXPECT_EQ(sizes.maximum_bytes, 32 * kMiB);
        EXPECT_EQ(answers[2].text().substr(2), "frozen");
        EXPECT_EQ(answers[3].text().substr(2), "a disk in memory");
    }
    EXPECT_EQ(exports_.opened(), 0) << "being told of it does not open it";
    const auto writable = client.ask(kOptInfo, TestClient::info_payload("disk"));
    const unsigned flags = load<InfoExport>(writable.at(0).payload).flags;
    EXPECT_EQ(flags & (kFlagReadOnly | kFlagSendTrim | kFlagSendWriteZeroes),
              kFlagSendTrim | kFlagSendWriteZeroes);

    // Contexts: a list shows what there is, a choice takes what it names.
    const auto chosen = [&](uint32_t option, const std::vector<std::string>& queries) {
        return client.ask(option, TestClient::meta_payload("disk", queries)).size() - 1;
    };
    EXPECT_EQ(chosen(kOptListMetaContext, {}), 1);
    EXPECT_EQ(chosen(kOptListMetaContext, {"base:"}), 1);
    EXPECT_EQ(chosen(kOptListMetaContext, {"x-none:"}), 0);
    EXPECT_EQ(chosen(kOptSetMetaContext, {}), 0);
    EXPECT_EQ(chosen(kOptSetMetaContext, {"base:"}), 0);
    EXPECT_EQ(chosen(kOptSetMetaContext, {"x-none:", "base:allocation"}), 1);
    EXPECT_EQ(client.ask(kOptSetMetaContext, TestClient::meta_payload("nothing", {})).at(0).type,
              kRepErrUnknown);
    // That failed, and what was chosen before is no more.
    ASSERT_EQ(client.ask(kOptGo, TestClient::info_payload("disk")).back().type, kRepAck);
    client.request(kCmdBlockStatus, 0, 4096);
    EXPECT_EQ(client.answer().value_or(Answer{}).error, kErrInvalid);
}

TEST_F(NbdServer, ListsMoreThanItHoldsAtOnce) {
    std::set<std::string> expected = {"disk", "frozen"};
    for (size_t i = 0; i < 2 * kListPage + 500; ++i) {
        exports_.add(fmt::format("vm-{:05}", i), frozen_);
        expected.insert(fmt::format("vm-{:05}", i));
    }
    start();
    TestClient client(server_->path());
    const auto answers = client.ask(kOptList);
    ASSERT_EQ(answers.size(), expected.size() + 1);
    std::set<std::string> names;
    for (const OptionAnswer& answer : answers) {
        if (answer.type == kRepServer) {
            EXPECT_EQ(load<U32Be>(answer.payload), answer.payload.size() - 4);
            names.insert(answer.text().substr(4));
        }
    }
    EXPECT_EQ(names, expected);
    EXPECT_EQ(client.ask(kOptList).size(), expected.size() + 1) << "and once more";
    // An exact number of pages ends, too.
    TestExports exact;
    for (size_t i = 0; i < kListPage; ++i) {
        exact.add(fmt::format("{:04}", i), frozen_);
    }
    TestServer other(exact, {.threads = 1});
    EXPECT_EQ(TestClient(other.path()).ask(kOptList).size(), kListPage + 1);
}

TEST_F(NbdServer, ServesTheOldWayToChooseAnExport) {
    start();
    for (const bool zeroes : {false, true}) {
        TestClient client(server_->path(), false);
        client.take<Greeting>();
        client.put(
            U32Be(zeroes ? kHandshakeFixedNewstyle : kHandshakeFixedNewstyle | kHandshakeNoZeroes));
        client.option(kOptExportName, bytes_of(std::string_view("disk")));
        const auto reply = client.take<ExportNameReply>();
        ASSERT_TRUE(reply);
        EXPECT_EQ(reply->size_bytes, kDiskBytes);
        EXPECT_EQ(reply->flags & kFlagHasFlags, kFlagHasFlags);
        if (zeroes) {
            const auto rest = client.receive(kExportNameZeroes);
            ASSERT_TRUE(rest);
            EXPECT_TRUE(all_zero(*rest));
        }
        const auto answer = client.call(kCmdRead, 0, 512);
        ASSERT_TRUE(answer);
        EXPECT_EQ(answer->chunks, 0);
        EXPECT_EQ(answer->data.at(0), std::vector<std::byte>(512));
    }
    for (const std::string_view name : {"", "nothing"}) {
        TestClient client(server_->path());
        client.option(kOptExportName, bytes_of(name));
        EXPECT_TRUE(client.is_hung_up_on());
    }
}

// --- Requests ------------------------------------------------------------------------------------

TEST_F(NbdServer, ReadsWhatWasWritten) {
    start();
    for (const bool structured : {true, false}) {
        for (const bool would_block : {false, true}) {
            disk_->set_would_block(would_block);
            disk_->fill(std::byte{0});
            const auto client = this->client("disk", structured);
            std::vector<std::byte> shadow(kDiskBytes);
            // Within the input buffer, one piece, and several with a rest.
            for (const uint32_t length : {512U, 4096U, 65536U, 66048U, 262144U, 1051136U}) {
                const uint64_t offset = 512 + length;
                const auto data = pattern(length, length);
                const auto written = client->call(kCmdWrite, offset, length, 0, data);
                ASSERT_TRUE(written);
                EXPECT_EQ(written->error, 0U);
                std::memcpy(shadow.data() + offset, data.data(), length);
                // With zeros before and after, so that some pieces are holes.
                const auto read = client->call(kCmdRead, 0, 4 * kMiB);
                ASSERT_TRUE(read);
                EXPECT_EQ(read->error, 0U);
                const auto content = read->content(0, 4 * kMiB);
                ASSERT_TRUE(content) << length;
                EXPECT_TRUE(std::ranges::equal(*content, std::span(shadow).first(4 * kMiB)));
                EXPECT_EQ(structured, !read->holes.empty());
            }
            EXPECT_EQ(disk_->content(0, kDiskBytes), shadow);
        }
    }
    const ServerStatus status = (*server_)->status();
    EXPECT_EQ(status.totals[0].requests, 24U);
    EXPECT_EQ(status.totals[0].bytes, 24 * 4 * kMiB);
    EXPECT_EQ(status.totals[1].requests, 24U);
    EXPECT_EQ(status.totals[1].errors, 0U);
}

TEST_F(NbdServer, RefusesWhatCannotBeDone) {
    start();
    const auto client = this->client();
    const auto error = [&](uint16_t command, uint64_t offset, uint32_t length, uint16_t flags = 0,
                           Bytes payload = {}) {
        const auto answer = client->call(command, offset, length, flags, payload);
        return answer ? answer->error : 0xFFFF;
    };
    const auto data = pattern(4096, 1);
    EXPECT_EQ(error(kCmdRead, kDiskBytes, 512), kErrInvalid);
    EXPECT_EQ(error(kCmdRead, kDiskBytes - 512, 1024), kErrInvalid);
    EXPECT_EQ(error(kCmdRead, UINT64_MAX - 511, 512), kErrInvalid);
    EXPECT_EQ(error(kCmdRead, UINT64_MAX - 511, 0xFFFF'FE00), kErrInvalid);
    EXPECT_EQ(error(kCmdRead, 1, 512), kErrInvalid);
    EXPECT_EQ(error(kCmdRead, 0, 100), kErrInvalid);
    EXPECT_EQ(error(kCmdRead, 0, 0), kErrInvalid);
    EXPECT_EQ(error(kCmdWrite, 0, 0), kErrInvalid);
    EXPECT_EQ(error(kCmdWrite, kDiskBytes, 4096, 0, data), kErrNoSpace);
    EXPECT_EQ(error(kCmdWrite, 100, 4096, 0, data), kErrInvalid);
    EXPECT_EQ(error(kCmdWriteZeroes, kDiskBytes, 4096), kErrNoSpace);
    EXPECT_EQ(error(kCmdTrim, kDiskBytes, 4096), kErrInvalid);
    EXPECT_EQ(error(kCmdBlockStatus, kDiskBytes, 4096), kErrInvalid);
    EXPECT_EQ(error(99, 0, 512), kErrInvalid);
    EXPECT_EQ(error(kCmdRead, 0, 512, kCmdFlagNoHole), kErrInvalid);
    EXPECT_EQ(error(kCmdWrite, 0, 4096, kCmdFlagDf, data), kErrInvalid);
    EXPECT_EQ(error(kCmdWriteZeroes, 0, 4096, 1 << 4), kErrInvalid) << "fast zeroes";
    EXPECT_EQ(error(kCmdRead, 0, kMaxUnfragmentedBytes + 512, kCmdFlagDf), kErrOverflow);
    EXPECT_EQ(error(kCmdFlush, 0, 0), 0U) << "it goes on after all of these";
    EXPECT_EQ(disk_->writes(), 0U);
    const auto explained = client->call(kCmdRead, 1, 512);
    ASSERT_TRUE(explained);
    EXPECT_NE(explained->message.find("blocks of 512"), std::string::npos);

    const auto frozen = this->client("frozen");
    for (const uint16_t command : {kCmdWrite, kCmdTrim, kCmdWriteZeroes}) {
        const auto answer =
            frozen->call(command, 0, 4096, 0, command == kCmdWrite ? Bytes(data) : Bytes());
        ASSERT_TRUE(answer);
        EXPECT_EQ(answer->error, kErrPermission);
    }
    EXPECT_EQ(frozen->call(kCmdRead, 0, 512).value_or(Answer{}).content(0, 512),
              std::vector<std::byte>(512, std::byte{0x5A}));

    // Simple replies have errors, too, and no flags that need structured ones.
    const auto simple = this->client("disk", false);
    EXPECT_EQ(simple->call(kCmdRead, 1, 512).value_or(Answer{}).error, kErrInvalid);
    EXPECT_EQ(simple->call(kCmdRead, 0, 512, kCmdFlagDf).value_or(Answer{}).error, kErrInvalid);
    EXPECT_EQ(simple->call(kCmdBlockStatus, 0, 512).value_or(Answer{}).error, kErrInvalid);

    simple->send(std::vector<std::byte>(28, std::byte{9}));
    EXPECT_TRUE(simple->is_hung_up_on());
    EXPECT_TRUE(eventually([&] { return logged("without its magic number"); }));
}

TEST_F(NbdServer, SkipsTheDataOfAWriteThatIsTooLong) {
    start();
    const auto client = this->client();
    std::thread writer([&] {
        client->request(kCmdWrite, 0, kMaxTransferBytes + 512, 0,
                        std::vector<std::byte>(kMaxTransferBytes + 512));
    });
    const auto answer = client->answer();
    writer.join();
    ASSERT_TRUE(answer);
    EXPECT_NE(answer->error, 0U);
    EXPECT_EQ(client->call(kCmdRead, 0, 512).value_or(no_answer()).error, 0U);
    EXPECT_EQ(disk_->writes(), 0U);
}

TEST_F(NbdServer, DoesNotFragmentWhereAskedNotTo) {
    start();
    const auto client = this->client();
    const auto data = pattern(4096, 3);
    ASSERT_TRUE(client->call(kCmdWrite, 4096, 4096, 0, data));
    const auto mixed = client->call(kCmdRead, 0, kMaxUnfragmentedBytes, kCmdFlagDf);
    ASSERT_TRUE(mixed);
    EXPECT_EQ(mixed->data.size(), 1U);
    EXPECT_TRUE(mixed->holes.empty());
    EXPECT_EQ(mixed->content(0, kMaxUnfragmentedBytes), disk_->content(0, kMaxUnfragmentedBytes));
}

TEST_F(NbdServer, MakesZeros) {
    start();
    for (const bool would_block : {false, true}) {
        disk_->fill(std::byte{7});
        disk_->set_would_block(would_block);
        const auto client = this->client();
        EXPECT_EQ(client->call(kCmdTrim, 4096, 8192).value_or(no_answer()).error, 0U);
        EXPECT_EQ(client->call(kCmdWriteZeroes, kMiB, 3 * kMiB, kCmdFlagNoHole)
                      .value_or(no_answer())
                      .error,
                  0U);
        std::vector<std::byte> expected(kDiskBytes, std::byte{7});
        std::fill_n(expected.begin() + 4096, 8192, std::byte{0});
        std::fill_n(expected.begin() + kMiB, 3 * kMiB, std::byte{0});
        EXPECT_EQ(disk_->content(0, kDiskBytes), expected);
        EXPECT_EQ(client->call(kCmdCache, 0, kDiskBytes).value_or(no_answer()).error, 0U);

        // What holds data is told from the outset of the range to its end, cut at both.
        const auto status = client->call(kCmdBlockStatus, 512, 2 * kMiB);
        ASSERT_TRUE(status);
        using Extents = std::vector<std::pair<uint32_t, uint32_t>>;
        const Extents all = {{4096 - 512, 0},
                             {8192, kStateHole | kStateZero},
                             {kMiB - 12288, 0},
                             {kMiB + 512, kStateHole | kStateZero}};
        EXPECT_EQ(status->extents, all);
        const auto one = client->call(kCmdBlockStatus, 0, 2 * kMiB, kCmdFlagReqOne);
        ASSERT_TRUE(one);
        EXPECT_EQ(one->extents, (Extents{{4096, 0}}));
    }
}

TEST_F(NbdServer, BoundsTheExtentsOfAnAnswer) {
    start();
    const auto client = this->client();
    const auto data = pattern(4096, 5);
    for (uint64_t at = 0; at < kDiskBytes; at += 8192) {
        ASSERT_TRUE(client->call(kCmdWrite, at, 4096, 0, data));
    }
    uint64_t position = 0;
    unsigned answers = 0;
    while (position < kDiskBytes) {
        const auto answer =
            client->call(kCmdBlockStatus, position, static_cast<uint32_t>(kDiskBytes - position));
        ASSERT_TRUE(answer);
        ASSERT_FALSE(answer->extents.empty());
        EXPECT_LE(answer->extents.size(), kMaxStatusExtents);
        for (const auto& [length, flags] : answer->extents) {
            ASSERT_EQ(length, 4096U);
            ASSERT_EQ(flags, position % 8192 == 0 ? 0 : kStateHole | kStateZero);
            position += length;
        }
        ++answers;
    }
    EXPECT_EQ(answers, kDiskBytes / 4096 / kMaxStatusExtents);
}

TEST_F(NbdServer, AnswersAfterTheFlushThatWasAskedFor) {
    start();
    const auto client = this->client();
    const auto data = pattern(4096, 1);
    ASSERT_TRUE(client->call(kCmdWrite, 0, 4096, 0, data));
    EXPECT_EQ(disk_->flushes(), 0U);
    uint64_t flushes = 0;
    for (const uint16_t command : {kCmdWrite, kCmdTrim, kCmdWriteZeroes}) {
        const auto answer = client->call(command, 0, 4096, kCmdFlagFua,
                                         command == kCmdWrite ? Bytes(data) : Bytes());
        ASSERT_TRUE(answer);
        EXPECT_EQ(answer->error, 0U);
        EXPECT_EQ(disk_->flushes(), ++flushes) << command;
    }
    ASSERT_TRUE(client->call(kCmdRead, 0, 4096, kCmdFlagFua));
    EXPECT_EQ(disk_->flushes(), flushes) << "what writes nothing flushes nothing";

    // A flush that takes its time is answered when it is done; others overtake it.
    disk_->hold();
    const uint64_t flush = client->request(kCmdFlush, 0, 0);
    const uint64_t wrong = client->request(kCmdRead, 1, 512);
    const auto first = client->answer();
    ASSERT_TRUE(first);
    EXPECT_EQ(first->cookie, wrong);
    disk_->wait_until_held(1);
    disk_->release();
    const auto second = client->answer();
    ASSERT_TRUE(second);
    EXPECT_EQ(second->cookie, flush);
    EXPECT_EQ(second->error, 0U);
    // A write whose flush fails has failed.
    disk_->set_failure(std::make_shared<const Error>(ErrorCode::kIo, "the disk is gone"));
    const auto failed = client->call(kCmdFlush, 0, 0);
    ASSERT_TRUE(failed);
    EXPECT_EQ(failed->error, kErrIo);
    EXPECT_EQ(failed->message, "the disk is gone");
    disk_->set_failure(nullptr);
}

TEST_F(NbdServer, SaysWhatFailed) {
    start();
    const auto client = this->client();
    const auto simple = this->client("disk", false);
    const auto data = pattern(kMiB, 1);
    for (const bool would_block : {false, true}) {
        disk_->set_would_block(would_block);
        disk_->set_failure(std::make_shared<const Error>(ErrorCode::kNoSpace, "no room"));
        const auto written = client->call(kCmdWrite, 0, kMiB, 0, data);
        ASSERT_TRUE(written);
        EXPECT_EQ(written->error, kErrNoSpace);
        EXPECT_EQ(written->message, "no room");
        EXPECT_EQ(simple->call(kCmdWrite, 0, kMiB, 0, data).value_or(Answer{}).error, kErrNoSpace);
        disk_->set_failure(std::make_shared<const Error>(ErrorCode::kCorrupt, "rotten"));
        const auto read = client->call(kCmdRead, 0, kMiB);
        ASSERT_TRUE(read);
        EXPECT_EQ(read->error, kErrIo);
        EXPECT_EQ(simple->call(kCmdRead, 0, 4096).value_or(Answer{}).error, kErrIo);
        EXPECT_EQ(simple->call(kCmdRead, 0, kMiB).value_or(Answer{}).error, kErrIo);
        EXPECT_EQ(client->call(kCmdCache, 0, kMiB).value_or(Answer{}).error, kErrIo);
        EXPECT_EQ(client->call(kCmdTrim, 0, kMiB).value_or(Answer{}).error, kErrIo);
        disk_->set_failure(nullptr);
        EXPECT_EQ(client->call(kCmdRead, 0, kMiB).value_or(no_answer()).error, 0U);
        EXPECT_EQ(simple->call(kCmdRead, 0, kMiB).value_or(no_answer()).error, 0U);
    }
    EXPECT_TRUE(logged("no room"));
    EXPECT_GE((*server_)->status().totals[1].errors, 4U);
}

// Programs of requests at depth 32 on two connections against a shadow of the disk.
TEST_F(NbdServer, AgreesWithAShadowWhateverIsAsked) {
    start();
    constexpr uint64_t kZones = 32;
    constexpr uint64_t kZoneBytes = kDiskBytes / kZones;
    for (uint64_t round = 0; round < scaled(12, 4); ++round) {
        const uint64_t seed = first_seed() + round;
        SCOPED_TRACE(fmt::format("STELLARIUM_TEST_SEED={}", seed));
        std::mt19937_64 random(seed);
        disk_->set_would_block(round % 3 == 1);
        std::vector<std::byte> shadow = disk_->content(0, kDiskBytes);
        const std::array clients = {client("disk", round % 2 == 0), client()};
        struct Sent {
            uint16_t command;
            uint64_t offset;
            uint32_t length;
        };
        for (unsigned batch = 0; batch < 12; ++batch) {
            std::array<std::map<uint64_t, Sent>, 2> sent;
            for (uint64_t zone = 0; zone < kZones; ++zone) {
                constexpr std::array<uint16_t, 5> kCommands = {kCmdRead, kCmdWrite, kCmdTrim,
                                                               kCmdWriteZeroes, kCmdFlush};
                const uint16_t command = kCommands.at(random() % kCommands.size());
                const auto sectors = 1 + random() % (zone % 4 == 0 ? kZoneBytes / 512 : 16);
                const uint64_t first = random() % (kZoneBytes / 512 - sectors + 1);
                const Sent request{.command = command,
                                   .offset = zone * kZoneBytes + first * 512,
                                   .length = static_cast<uint32_t>(sectors * 512)};
                std::vector<std::byte> data;
                if (command == kCmdWrite) {
                    data = pattern(request.length, static_cast<uint32_t>(random()));
                    std::memcpy(shadow.data() + request.offset, data.data(), data.size());
                } else if (command == kCmdTrim || command == kCmdWriteZeroes) {
                    std::memset(shadow.data() + request.offset, 0, request.length);
                }
                const size_t who = random() % 2;
                const bool flush = command == kCmdFlush;
                const uint64_t cookie = clients[who]->request(
                    command, flush ? 0 : request.offset, flush ? 0 : request.length,
                    random() % 8 == 0 ? kCmdFlagFua : uint16_t{0}, data);
                sent[who].emplace(cookie, request);
            }
            for (size_t who = 0; who < 2; ++who) {
                while (!sent[who].empty()) {
                    const auto answer = clients[who]->answer();
                    ASSERT_TRUE(answer);
                    const auto request = sent[who].extract(answer->cookie);
                    ASSERT_TRUE(request);
                    ASSERT_EQ(answer->error, 0U);
                    if (request.mapped().command == kCmdRead) {
                        const uint64_t offset = request.mapped().offset;
                        const auto content = answer->content(answer->chunks == 0 ? 0 : offset,
                                                             request.mapped().length);
                        ASSERT_TRUE(content);
                        ASSERT_TRUE(std::ranges::equal(
                            *content, std::span(shadow).subspan(offset, content->size())));
                    }
                }
            }
        }
        ASSERT_EQ(disk_->content(0, kDiskBytes), shadow);
    }
}

// --- Clients -------------------------------------------------------------------------------------

TEST_F(NbdServer, SharesAnExportBetweenConnections) {
    start();
    {
        const auto one = client();
        const auto other = client();
        EXPECT_EQ(exports_.opened(), 1U);
        const auto data = pattern(4096, 9);
        ASSERT_TRUE(one->call(kCmdWrite, 8192, 4096, 0, data));
        EXPECT_EQ(other->call(kCmdRead, 8192, 4096).value_or(Answer{}).content(8192, 4096), data);
        ASSERT_TRUE(other->call(kCmdFlush, 0, 0));
        EXPECT_EQ(disk_->flushes(), 1U) << "of the one device that has both clients' writes";
        one->request(kCmdDisconnect, 0, 0);
        EXPECT_TRUE(one->is_hung_up_on());
        EXPECT_EQ(other->call(kCmdRead, 8192, 4096).value_or(Answer{}).content(8192, 4096), data);
        EXPECT_EQ(exports_.open_now(), 1U);
    }
    EXPECT_TRUE(eventually([&] { return exports_.open_now() == 0; })) << "the last one closes it";
}

TEST_F(NbdServer, OutlivesClientsThatDieInTheMiddle) {
    start();
    const auto data = pattern(kMiB, 2);
    for (const size_t sent :
         {size_t{1}, size_t{27}, size_t{28}, size_t{28 + 4000}, 28 + kMiB / 2}) {
        const auto client = this->client();
        std::vector<std::byte> request;
        append_bytes(request, bytes_of(RequestHeader{.flags = 0,
                                                     .command = kCmdWrite,
                                                     .cookie = 1,
                                                     .offset_bytes = 0,
                                                     .length_bytes = kMiB}));
        append_bytes(request, data);
        request.resize(sent);
        client->send(request);
        client->close();
        EXPECT_TRUE(eventually([&] { return exports_.open_now() == 0; })) << sent;
    }
    // Death while the disk works for it.
    disk_->hold();
    auto client = this->client();
    client->request(kCmdWrite, 0, 4096, 0, std::span(data).first(4096));
    client->request(kCmdRead, 0, kMiB);
    client->request(kCmdFlush, 0, 0);
    disk_->wait_until_held(3);
    client->close();
    disk_->release();
    EXPECT_TRUE(eventually([&] { return exports_.open_now() == 0; }));
    EXPECT_TRUE(eventually([&] { return (*server_)->status().clients == 0; }));
    EXPECT_EQ((*server_)->status().pending_bytes, 0U) << "what it held is given back";
    EXPECT_EQ(this->client()->call(kCmdRead, 0, 4096).value_or(Answer{}).content(0, 4096),
              std::vector<std::byte>(data.begin(), data.begin() + 4096));
}

TEST_F(NbdServer, AnswersWhoeverSaysNoMore) {
    start();
    for (const bool structured : {true, false}) {
        disk_->fill(std::byte{3});
        const auto client = this->client("disk", structured);
        const uint64_t cookie = client->request(kCmdRead, 0, 4 * kMiB);
        client->say_no_more();
        const auto answer = client->answer();
        ASSERT_TRUE(answer);
        EXPECT_EQ(answer->cookie, cookie);
        EXPECT_TRUE(answer->content(0, 4 * kMiB));
        EXPECT_TRUE(client->is_hung_up_on());
    }
}

TEST_F(NbdServer, OneWhoTakesNoAnswersHoldsLittleAndStopsNobody) {
    disk_->fill(std::byte{1});
    start({.stall_timeout = std::chrono::seconds(4)});
    const auto slow = client();
    for (unsigned i = 0; i < 64; ++i) {
        slow->request(kCmdRead, 0, kDiskBytes);
    }
    const auto healthy = client();
    uint64_t most = 0;
    EXPECT_TRUE(eventually([&] {
        EXPECT_EQ(healthy->call(kCmdRead, 0, kMiB).value_or(no_answer()).error, 0U);
        const ServerStatus status = (*server_)->status();
        most = std::max(most, status.pending_bytes);
        return status.forced_disconnects == 1;
    })) << "it is disconnected after a while";
    EXPECT_LE(most, 2 * kMaxClientBytes);
    EXPECT_TRUE(logged("takes no answers"));
    EXPECT_EQ(healthy->call(kCmdRead, 0, kMiB).value_or(no_answer()).error, 0U);
}

TEST_F(NbdServer, DoesNotWaitForEver) {
    start({.handshake_timeout = std::chrono::milliseconds(50),
           .stall_timeout = std::chrono::milliseconds(50)});
    TestClient silent(server_->path());
    EXPECT_TRUE(silent.is_hung_up_on());
    EXPECT_TRUE(logged("did not finish the handshake"));
}

TEST_F(NbdServer, DoesNotWaitForTheRestOfARequest) {
    start({.stall_timeout = std::chrono::milliseconds(500)});
    const auto client = this->client();
    ASSERT_TRUE(client->call(kCmdRead, 0, 512)) << "who is idle may be";
    client->request(kCmdWrite, 0, kMiB, 0, std::vector<std::byte>(1000));
    EXPECT_TRUE(client->is_hung_up_on());
    EXPECT_TRUE(logged("in the middle of a request"));
}

TEST_F(NbdServer, FurtherClientsWaitTheirTurn) {
    start({.max_clients = 2});
    auto first = client();
    const auto second = client();
    TestClient third(server_->path(), false);
    ASSERT_TRUE(third.connected());
    EXPECT_EQ(second->call(kCmdRead, 0, 512).value_or(no_answer()).error, 0U);
    EXPECT_EQ((*server_)->status().connections, 2U);
    first.reset();
    EXPECT_TRUE(third.take<Greeting>());
    EXPECT_EQ((*server_)->status().connections, 3U);
}

TEST_F(NbdServer, StopsWhenItHasAnsweredWhatWasAsked) {
    start();
    const auto client = this->client();
    TestClient waiting(server_->path());
    const auto data = pattern(4096, 4);
    disk_->hold();
    const uint64_t write = client->request(kCmdWrite, 0, 4096, 0, data);
    disk_->wait_until_held(1);
    auto stopped = std::async(std::launch::async, [&] { (*server_)->stop(); });
    EXPECT_TRUE(waiting.is_hung_up_on()) << "who has asked nothing yet";
    disk_->release();
    const auto answer = client->answer();
    ASSERT_TRUE(answer);
    EXPECT_EQ(answer->cookie, write);
    EXPECT_EQ(answer->error, 0U);
    EXPECT_TRUE(client->is_hung_up_on());
    stopped.get();
    EXPECT_EQ(exports_.open_now(), 0U);
    EXPECT_FALSE(TestClient(server_->path(), false).take<Greeting>());
}

// --- Parts ---------------------------------------------------------------------------------------

TEST(NbdMemoryBudget, GivesEachItsReserveAndAllTheRest) {
    MemoryBudget budget(1 * kMiB);
    uint64_t greedy = 0;
    while (budget.take(greedy, 256 * kKiB)) {
    }
    EXPECT_EQ(greedy, kReservedBytes + kMiB) << "its reserve and all that is shared";
    EXPECT_EQ(budget.used(), kMiB);
    uint64_t modest = 0;
    EXPECT_TRUE(budget.take(modest, kReservedBytes)) << "whatever others have";
    EXPECT_FALSE(budget.take(modest, 1));
    budget.give(greedy, greedy);
    EXPECT_EQ(budget.used(), 0U);
    EXPECT_TRUE(budget.take(modest, kMiB));
    EXPECT_FALSE(budget.take(greedy, kReservedBytes + 1));
    MemoryBudget ample(kSharedBytes);
    uint64_t one = 0;
    EXPECT_TRUE(ample.take(one, kMaxClientBytes));
    EXPECT_FALSE(ample.take(one, 1)) << "one client has a bound of its own";
}

TEST(NbdTurnPool, AnOwnerThatWaitsHoldsUpNoOther) {
    for (const bool grows : {false, true}) {
        TurnPool pool("test", {.threads = 2, .at_once = 1, .grows = grows});
        std::promise<void> go;
        const std::shared_future<void> gone = go.get_future().share();
        const auto stuck = std::make_shared<TurnPool::Turns>();
        const auto healthy = std::make_shared<TurnPool::Turns>();
        std::atomic<unsigned> stuck_done{0};
        for (unsigned i = 0; i < 8; ++i) {
            pool.submit(stuck, [&, gone] {
                gone.wait();
                ++stuck_done;
            });
        }
        std::vector<std::shared_ptr<TurnPool::Turns>> others;
        if (grows) {
            for (unsigned i = 0; i < 4; ++i) {
                others.push_back(std::make_shared<TurnPool::Turns>());
                pool.submit(others.back(), [gone] { gone.wait(); });
            }
        }
        std::promise<void> done;
        pool.submit(healthy, [&] { done.set_value(); });
        EXPECT_EQ(done.get_future().wait_for(kTestPatience), std::future_status::ready);
        EXPECT_EQ(stuck_done, 0U);
        go.set_value();
        pool.stop();
        EXPECT_EQ(stuck_done, 8U) << "what was submitted is done";
    }
}

}  // namespace
}  // namespace stellarium::nbd
