// Runs a fuzz target without libFuzzer: every kept input, the target's own seeds, and a number of
// seeded mutations of both.
//
//     TARGET_fuzz_replay CORPUS RUNS            what ctest runs
//     TARGET_fuzz_replay CORPUS RUNS FILE...    these inputs alone
//     TARGET_fuzz_replay --write-seeds FOLDER   the target's seeds as files, to begin a corpus with
//
// When an input fails it is written to fuzz-failure-TARGET in the working directory, and the seed
// that repeats it is printed.
#include <csignal>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>

#include <fcntl.h>
#include <unistd.h>

#include "base/hash.h"
#include "base/test_scale.h"
#include "test/fuzz/fuzz.h"

extern "C" [[gnu::weak]] void __sanitizer_set_death_callback(void (*callback)());

namespace stellarium::fuzz {
namespace {

constexpr size_t kMaxInputBytes = 64 << 10;

// What runs now, for the report of a failure, which must not allocate.
const std::byte* running_data = nullptr;
size_t running_bytes = 0;
char running_name[512];  // NOLINT(modernize-avoid-c-arrays)
char failure_path[512];  // NOLINT(modernize-avoid-c-arrays)

void say(const char* text) {
    [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, text, std::strlen(text));
}

void report() {
    say("\nfuzz target failed with ");
    say(running_name);
    const int fd = ::open(failure_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd >= 0 &&
        ::write(fd, running_data, running_bytes) == static_cast<ssize_t>(running_bytes)) {
        say("; the input is in ");
        say(failure_path);
    }
    say("\n");
}

void on_signal(int signal) {
    report();
    std::signal(signal, SIG_DFL);  // NOLINT(bugprone-signal-handler): it ends here.
    std::raise(signal);            // NOLINT(bugprone-signal-handler)
}

void run(const Input& input, const std::string& name) {
    std::snprintf(running_name, sizeof(running_name), "%s", name.c_str());
    running_data = input.data();
    running_bytes = input.size();
    // A copy of exactly its length, so that a sanitizer sees the first byte read behind it.
    const auto copy =
        std::make_unique<uint8_t[]>(input.size());  // NOLINT(modernize-avoid-c-arrays)
    if (!input.empty()) {
        std::memcpy(copy.get(), input.data(), input.size());
    }
    if (LLVMFuzzerTestOneInput(copy.get(), input.size()) != 0) {
        std::fprintf(stderr, "%s: the target does not return 0\n", name.c_str());
        std::abort();
    }
}

Input read_file(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    const Bytes bytes = bytes_of(std::string_view(text));
    return {bytes.begin(), bytes.end()};
}

/// One input made of others.
class Mutator {
  public:
    Mutator(const std::vector<Input>& inputs, uint64_t seed) : inputs_(inputs), random_(seed) {}

    Input make() {
        Input input = inputs_[below(inputs_.size())];
        for (uint64_t steps = uint64_t{1} << below(5); steps > 0; --steps) {
            change(input);
        }
        input.resize(std::min(input.size(), kMaxInputBytes));
        return input;
    }

  private:
    uint64_t below(uint64_t limit) { return random_() % limit; }
    auto place(Input& input, size_t offset) {
        return input.begin() + static_cast<std::ptrdiff_t>(offset);
    }

    void change(Input& input) {
        if (input.empty()) {
            input.push_back(static_cast<std::byte>(random_()));
            return;
        }
        const size_t at = below(input.size());
        const size_t length = 1 + below(std::min<size_t>(input.size() - at, 64));
        switch (below(9)) {
            case 0:
                input[at] ^= static_cast<std::byte>(1U << below(8));
                break;
            case 1:
                input[at] = static_cast<std::byte>(random_());
                break;
            case 2:
                overwrite(input, at);
                break;
            case 3:
                input.erase(place(input, at), place(input, at + length));
                break;
            case 4: {
                Input fresh(1 + below(16));
                const auto fill = static_cast<std::byte>(below(3) == 0 ? random_() : 0);
                std::ranges::fill(fresh, fill);
                input.insert(place(input, at), fresh.begin(), fresh.end());
                break;
            }
            case 5: {
                const Input part(place(input, at), place(input, at + length));
                input.insert(place(input, below(input.size() + 1)), part.begin(), part.end());
                break;
            }
            case 6: {
                const Input part(place(input, at), place(input, at + length));
                const size_t to = below(input.size() - part.size() + 1);
                std::ranges::copy(part, place(input, to));
                break;
            }
            case 7: {
                const Input& other = inputs_[below(inputs_.size())];
                if (!other.empty()) {
                    const size_t from = below(other.size());
                    input.resize(at);
                    input.insert(input.end(), other.begin() + static_cast<std::ptrdiff_t>(from),
                                 other.end());
                }
                break;
            }
            default:
                input.resize(at);
        }
    }

