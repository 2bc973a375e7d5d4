// The control socket, with a QEMU of ours at its other end.
#include "vm/qmp.h"

#include <filesystem>
#include <functional>
#include <thread>

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/unique_fd.h"
#include "base/unix_address.h"

namespace stellarium::vm {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr const char* kGreeting = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";

/// Listens, and talks with the first client as the test says.
class FakeQemu {
  public:
    using Talk = std::function<void(FakeQemu&)>;
    explicit FakeQemu(Talk talk) {
        std::string pattern = (std::filesystem::temp_directory_path() / "qmp-XXXXXX").string();
        EXPECT_NE(mkdtemp(pattern.data()), nullptr);
        folder_ = pattern;
        listener_ = UniqueFd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        const auto address = unix_address(path());
        EXPECT_TRUE(address);
        EXPECT_EQ(
            bind(listener_.get(), reinterpret_cast<const sockaddr*>(&*address), sizeof *address),
            0);
        EXPECT_EQ(listen(listener_.get(), 1), 0);
        thread_ = std::jthread([this, talk = std::move(talk)] {
            client_ = UniqueFd(accept(listener_.get(), nullptr, nullptr));
            talk(*this);
        });
    }
    ~FakeQemu() {
        thread_.join();
        client_.reset();
        std::filesystem::remove_all(folder_);
    }
    FakeQemu(const FakeQemu&) = delete;
    FakeQemu& operator=(const FakeQemu&) = delete;

    std::string path() const { return folder_ + "/qmp.sock"; }
    void say(const std::string& text) const {
        EXPECT_EQ(send(client_.get(), text.data(), text.size(), MSG_NOSIGNAL),
                  static_cast<ssize_t>(text.size()));
    }
    /// The next command, and its id as text.
    std::string hear() {
        while (heard_.find('\n') == std::string::npos) {
            std::array<char, 4096> buffer{};
            const ssize_t got = recv(client_.get(), buffer.data(), buffer.size(), 0);
            if (got <= 0) {
                return {};
            }
            heard_.append(buffer.data(), static_cast<size_t>(got));
        }
        const std::string line = heard_.substr(0, heard_.find('\n'));
        heard_.erase(0, line.size() + 1);
        const auto json = control::parse_json(line, "a command");
        EXPECT_TRUE(json) << line;
        id_ = std::to_string(json->value("id", uint64_t{0}));
        return json->value("execute", std::string());
    }
    void answer(const std::string& value) const {
        say("{\"return\": " + value + ", \"id\": " + id_ + "}\r\n");
    }
    void greet() {
        say(kGreeting);
        EXPECT_EQ(hear(), "qmp_capabilities");
        answer("{}");
    }
    void refuse(const std::string& kind, const std::string& why) const {
        say("{\"error\": {\"class\": \"" + kind + "\", \"desc\": \"" + why + "\"}, \"id\": " + id_ +
            "}\r\n");
    }

  private:
    std::string folder_;
    UniqueFd listener_;
    UniqueFd client_;
    std::string heard_;
    std::string id_;
    std::jthread thread_;
};

TEST(Qmp, AnswersAndEventsAreKeptApart) {
    FakeQemu qemu([](FakeQemu& other) {
        other.greet();
        EXPECT_EQ(other.hear(), "query-status");
        other.say("{\"event\": \"STOP\", \"timest");
        other.say("amp\": {\"seconds\": 1}}\r\n");
        other.say("{\"return\": {\"status\": \"of another\"}, \"id\": 99999}\r\n");
        other.answer(R"({"status": "paused", "running": false})");
        other.say("{\"event\": \"RESUME\"}\r\n");
        EXPECT_EQ(other.hear(), "") << "the client leaves";
    });
    auto qmp = Qmp::connect(qemu.path(), seconds(60));
    ASSERT_TRUE(qmp) << qmp.error().message();
    EXPECT_EQ(run_state(**qmp).value_or("?"), "paused");
    const auto first = (*qmp)->next_event(seconds(60));
    ASSERT_TRUE(first && *first);
    EXPECT_EQ((*first)->value("event", ""), "STOP");
    const auto second = (*qmp)->next_event(seconds(60));
    ASSERT_TRUE(second && *second);
    EXPECT_EQ((*second)->value("event", ""), "RESUME");
    const auto third = (*qmp)->next_event(milliseconds(1));
    ASSERT_TRUE(third);
    EXPECT_FALSE(*third);
    qmp->reset();
}

TEST(Qmp, ALineMayComeInPiecesBetweenTwoWaits) {
    FakeQemu qemu([](FakeQemu& other) {
        other.greet();
        EXPECT_EQ(other.hear(), "half");
        other.answer("{}");
        other.say("{\"event\": \"LA");
        EXPECT_EQ(other.hear(), "rest");
        other.say("TE\"}\r\n");
        other.answer("{}");
        EXPECT_EQ(other.hear(), "");
    });
    auto qmp = Qmp::connect(qemu.path(), seconds(60));
    ASSERT_TRUE(qmp);
    ASSERT_TRUE((*qmp)->execute("half"));
    EXPECT_FALSE((*qmp)->next_event(milliseconds(20)).value_or(Json()));
    ASSERT_TRUE((*qmp)->execute("rest"));
    const auto event = (*qmp)->next_event(seconds(60));
    ASSERT_TRUE(event && *event);
    EXPECT_EQ((*event)->value("event", ""), "LATE");
    qmp->reset();
}

TEST(Qmp, RefusalsSayWhy) {
    FakeQemu qemu([](FakeQemu& other) {
        other.greet();
        other.hear();
        other.refuse("GenericError", "no such thing");
        other.hear();
        other.refuse("CommandNotFound", "never heard of it");
    });
    auto qmp = Qmp::connect(qemu.path(), seconds(60));
    ASSERT_TRUE(qmp);
    const auto refused = (*qmp)->execute("one");
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kIo);
    EXPECT_NE(refused.error().message().find("no such thing"), std::string::npos);
    EXPECT_EQ((*qmp)->execute("two").error().code(), ErrorCode::kUnsupported);
}

TEST(Qmp, WhoIsGoneOrIsNoQemuIsSaid) {
    EXPECT_EQ(Qmp::connect("/nowhere/qmp.sock", seconds(1)).error().code(),
              ErrorCode::kUnavailable);
    FakeQemu silent([](FakeQemu& other) { EXPECT_EQ(other.hear(), ""); });
    EXPECT_EQ(Qmp::connect(silent.path(), milliseconds(20)).error().code(), ErrorCode::kBusy);
    FakeQemu stranger([](FakeQemu& other) { other.say("220 mail.example ESMTP\r\n"); });
    EXPECT_EQ(Qmp::connect(stranger.path(), seconds(60)).error().code(), ErrorCode::kProtocol);
    FakeQemu dying([](FakeQemu& other) {
        other.greet();
        other.hear();
    });
    auto qmp = Qmp::connect(dying.path(), seconds(60));
    ASSERT_TRUE(qmp);
}

}  // namespace
}  // namespace stellarium::vm
