// Plans and mappings of images in a real store, collections beside them, and images that are lent.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "io/io.h"
#include "nova/pool.h"
#include "nova/testing/test_pool.h"
#include "share/borrower.h"
#include "share/lender.h"
#include "share/mapping.h"
#include "share/plan.h"
#include "share/protocol.h"

namespace stellarium::share {
namespace {

using nova::testing::code_of;
using nova::testing::import_image;
using nova::testing::must;
using nova::testing::random_bytes;

constexpr size_t kPage = 4096;
constexpr size_t kMiB = size_t{1} << 20;

bool equal(const Mapping& mapping, Bytes content, size_t offset_bytes = 0) {
    return mapping.size_bytes() >= content.size() &&
           std::memcmp(mapping.data() + offset_bytes, content.data(), content.size()) == 0;
}

/// Lines of /proc/self/maps in this range.
size_t kernel_mappings(const Mapping& mapping) {
    const auto start = reinterpret_cast<uintptr_t>(mapping.data());
    std::ifstream maps("/proc/self/maps");
    size_t count = 0;
    for (std::string line; std::getline(maps, line);) {
        const uintptr_t at = std::stoull(line, nullptr, 16);
        count += at >= start && at < start + mapping.size_bytes() ? 1 : 0;
    }
    return count;
}

/// A store in a folder of its own.
class ShareTest : public testing::Test {
  protected:
    ShareTest() {
        std::string name =
            (std::filesystem::temp_directory_path() / "stellarium-share-XXXXXX").string();
        folder_ = mkdtemp(name.data());
        options_.background = false;
        options_.store.allow_unsafe_file_system = true;
        must(nova::Pool::create(io::real_env(), store(), options_));
        open();
    }
    ~ShareTest() override {
        pool_.reset();
        std::error_code ignored;
        std::filesystem::remove_all(folder_, ignored);
    }
    std::string store() const { return folder_ + "/store"; }
    std::string socket() const { return folder_ + "/map.sock"; }
    void open() { pool_ = must(nova::Pool::open(io::real_env(), store(), options_)); }

    Plan plan_of(const std::string& source, uint64_t offset_bytes = 0, uint64_t length_bytes = 0,
                 const PlanOptions& options = {}) {
        const auto reader = must(pool_->open_reader(source));
        return must(make_plan(*reader, offset_bytes, length_bytes, options));
    }
    Mapping map(const std::string& source) { return must(Mapping::make(plan_of(source), {})); }
    nova::GcReport collect() { return must(pool_->gc({})); }

    /// Every page of it lies apart from the next one: even pages were written first.
    std::vector<std::byte> make_scattered(const std::string& name, size_t pages) {
        std::vector<std::byte> content = random_bytes(pages * kPage, 9);
        must(pool_->create_volume(name, content.size()));
        const auto device = must(pool_->attach(name, {}));
        for (const size_t parity : {0U, 1U}) {
            for (size_t page = parity; page < pages; page += 2) {
                must(nova::testing::write(*device, page * kPage,
                                          Bytes(content).subspan(page * kPage, kPage)));
            }
            must(nova::testing::flush(*device));
        }
        return content;
    }

    /// An image whose pages are those of two others in turn: each ends in zeros, as a file's last
    /// one, and so is a chunk.
    std::vector<std::byte> make_scattered_image(const std::string& name, size_t pages) {
        std::vector<std::byte> content = random_bytes(pages * kPage, 9);
        std::array<std::vector<std::byte>, 2> halves;
        for (size_t page = 0; page < pages; ++page) {
            const MutableBytes bytes = MutableBytes(content).subspan(page * kPage, kPage);
            std::ranges::fill(bytes.last(64), std::byte{0});
            append_bytes(halves.at(page % 2), bytes);
        }
        import_image(*pool_, name + "-even", halves[0]);
        import_image(*pool_, name + "-odd", halves[1]);
        import_image(*pool_, name, content);
        return content;
    }