    /// A number at the edge of something.
    void overwrite(Input& input, size_t at) {
        const size_t width = std::min<size_t>(size_t{1} << below(4), input.size() - at);
        uint64_t value = 0;
        switch (below(4)) {
            case 0:
                value = uint64_t{1} << below(64);
                break;
            case 1:
                value = (uint64_t{1} << below(64)) - 1;
                break;
            case 2:
                value = ~below(16);
                break;
            default:
                std::memcpy(&value, input.data() + at, width);
                value += below(32) - 16;
        }
        std::memcpy(input.data() + at, &value, width);
    }

    const std::vector<Input>& inputs_;
    std::mt19937_64 random_;
};

std::vector<Input> seeds() {
    std::vector<Input> out;
    if (add_seeds != nullptr) {
        add_seeds(out);
    }
    return out;
}

int write_seeds(const std::filesystem::path& folder) {
    std::filesystem::create_directories(folder);
    for (const Input& seed : seeds()) {
        std::ofstream file(folder / ("seed-" + hash(seed).hex().substr(0, 16)), std::ios::binary);
        file.write(reinterpret_cast<const char*>(seed.data()),
                   static_cast<std::streamsize>(seed.size()));
    }
    return 0;
}

int replay(const std::string& target, const std::filesystem::path& corpus, uint64_t runs,
           const std::vector<std::string>& only) {
    std::snprintf(failure_path, sizeof(failure_path), "fuzz-failure-%s", target.c_str());
    std::signal(SIGABRT, on_signal);
    if (__sanitizer_set_death_callback != nullptr) {
        __sanitizer_set_death_callback(report);  // It catches the other signals by itself.
    } else {
        for (const int signal : {SIGSEGV, SIGILL, SIGTRAP, SIGFPE, SIGBUS}) {
            std::signal(signal, on_signal);
        }
    }
    for (const std::string& path : only) {
        run(read_file(path), path);
    }
    if (!only.empty()) {
        return 0;
    }

    std::vector<Input> inputs = seeds();
    for (size_t i = 0; i < inputs.size(); ++i) {
        run(inputs[i], "the target's seed " + std::to_string(i));
    }
    std::vector<std::filesystem::path> files;
    for (const auto& entry : std::filesystem::directory_iterator(corpus)) {
        files.push_back(entry.path());
    }
    std::ranges::sort(files);
    if (files.empty()) {
        std::fprintf(stderr, "%s holds no inputs\n", corpus.c_str());
        return 1;
    }
    run({}, "an empty input");
    for (const auto& file : files) {
        inputs.push_back(read_file(file));
        run(inputs.back(), file.string());
    }
    // One seed makes one input, so a failure is repeated without those before it.
    const uint64_t first = first_seed();
    for (uint64_t seed = first; seed < first + scaled(runs, runs / 10); ++seed) {
        run(Mutator(inputs, seed).make(),
            "STELLARIUM_TEST_SEED=" + std::to_string(seed) + " (the first mutation)");
    }
    return 0;
}

}  // namespace
}  // namespace stellarium::fuzz

int main(int argc, char** argv) {
    const std::vector<std::string> words(argv + 1, argv + argc);
    if (words.size() == 2 && words[0] == "--write-seeds") {
        return stellarium::fuzz::write_seeds(words[1]);
    }
    if (words.size() < 2) {
        std::fprintf(stderr, "usage: %s CORPUS RUNS [FILE...] | --write-seeds FOLDER\n", argv[0]);
        return 2;
    }
    const std::string target = std::filesystem::path(argv[0]).filename().string();
    return stellarium::fuzz::replay(target, words[0], std::strtoull(words[1].c_str(), nullptr, 10),
                                    {words.begin() + 2, words.end()});
}
