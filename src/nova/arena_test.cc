// The dirty arena across processes, boots, places and copies of the store.
#include "nova/arena.h"

#include <cerrno>
#include <cstring>
#include <string>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/units.h"
#include "nova/pool.h"
#include "nova/testing/test_pool.h"

namespace stellarium::nova {
namespace {

using namespace stellarium::nova::testing;  // NOLINT(google-build-using-namespace)

constexpr const char* kBootId = "/proc/sys/kernel/random/boot_id";

std::string arena_path(io::SimulatedMachine& machine) {
    const auto entries = must(machine.files().list(TestPool::kRuntime));
    EXPECT_EQ(entries.size(), 1U);
    return fmt::format("{}/{}", TestPool::kRuntime, entries.at(0).name);
}

/// Kills the process that has written `data` to the start of volume "vm" without flushing it.
void write_and_die(TestPool& pool, Bytes data) {
    auto device = must(pool->attach("vm", {}));
    must(write(*device, 0, data));
    pool.machine().kill_process();
    device.reset();
}

std::vector<std::byte> first_page(Pool& pool) {
    return read(*must(pool.attach("vm", {.read_only = true})), 0, 4096);
}

void copy_tree(io::SimulatedFileSystem& files, const std::string& from, const std::string& to) {
    if (!must(files.exists(to))) {
        must(files.make_directory(to));
    }
    for (const io::DirectoryEntry& entry : must(files.list(from))) {
        const std::string source = fmt::format("{}/{}", from, entry.name);
        const std::string target = fmt::format("{}/{}", to, entry.name);
        if (entry.is_directory) {
            copy_tree(files, source, target);
            continue;
        }
        const auto in = must(files.open(source, io::OpenMode::kReadOnly));
        const auto out = must(files.open(target, io::OpenMode::kCreate));
        std::vector<std::byte> bytes(must(in->size_bytes()));
        must(io::read_exact(*in, bytes, 0));
        must(io::write_all(*out, Bytes(bytes), 0));
    }
}

TEST(Arena, TheWholeFileIsAllocatedBeforeItHasItsName) {
    TestPool pool;
    must(pool->create_volume("vm", kMiB));
    pool.close();
    io::Fault full;
    full.kind = io::OperationKind::kAllocate;
    full.path_part = TestPool::kRuntime;
    full.errno_value = ENOSPC;
    pool.machine().files().inject(full);
    const auto refused = Pool::open(pool.machine().env(), TestPool::kDirectory, pool.options());
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code(), ErrorCode::kNoSpace);
    for (const char* part : {TestPool::kRuntime, "--memory", "--runtime-dir", "MiB"}) {
        EXPECT_NE(refused.error().message().find(part), std::string::npos)
            << part << ": " << refused.error().message();
    }
    EXPECT_TRUE(must(pool.machine().files().list(TestPool::kRuntime)).empty());
    pool.machine().kill_process();
    const uint64_t before = pool.machine().files().counts().of(io::OperationKind::kAllocate);
    pool.open();
    EXPECT_EQ(pool.machine().files().counts().of(io::OperationKind::kAllocate), before + 1);
}

TEST(Arena, AnExistingOneIsAllocatedBeforeItIsTouched) {
    TestPool pool;
    must(pool->create_volume("vm", kMiB));
    const auto data = random_bytes(4096, 1);
    write_and_die(pool, data);
    io::Fault full;
    full.kind = io::OperationKind::kAllocate;
    full.path_part = TestPool::kRuntime;
    full.errno_value = ENOSPC;
    pool.machine().files().inject(full);
    const auto refused = Pool::open(pool.machine().env(), TestPool::kDirectory, pool.options());
    EXPECT_EQ(code_of(refused), ErrorCode::kNoSpace);
    EXPECT_NE(refused.error().message().find("may hold acknowledged writes"), std::string::npos);
    // With room again, nothing is lost.
    pool.kill();
    EXPECT_EQ(first_page(*pool), data);
}

TEST(Arena, TheBootIsTheSameHoweverItsIdIsRead) {
    for (const bool is_short : {true, false}) {
        TestPool pool;
        must(pool->create_volume("vm", kMiB));
        const auto data = random_bytes(4096, 1);
        write_and_die(pool, data);
        io::Fault fault;
        fault.kind = io::OperationKind::kRead;
        fault.path_part = "boot_id";
        fault.errno_value = EINTR;
        fault.short_transfer = is_short;
        pool.machine().files().inject(fault);
        pool.open();
        EXPECT_EQ(pool.machine().files().faults_fired(), 1U);
        EXPECT_EQ(first_page(*pool), data) << "an acknowledged write was lost";
    }
}

TEST(Arena, ACopyOfTheStoreLeavesTheOriginalsAlone) {
    for (const std::string runtime : {"", TestPool::kRuntime}) {
        SCOPED_TRACE(runtime);
        TestPool pool;
        must(pool->create_volume("vm", kMiB));
        auto device = must(pool->attach("vm", {}));
        copy_tree(pool.machine().files(), TestPool::kDirectory, "/copy");
        const auto data = random_bytes(4096, 1);
        must(write(*device, 0, data));
        PoolOptions options = pool.options();
        options.runtime_directory = runtime;
        {
            const auto copy = must(Pool::open(pool.machine().env(), "/copy", options));
            ASSERT_EQ(copy->warnings().size(), 1U);
            EXPECT_NE(copy->warnings()[0].find("another copy of this store"), std::string::npos)
                << copy->warnings()[0];
            EXPECT_EQ(first_page(*copy), std::vector<std::byte>(4096));
            must(copy->create_volume("other", kMiB));
            must(copy->close());
        }
        pool.machine().kill_process();
        device.reset();
        pool.kill();
        EXPECT_TRUE(pool->warnings().empty()) << pool->warnings().front();
        EXPECT_EQ(first_page(*pool), data) << "an acknowledged write was lost";
    }
}

TEST(Arena, AFileInUseIsNotOpened) {
    TestPool pool;
    must(pool->create_volume("vm", kMiB));
    const auto data = random_bytes(4096, 1);
    write_and_die(pool, data);
    {
        const auto holder =
            must(pool.machine().files().open(arena_path(pool.machine()), io::OpenMode::kReadWrite));
        must(holder->lock());
        EXPECT_EQ(code_of(Pool::open(pool.machine().env(), TestPool::kDirectory, pool.options())),
                  ErrorCode::kBusy);
    }
    pool.kill();
    EXPECT_EQ(first_page(*pool), data);
    // It is locked for as long as it is used.
    const auto other =
        must(pool.machine().files().open(arena_path(pool.machine()), io::OpenMode::kReadWrite));
    EXPECT_EQ(code_of(other->lock()), ErrorCode::kBusy);
}

TEST(Arena, OneThatWasNotSeenDoesNotComeBackOverNewerData) {
    const auto old_data = random_bytes(4096, 1);
    const auto new_data = random_bytes(4096, 2);
    // The pool in between has no runtime directory, or one of the same name in another mount
    // namespace; and it may be killed.
    for (const bool has_runtime : {false, true}) {
        for (const bool killed : {false, true}) {
            SCOPED_TRACE(fmt::format("runtime {}, killed {}", has_runtime, killed));
            TestPool pool;
            must(pool->create_volume("vm", kMiB));
            write_and_die(pool, old_data);
            const std::string path = arena_path(pool.machine());
            must(pool.machine().files().rename(path, "/run/elsewhere"));
            if (!has_runtime) {
                pool.options().runtime_directory.clear();
            }
            pool.kill();
            EXPECT_EQ(pool->warnings().size(), 1U);
            auto device = must(pool->attach("vm", {}));
            must(write(*device, 0, new_data));
            must(flush(*device));
            if (killed) {
                pool.machine().kill_process();
            }
            device.reset();
            if (!killed) {
                pool.close();
            }
            must(pool.machine().files().rename("/run/elsewhere", path));
            pool.options().runtime_directory = TestPool::kRuntime;
            pool.open();
            EXPECT_EQ(first_page(*pool), new_data);
        }
    }
}

TEST(Arena, OnAFullDiskItIsFoundThoughTheLogDoesNotNameIt) {
    TestPool pool;
    must(pool->create_volume("vm", 2 * kMiB));
    pool.close();
    io::Fault full;
    full.kind = io::OperationKind::kWrite;
    full.path_part = ".seg";
    full.errno_value = ENOSPC;
    full.for_ever = true;
    pool.machine().files().inject(full);
    pool.open();
    const auto first = random_bytes(4096, 1);
    write_and_die(pool, first);
    pool.machine().files().inject(full);
    pool.open();
    EXPECT_EQ(first_page(*pool), first);
    // What has not been in the log yet goes with the first batch that fits.
    pool.machine().files().clear_faults();
    auto device = must(pool->attach("vm", {}));
    const auto second = random_bytes(4096, 2);
    must(flush(*device));
    must(write(*device, 0, second));
    pool.machine().kill_process();
    device.reset();
    pool.kill();
    EXPECT_TRUE(pool->warnings().empty()) << pool->warnings().front();
    EXPECT_EQ(first_page(*pool), second);
}

TEST(Arena, OfAnotherOrAnUnknownBootIsNotAdopted) {
    for (const bool known : {true, false}) {
        SCOPED_TRACE(known);
        // On a disk, where a file may outlive the boot.
        TestPool pool;
        pool.close();
        must(pool.machine().files().make_directory("/disk"));
        pool.options().runtime_directory = "/disk";
        if (!known) {
            must(pool.machine().files().remove(kBootId));
        }
        pool.open();
        must(pool->create_volume("vm", kMiB));
        write_and_die(pool, random_bytes(4096, 1));
        if (known) {
            const auto file = must(pool.machine().files().open(kBootId, io::OpenMode::kReadWrite));
            must(io::write_all(*file, bytes_of(std::string_view("another boot")), 0));
        }
        pool.kill();
        EXPECT_EQ(first_page(*pool), std::vector<std::byte>(4096));
        ASSERT_FALSE(pool->warnings().empty());
        EXPECT_NE(pool->warnings()[0].find("boot"), std::string::npos) << pool->warnings()[0];
    }
}

TEST(Arena, ABootIdThatCannotBeReadIsAnError) {
    TestPool pool;
    must(pool->create_volume("vm", kMiB));
    const auto data = random_bytes(4096, 1);
    write_and_die(pool, data);
    for (const auto kind : {io::OperationKind::kOpen, io::OperationKind::kRead}) {
        io::Fault fault;
        fault.kind = kind;
        fault.path_part = "boot_id";
        fault.errno_value = EMFILE;
        pool.machine().files().inject(fault);
        const auto refused = Pool::open(pool.machine().env(), TestPool::kDirectory, pool.options());
        ASSERT_FALSE(refused);
        EXPECT_NE(refused.error().message().find("boot_id"), std::string::npos)
            << refused.error().message();
    }
    pool.kill();
    EXPECT_EQ(first_page(*pool), data);
}

}  // namespace
}  // namespace stellarium::nova
