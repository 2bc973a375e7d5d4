// An image in memory, in C++: maps it where it lies in the store, so that all programs that map it
// share one copy, and prints a checksum of it.
//
//     c++ -std=c++17 -o map_image map_image.cc $(pkg-config --cflags --libs stellarium)
//     ./map_image STORE-DIRECTORY IMAGE
//
// Through a daemon the image must be shareable: stellarctl image set IMAGE --shareable yes
#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>

#include <stellarium.h>

namespace {

void check(int result, const std::string& what) {
    if (result != STELLARIUM_OK) {
        throw std::runtime_error(what + ": " + stellarium_last_error());
    }
}

struct CloseStore {
    void operator()(stellarium_store* store) const { stellarium_close(store); }
};
struct Unmap {
    void operator()(stellarium_mapping* mapping) const { stellarium_unmap(mapping); }
};
using Store = std::unique_ptr<stellarium_store, CloseStore>;
using Mapping = std::unique_ptr<stellarium_mapping, Unmap>;

Store open_store(const char* directory) {
    stellarium_store* store = nullptr;
    const int result = stellarium_open(directory, nullptr, &store);
    if (result == STELLARIUM_BUSY) {
        check(stellarium_connect(directory, nullptr, &store), "connect");
    } else {
        check(result, "open");
    }
    return Store(store);
}

Mapping map_image(const Store& store, const char* image) {
    stellarium_map_options options{};
    options.size = sizeof options;
    options.flags = STELLARIUM_MAP_POPULATE;
    stellarium_mapping* mapping = nullptr;
    check(stellarium_map(store.get(), image, &options, &mapping), "map");
    return Mapping(mapping);
}

/// FNV-1a.
std::uint64_t checksum(const unsigned char* bytes, std::uint64_t size) {
    std::uint64_t sum = 0xcbf29ce484222325;
    for (std::uint64_t i = 0; i < size; ++i) {
        sum = (sum ^ bytes[i]) * 0x100000001b3;
    }
    return sum;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: map_image STORE-DIRECTORY IMAGE\n");
        return 2;
    }
    try {
        const Store store = open_store(argv[1]);
        const Mapping mapping = map_image(store, argv[2]);
        stellarium_mapping_info info{};
        info.size = sizeof info;
        check(stellarium_mapping_get_info(mapping.get(), &info), "ask");
        const auto* const bytes =
            static_cast<const unsigned char*>(stellarium_mapping_address(mapping.get()));
        const std::uint64_t size = stellarium_mapping_size(mapping.get());
        std::printf("%016llx %llu bytes, %llu of them shared, %llu gathered\n",
                    static_cast<unsigned long long>(checksum(bytes, size)),
                    static_cast<unsigned long long>(size),
                    static_cast<unsigned long long>(info.mapped_bytes),
                    static_cast<unsigned long long>(info.gathered_bytes));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "map_image: %s\n", error.what());
        return 1;
    }
    return 0;
}
