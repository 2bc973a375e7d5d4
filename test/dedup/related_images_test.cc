// Two related Debian images in one store, against the bounds that fixed 4 KiB dedup sets.
//
// STELLARIUM_IMAGE_A and STELLARIUM_IMAGE_B name two raw images of the same release, the second
// rebuilt with a few more packages; the build of the tests makes them and sets the variables. The
// bounds are computed here from the images themselves, with nothing of the engine but its hash.

#include <cstdlib>
#include <filesystem>
#include <unordered_set>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/hash.h"
#include "io/io.h"
#include "nova/pool.h"

namespace stellarium {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kBufferBytes = uint64_t{8} << 20;
using PageSet = std::unordered_set<Hash256, Hash256Hasher>;

/// Calls `visit(offset, bytes)` for the data of a file, buffer by buffer, and returns its size.
template <typename Visit>
uint64_t for_each_buffer(const std::string& path, Visit visit) {
    auto file = io::real_env().files->open(path, io::OpenMode::kReadOnly);
    EXPECT_TRUE(file) << (file ? "" : file.error().message());
    const uint64_t size = (*file)->size_bytes().value();
    std::vector<std::byte> buffer(kBufferBytes);
    for (uint64_t offset = 0; offset < size; offset += kBufferBytes) {
        const auto part = MutableBytes(buffer).first(std::min(kBufferBytes, size - offset));
        EXPECT_TRUE(io::read_exact(**file, part, offset));
        visit(offset, Bytes(part));
    }
    return size;
}

/// Adds the non-zero 4 KiB pages of an image; returns how many there are, repeats counted.
uint64_t add_pages(const std::string& path, PageSet& pages) {
    uint64_t count = 0;
    for_each_buffer(path, [&](uint64_t /*offset*/, Bytes bytes) {
        std::vector<Bytes> inputs;
        for (; !bytes.empty(); bytes = bytes.subspan(std::min<size_t>(kPage, bytes.size()))) {
            const Bytes page = bytes.first(std::min<size_t>(kPage, bytes.size()));
            if (!all_zero(page)) {
                inputs.push_back(page);
            }
        }
        std::vector<Hash256> ids(inputs.size());
        hash_many(inputs, ids);
        pages.insert(ids.begin(), ids.end());
        count += inputs.size();
    });
    return count;
}

void import(nova::Pool& pool, const std::string& name, const std::string& path) {
    auto import = pool.begin_import(name);
    ASSERT_TRUE(import) << import.error().message();
    const uint64_t size = for_each_buffer(
        path, [&](uint64_t offset, Bytes bytes) { ASSERT_TRUE((*import)->append(offset, bytes)); });
    const auto info = (*import)->finish(size);
    ASSERT_TRUE(info) << info.error().message();
    EXPECT_EQ(info->size_bytes, size);
}

void expect_equal_to_file(nova::Pool& pool, const std::string& name, const std::string& path) {
    auto reader = pool.open_reader(name);
    ASSERT_TRUE(reader);
    std::vector<std::byte> got(kBufferBytes);
    const uint64_t size = for_each_buffer(path, [&](uint64_t offset, Bytes want) {
        const auto part = MutableBytes(got).first(want.size());
        ASSERT_TRUE((*reader)->read(offset, part));
        ASSERT_TRUE(std::ranges::equal(part, want)) << name << " near " << offset;
    });
    EXPECT_EQ((*reader)->size_bytes(), size);
}

/// Bytes that the files of a directory take on disk.
uint64_t disk_usage(const std::filesystem::path& directory) {
    uint64_t bytes = 0;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(directory)) {
        struct stat status{};
        EXPECT_EQ(stat(entry.path().c_str(), &status), 0);
        bytes += static_cast<uint64_t>(status.st_blocks) * 512;
    }
    return bytes;
}

TEST(RelatedImages, CostCloseToFixedPageDedupWithFarFewerIndexEntries) {
    const char* const image_a = std::getenv("STELLARIUM_IMAGE_A");
    const char* const image_b = std::getenv("STELLARIUM_IMAGE_B");
    ASSERT_TRUE(image_a != nullptr && image_b != nullptr)
        << "set STELLARIUM_IMAGE_A and STELLARIUM_IMAGE_B to two related raw images";

    PageSet pages;
    add_pages(image_a, pages);
    const uint64_t bare_a = pages.size() * kPage;
    const uint64_t image_b_bytes = add_pages(image_b, pages) * kPage;
    const uint64_t bare_both = pages.size() * kPage;
    ASSERT_GT(bare_both, bare_a) << "the second image adds nothing: not a rebuilt one";

    const auto directory =
        std::filesystem::temp_directory_path() / fmt::format("stellarium-dedup-{}", getpid());
    std::filesystem::remove_all(directory);
    const nova::PoolOptions options;
    ASSERT_TRUE(nova::Pool::create(io::real_env(), directory, options));
    auto pool = nova::Pool::open(io::real_env(), directory, options);
    ASSERT_TRUE(pool) << pool.error().message();
    import(**pool, "a", image_a);
    const uint64_t unique_a = (*pool)->stats().store.unique_bytes;
    import(**pool, "b", image_b);
    const nebula::StoreStats stats = (*pool)->stats().store;
    const uint64_t added_b = stats.unique_bytes - unique_a;

    EXPECT_LE(static_cast<double>(added_b), 1.2 * static_cast<double>(bare_both - bare_a) +
                                                0.01 * static_cast<double>(image_b_bytes));
    EXPECT_LE(static_cast<double>(stats.chunks), 0.40 * static_cast<double>(pages.size()));
    expect_equal_to_file(**pool, "a", image_a);
    expect_equal_to_file(**pool, "b", image_b);
    ASSERT_TRUE((*pool)->close());
    // Everything on disk counts: headers, tree nodes, footers, index, catalog.
    const uint64_t disk = disk_usage(directory);
    EXPECT_LE(static_cast<double>(disk), 1.08 * static_cast<double>(bare_both));
    RecordProperty("fixed_4k_bytes", static_cast<int>(bare_both >> 10));
    if (std::getenv("STELLARIUM_REPORT") != nullptr) {
        fmt::print(
            "fixed 4 KiB: first {} KiB, both {} KiB, {} entries\n"
            "stellarium:  second added {} KiB ({:.3f} of fixed), on disk {} KiB ({:.3f} of fixed), "
            "{} entries ({:.3f} of fixed)\n",
            bare_a >> 10, bare_both >> 10, pages.size(), added_b >> 10,
            static_cast<double>(added_b) / static_cast<double>(bare_both - bare_a), disk >> 10,
            static_cast<double>(disk) / static_cast<double>(bare_both), stats.chunks,
            static_cast<double>(stats.chunks) / static_cast<double>(pages.size()));
    }
    std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace stellarium
