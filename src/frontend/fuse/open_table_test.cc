// The table of open files over the death of its process, and what a holder and a daemon say.
#include "frontend/fuse/open_table.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "frontend/fuse/holder_protocol.h"

namespace stellarium::fuse {
namespace {

UniqueFd new_table() {
    auto memory = OpenTable::create();
    EXPECT_TRUE(memory) << memory.error().message();
    return *std::move(memory);
}

std::unique_ptr<OpenTable> map(const UniqueFd& memory) {
    auto table = OpenTable::map(UniqueFd(dup(memory.get())));
    EXPECT_TRUE(table) << table.error().message();
    return table ? *std::move(table) : nullptr;
}

OpenFile file(uint64_t unique, uint64_t node, uint32_t flags) {
    return {.unique = unique, .node = node, .flags = flags, .handle = 0};
}

TEST(OpenTable, WhatIsOpenOutlivesTheProcess) {
    const UniqueFd memory = new_table();
    const pid_t child = fork();
    if (child == 0) {
        const auto table = map(memory);
        const uint64_t first = table->add(file(10, 100, kOpenCached)).value();
        const uint64_t second = table->add(file(12, 200, kOpenWriting | kOpenHolds)).value();
        table->remove(first);
        _exit(table->count() == 1 && second != 0 ? 0 : 1);  // No destructor runs.
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_EQ(status, 0);
    const auto table = map(memory);
    const auto files = table->files();
    ASSERT_EQ(files.size(), 1U);
    EXPECT_EQ(files[0].unique, 12U);
    EXPECT_EQ(files[0].node, 200U);
    EXPECT_EQ(files[0].flags, kOpenWriting | kOpenHolds);
    const auto left = table->find_left(12);
    ASSERT_TRUE(left);
    EXPECT_EQ(left->handle, files[0].handle);
    EXPECT_FALSE(table->find_left(10)) << "it was closed";
    EXPECT_TRUE(table->remove(files[0].handle));
    EXPECT_FALSE(table->find_left(12));
    EXPECT_FALSE(table->remove(files[0].handle)) << "a RELEASE that comes again";
    EXPECT_EQ(table->count(), 0U);
}

TEST(OpenTable, AHandleOfBeforeIsNotTheSlotsNextFile) {
    const auto table = map(new_table());
    const uint64_t old = table->add(file(10, 100, 0)).value();
    EXPECT_TRUE(table->remove(old));
    const uint64_t next = table->add(file(12, 200, 0)).value();
    EXPECT_EQ(next % kMaxOpenFiles, old % kMaxOpenFiles) << "slots are used again";
    EXPECT_NE(next, old);
    EXPECT_FALSE(table->find(old));
    EXPECT_FALSE(table->remove(old));
    EXPECT_EQ(table->find(next)->node, 200U);
    EXPECT_FALSE(table->find(0));
    EXPECT_FALSE(table->find(~uint64_t{0}));
}

TEST(OpenTable, IsFullAtItsBound) {
    const UniqueFd memory = new_table();
    const auto table = map(memory);
    std::set<uint64_t> handles;
    for (uint64_t i = 0; i < kMaxOpenFiles; ++i) {
        handles.insert(table->add(file(2 * i, i, 0)).value());
    }
    EXPECT_EQ(handles.size(), kMaxOpenFiles);
    const auto more = table->add(file(1, 1, 0));
    ASSERT_FALSE(more);
    EXPECT_EQ(more.error().code(), ErrorCode::kLimitExceeded);
    EXPECT_EQ(map(memory)->files().size(), kMaxOpenFiles);
    EXPECT_TRUE(table->remove(*handles.begin()));
    EXPECT_TRUE(table->add(file(1, 1, 0)));
}

TEST(OpenTable, ManyThreadsNeverShareAHandle) {
    const auto table = map(new_table());
    std::atomic<unsigned> wrong = 0;
    std::vector<std::thread> threads;
    threads.reserve(4);
    for (uint64_t thread = 0; thread < 4; ++thread) {
        threads.emplace_back([&, thread] {
            for (uint64_t i = 0; i < 2000; ++i) {
                const uint64_t node = thread * 10'000 + i;
                const auto handle = table->add(file(node, node, 0));
                const auto found = table->find(*handle);
                wrong += !found || found->node != node;
                wrong += !table->remove(*handle);
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    EXPECT_EQ(wrong, 0U);
    EXPECT_EQ(table->count(), 0U);
}

TEST(OpenTable, TheFirstRequestIsKept) {
    const UniqueFd memory = new_table();
    const std::vector<std::byte> request(104, std::byte{7});
    EXPECT_TRUE(map(memory)->init_request().empty());
    EXPECT_TRUE(map(memory)->save_init(request));
    const auto table = map(memory);
    EXPECT_TRUE(std::ranges::equal(table->init_request(), request));
    EXPECT_FALSE(table->save_init(std::vector<std::byte>(8000)));
}

TEST(OpenTable, AnotherVersionIsRefused) {
    const UniqueFd memory = new_table();
    const uint32_t version = 99;
    ASSERT_EQ(pwrite(memory.get(), &version, sizeof version, 8), 4);
    const auto table = OpenTable::map(UniqueFd(dup(memory.get())));
    ASSERT_FALSE(table);
    EXPECT_EQ(table.error().code(), ErrorCode::kProtocol);
    EXPECT_NE(table.error().message().find("99"), std::string::npos) << table.error().message();
    ASSERT_EQ(ftruncate(memory.get(), 4096), 0);
    EXPECT_EQ(OpenTable::map(UniqueFd(dup(memory.get()))).error().code(), ErrorCode::kProtocol);
}

TEST(HolderProtocol, AnswersAreWhatWasSaid) {
    const HolderStatus status{.pid = 4711, .store = {1, 2, 3}, .directory = "/srv/disks"};
    const std::string packet = encode_answer(HolderResult::kBusy, status, "in use");
    const auto answer = decode_answer(bytes_of(std::string_view(packet)));
    ASSERT_TRUE(answer) << answer.error().message();
    EXPECT_EQ(answer->result, HolderResult::kBusy);
    EXPECT_EQ(answer->status.pid, 4711);
    EXPECT_EQ(answer->status.store, status.store);
    EXPECT_EQ(answer->status.directory, "/srv/disks");
    EXPECT_EQ(answer->message, "in use");
    for (size_t length = 0; length < packet.size(); ++length) {
        EXPECT_FALSE(decode_answer(bytes_of(std::string_view(packet).substr(0, length))));
    }
    EXPECT_FALSE(decode_answer(bytes_of(std::string_view(packet + "x"))));
    std::string other = packet;
    other[4] = 9;
    const auto refused = decode_answer(bytes_of(std::string_view(other)));
    ASSERT_FALSE(refused);
    EXPECT_NE(refused.error().message().find("versions (9 and"), std::string::npos);
}

TEST(HolderProtocol, RequestsOfAnotherVersionOrLengthAreRefused) {
    HolderRequest request;
    request.command = static_cast<uint32_t>(HolderCommand::kAdopt);
    EXPECT_TRUE(decode_request(bytes_of(request)));
    EXPECT_FALSE(decode_request(bytes_of(request).first(27)));
    request.version = 2;
    EXPECT_EQ(decode_request(bytes_of(request)).error().code(), ErrorCode::kProtocol);
    request.version = kHolderVersion;
    request.magic = 1;
    EXPECT_FALSE(decode_request(bytes_of(request)));
}

TEST(HolderProtocol, DescriptorsComeWithAPacket) {
    int ends[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    const UniqueFd left(ends[0]);
    UniqueFd right(ends[1]);
    const UniqueFd memory = new_table();
    const std::vector<int> given = {memory.get(), left.get()};
    ASSERT_TRUE(send_packet(left.get(), bytes_of(std::string_view("hello")), given));
    auto packet = receive_packet(right.get());
    ASSERT_TRUE(packet) << packet.error().message();
    EXPECT_EQ(packet->bytes, "hello");
    ASSERT_TRUE(packet->descriptors[0]);
    ASSERT_TRUE(packet->descriptors[1]);
    EXPECT_TRUE(OpenTable::map(std::move(packet->descriptors[0]))) << "it is the table";
    // A packet that is too long is no packet.
    ASSERT_TRUE(send_packet(left.get(), bytes_of(std::string_view(std::string(20'000, 'x'))), {}));
    EXPECT_EQ(receive_packet(right.get()).error().code(), ErrorCode::kProtocol);
    right.reset();
    EXPECT_FALSE(send_packet(left.get(), bytes_of(std::string_view("x")), {}));
}

TEST(HolderProtocol, NobodyIsAnErrorOfItsOwn) {
    const auto client = HolderClient::connect("/nonexistent/mount.sock");
    ASSERT_FALSE(client);
    EXPECT_EQ(client.error().code(), ErrorCode::kUnavailable);
    EXPECT_EQ(HolderClient::connect(std::string(200, 'x')).error().code(),
              ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace stellarium::fuse