    /// Listens for a lender.
    int listen() {
        const int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        socket().copy(address.sun_path, sizeof address.sun_path - 1);
        EXPECT_EQ(bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
        EXPECT_EQ(::listen(fd, 16), 0);
        return fd;
    }
    std::unique_ptr<Lender> start_lender() {
        return must(Lender::start(*pool_, {.listen_fd = listen()}));
    }

    std::string folder_;
    nova::PoolOptions options_;
    std::unique_ptr<nova::Pool> pool_;
};

template <typename Condition>
bool eventually(Condition condition) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(120);
    while (!condition()) {
        if (std::chrono::steady_clock::now() > deadline) {
            return false;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return true;
}

// --- Plans and mappings --------------------------------------------------------------------------

TEST_F(ShareTest, AMappedImageReadsAsTheImageWhateverItsShape) {
    for (const size_t size : {size_t{512}, kPage, 3 * kMiB + 512, 5 * kMiB}) {
        std::vector<std::byte> content = random_bytes(size, size);
        if (size > 3 * kMiB) {
            std::ranges::fill(MutableBytes(content).subspan(kMiB, kMiB), std::byte{0});
        }
        const std::string name = "image-" + std::to_string(size);
        import_image(*pool_, name, content);
        const Plan plan = plan_of(name);
        EXPECT_EQ(plan.gathered_bytes, 0U) << "few runs are all mapped where they are";
        EXPECT_TRUE(check_plan(plan));
        const Mapping mapping = must(Mapping::make(plan, {.populate = size == kPage}));
        EXPECT_EQ(mapping.size_bytes(), (size + kPage - 1) / kPage * kPage);
        EXPECT_TRUE(equal(mapping, content));
        EXPECT_TRUE(all_zero(Bytes(mapping.data() + size, mapping.size_bytes() - size)));
        EXPECT_LE(kernel_mappings(mapping), plan.mappings());
    }
}

TEST_F(ShareTest, AnImageThatIsAllHolesIsMappedWithoutAFile) {
    import_image(*pool_, "empty", std::vector<std::byte>(kMiB));
    const Plan plan = plan_of("empty");
    EXPECT_TRUE(plan.pieces.empty());
    EXPECT_TRUE(plan.files.empty());
    EXPECT_TRUE(equal(must(Mapping::make(plan, {})), std::vector<std::byte>(kMiB)));
}

TEST_F(ShareTest, APartOfAnImageIsMapped) {
    const std::vector<std::byte> content = random_bytes(3 * kMiB + 512, 1);
    import_image(*pool_, "image", content);
    const Mapping middle = must(Mapping::make(plan_of("image", kMiB, 5 * kPage), {}));
    EXPECT_TRUE(equal(middle, Bytes(content).subspan(kMiB, 5 * kPage)));
    const Mapping end = must(Mapping::make(plan_of("image", 3 * kMiB, 512), {}));
    EXPECT_TRUE(equal(end, Bytes(content).subspan(3 * kMiB)));
    const auto reader = must(pool_->open_reader("image"));
    for (const auto& [offset, length] : std::vector<std::pair<uint64_t, uint64_t>>{
             {512, kPage}, {0, 512}, {4 * kMiB, 0}, {0, 4 * kMiB}, {kMiB, ~uint64_t{0} - 4095}}) {
        EXPECT_EQ(code_of(make_plan(*reader, offset, length, {})), ErrorCode::kInvalidArgument)
            << offset << " " << length;
    }
    EXPECT_EQ(code_of(make_plan(*reader, 0, 0, {.max_files = 0})), ErrorCode::kLimitExceeded);
}

TEST_F(ShareTest, WhatLiesScatteredIsGatheredAndTheMappingsStayBounded) {
    constexpr size_t kPages = 700;
    const std::vector<std::byte> content = make_scattered("scattered", kPages);
    const Plan all = plan_of("scattered", 0, 0, {.max_mappings = 2 * kPages + 1});
    EXPECT_EQ(all.gathered_bytes, 0U);
    EXPECT_GT(all.pieces.size(), kPages / 2) << "the pages do lie apart";
    for (const size_t most : {size_t{16}, size_t{50}, size_t{400}}) {
        const Plan plan = plan_of("scattered", 0, 0, {.max_mappings = most});
        EXPECT_LE(plan.mappings(), most);
        EXPECT_GT(plan.gathered_bytes, 0U);
        const Mapping mapping = must(Mapping::make(plan, {}));
        EXPECT_LE(kernel_mappings(mapping), most);
        EXPECT_TRUE(equal(mapping, content)) << most;
    }
    const auto reader = must(pool_->open_reader("scattered"));
    EXPECT_EQ(code_of(make_plan(*reader, 0, 0, {.max_mappings = 16, .max_gathered_bytes = kMiB})),
              ErrorCode::kLimitExceeded);
    EXPECT_EQ(code_of(make_plan(*reader, 0, 0, {.max_mappings = 3})), ErrorCode::kInvalidArgument);
}

TEST_F(ShareTest, ARangeGoesWhereTheCallerWantsIt) {
    const std::vector<std::byte> content = random_bytes(kMiB, 4);
    import_image(*pool_, "image", content);
    import_image(*pool_, "holes", std::vector<std::byte>(4 * kMiB));
    std::optional<Mapping> room = map("holes");
    std::byte* const at = const_cast<std::byte*>(room->data()) + kMiB;
    const Mapping mapping = must(Mapping::make(plan_of("image"), {.address = at}));
    EXPECT_EQ(mapping.data(), at);
    EXPECT_TRUE(equal(mapping, content));
    EXPECT_TRUE(all_zero(Bytes(room->data(), kMiB)));
}

TEST_F(ShareTest, APlanThatDoesNotFitItsFilesIsRefused) {
    import_image(*pool_, "image", random_bytes(kMiB, 5));
    const auto spoiled = [&](const std::function<void(Piece&)>& spoil) {
        Plan plan = plan_of("image");
        spoil(plan.pieces.at(0));
        return code_of(check_plan(plan));
    };
    EXPECT_EQ(spoiled([](Piece& piece) { piece.file = 1; }), ErrorCode::kProtocol);
    EXPECT_EQ(spoiled([](Piece& piece) { piece.length_bytes += kPage; }), ErrorCode::kProtocol);
    EXPECT_EQ(spoiled([](Piece& piece) { piece.length_bytes = 0; }), ErrorCode::kProtocol);
    EXPECT_EQ(spoiled([](Piece& piece) { piece.offset_bytes = 512; }), ErrorCode::kProtocol);
    EXPECT_EQ(spoiled([](Piece& piece) { piece.offset_bytes = ~uint64_t{0} - 4095; }),
              ErrorCode::kProtocol);
    EXPECT_EQ(spoiled([](Piece& piece) { piece.file_offset_bytes = uint64_t{1} << 40; }),
              ErrorCode::kProtocol);
}

// --- Leases and collections ----------------------------------------------------------------------

TEST_F(ShareTest, ACollectionPunchesNothingThatIsMapped) {
    const std::vector<std::byte> content = random_bytes(4 * kMiB, 1);
    import_image(*pool_, "mapped", content);
    import_image(*pool_, "kept", random_bytes(12 * kMiB, 2));  // In the same segment.
    std::optional<Mapping> mapping = map("mapped");
    must(pool_->remove({"mapped"}));
    EXPECT_EQ(collect().freed_bytes, 0U);
    EXPECT_TRUE(equal(*mapping, content));
    // Nor does the next process that has the store.
    pool_.reset();
    open();
    EXPECT_TRUE(equal(*mapping, content));
    EXPECT_EQ(collect().freed_bytes, 0U);
    EXPECT_TRUE(equal(*mapping, content));
    mapping.reset();
    EXPECT_GE(collect().freed_bytes, content.size());
    pool_.reset();
    open();
    EXPECT_EQ(nova::testing::export_all(*pool_, "kept"), random_bytes(12 * kMiB, 2));
}

TEST_F(ShareTest, ACollectionMovesAndUnlinksNothingThatIsMapped) {
    const std::vector<std::byte> content = random_bytes(2 * kMiB, 1);
    import_image(*pool_, "mapped", content);
    import_image(*pool_, "large", random_bytes(60 * kMiB, 2));
    import_image(*pool_, "last", random_bytes(6 * kMiB, 3));  // The segment before is closed.
    std::optional<Mapping> mapping = map("mapped");
    must(pool_->remove({"large"}));
    nova::GcReport report = collect();
    EXPECT_EQ(report.moved_bytes, 0U);
    EXPECT_EQ(report.segments_freed, 0U);
    EXPECT_TRUE(equal(*mapping, content));
    mapping.reset();
    report = collect();
    EXPECT_GE(report.moved_bytes, content.size()) << "what is left of the segment";
    EXPECT_GE(report.segments_freed, 1U);
    EXPECT_TRUE(equal(map("mapped"), content)) << "where it lies now";
    EXPECT_EQ(nova::testing::export_all(*pool_, "last"), random_bytes(6 * kMiB, 3));
}

TEST_F(ShareTest, WhatIsDamagedIsNotMapped) {
    import_image(*pool_, "image", random_bytes(2 * kMiB, 1));
    must(pool_->close());
    pool_.reset();
    {
        std::fstream file(store() + "/segments/0000001.seg",
                          std::ios::in | std::ios::out | std::ios::binary);
        file.seekp(static_cast<std::streamoff>(kMiB) + 77);
        file.put('\x55');
    }
    open();
    const auto reader = must(pool_->open_reader("image"));
    EXPECT_EQ(code_of(make_plan(*reader, 0, 0, {})), ErrorCode::kCorrupt);
}

// --- Lending -------------------------------------------------------------------------------------

TEST_F(ShareTest, OnlyShareableImagesAreLent) {
    import_image(*pool_, "image", random_bytes(kMiB, 1));
    must(pool_->create_volume("volume", kMiB));
    const auto lender = start_lender();
    const auto borrower = must(Borrower::connect(socket()));
    const auto borrow = [&](const char* source) { return borrower->borrow(source, 0, 0, 4096); };
    EXPECT_EQ(code_of(borrow("image")), ErrorCode::kPermissionDenied);
    EXPECT_EQ(code_of(borrow("volume")), ErrorCode::kPermissionDenied);
    EXPECT_EQ(code_of(borrow("nothing")), ErrorCode::kNotFound);
    EXPECT_EQ(code_of(pool_->set_shareable("volume", true)), ErrorCode::kInvalidArgument);
    EXPECT_TRUE(must(pool_->set_shareable("image", true)).shareable);
    EXPECT_TRUE(borrow("image"));
    must(pool_->set_shareable("image", false));
    EXPECT_EQ(code_of(borrow("image")), ErrorCode::kPermissionDenied);
}

TEST_F(ShareTest, ThatAnImageIsShareableOutlivesTheProcessAndGoesWithIt) {
    import_image(*pool_, "image", random_bytes(kMiB, 1));
    must(pool_->set_shareable("image", true));
    pool_.reset();  // From the log.
    open();
    EXPECT_TRUE(must(pool_->find("image")).shareable);
    must(pool_->close());  // From the catalog.
    pool_.reset();
    open();
    EXPECT_TRUE(must(pool_->find("image")).shareable);
    must(pool_->clone("image", {"clone"}));
    EXPECT_FALSE(must(pool_->find("clone")).shareable);
    must(pool_->remove({"image"}));
    must(pool_->close());
    pool_.reset();
    open();
    import_image(*pool_, "image", random_bytes(kMiB, 1));
    EXPECT_FALSE(must(pool_->find("image")).shareable);
}

TEST_F(ShareTest, AllWhoBorrowTheSameHaveTheSamePages) {
    const std::vector<std::byte> content = make_scattered_image("image", 200);
    must(pool_->set_shareable("image", true));
    auto lender = start_lender();
    const auto first = must(Borrower::connect(socket()));
    const auto second = must(Borrower::connect(socket()));
    std::optional<Borrowed> one = must(first->borrow("image", 0, 0, 20));
    const Borrowed two = must(second->borrow("image", 0, 0, 20));
    EXPECT_GT(one->plan.gathered_bytes, 0U);
    EXPECT_EQ(one->plan.pieces, two.plan.pieces);
    ASSERT_EQ(one->plan.files.size(), two.plan.files.size());
    for (size_t i = 0; i < two.plan.files.size(); ++i) {
        struct stat a{};
        struct stat b{};
        ASSERT_EQ(fstat(one->plan.files[i].get(), &a), 0);
        ASSERT_EQ(fstat(two.plan.files[i].get(), &b), 0);
        EXPECT_EQ(a.st_ino, b.st_ino) << "also the memory file";
    }
    const Mapping mapping = must(Mapping::make(two.plan, {}));
    EXPECT_TRUE(equal(mapping, content));
    EXPECT_EQ(pwrite(two.plan.files.back().get(), "x", 1, 0), -1) << "nobody changes it";
    EXPECT_EQ(pwrite(two.plan.files.front().get(), "x", 1, 0), -1);
    EXPECT_EQ(lender->status().leases, 2U);
    EXPECT_EQ(lender->status().files, two.plan.files.size());

    must(first->give_back(one->lease));
    EXPECT_EQ(code_of(first->give_back(one->lease)), ErrorCode::kNotFound);
    EXPECT_EQ(lender->status().leases, 1U);
    lender.reset();
    EXPECT_TRUE(equal(mapping, content)) << "what is mapped stays";
    EXPECT_EQ(code_of(first->borrow("image", 0, 0, 20)), ErrorCode::kUnavailable);
    EXPECT_TRUE(second->give_back(two.lease)) << "forgotten already";
}

TEST_F(ShareTest, ALeaseEndsWithItsMappingsAndTheDaemonForgetsWhoHasGone) {
    const std::vector<std::byte> content = random_bytes(4 * kMiB, 1);
    import_image(*pool_, "image", content);
    import_image(*pool_, "kept", random_bytes(12 * kMiB, 2));
    must(pool_->set_shareable("image", true));
    const auto lender = start_lender();
    auto borrower = must(Borrower::connect(socket()));
    std::optional<Mapping> mapping;
    mapping.emplace(must(Mapping::make(must(borrower->borrow("image", 0, 0, 4096)).plan, {})));
    must(pool_->remove({"image"}));
    borrower.reset();
    ASSERT_TRUE(eventually([&] { return lender->status().files == 0; }));
    EXPECT_EQ(collect().freed_bytes, 0U) << "it is mapped";
    EXPECT_TRUE(equal(*mapping, content));
    mapping.reset();
    EXPECT_GE(collect().freed_bytes, content.size());
}

TEST_F(ShareTest, WhoSendsNonsenseIsHungUpOnAndNobodyElse) {
    import_image(*pool_, "image", random_bytes(kMiB, 1));
    must(pool_->set_shareable("image", true));
    const auto lender = start_lender();
    const auto honest = must(Borrower::connect(socket()));
    const auto send_raw = [&](Bytes bytes) {
        UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        socket().copy(address.sun_path, sizeof address.sun_path - 1);
        EXPECT_EQ(::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address),
                  0);
        must(set_timeouts(fd.get(), 120, 120));
        must(send_all(fd.get(), bytes));
        std::array<std::byte, 1> answer{};
        return code_of(receive_all(fd.get(), answer));
    };
    EXPECT_EQ(send_raw(random_bytes(sizeof(BorrowRequest), 7)), ErrorCode::kUnavailable);
    BorrowRequest request{};
    request.magic = kBorrowMagic;
    request.version = kBorrowVersion;
    request.kind = 99;
    EXPECT_EQ(send_raw(bytes_of(request)), ErrorCode::kUnavailable);
    request.source_bytes = kMaxSourceBytes + 1;
    EXPECT_EQ(send_raw(bytes_of(request)), ErrorCode::kUnavailable);
    EXPECT_TRUE(honest->borrow("image", 0, 0, 4096));
    EXPECT_EQ(code_of(honest->borrow("image", 512, 0, 4096)), ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace stellarium::share
