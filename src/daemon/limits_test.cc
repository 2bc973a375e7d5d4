// The limits page against the code, and what is done where the system gives less than is needed.
#include "daemon/limits.h"

#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <string>

#include <gtest/gtest.h>
#include <sys/resource.h>

#include "base/rate_limits.h"
#include "base/units.h"
#include "boot/limits.h"
#include "control/service.h"
#include "frontend/fuse/limits.h"
#include "frontend/nbd/limits.h"
#include "frontend/vhost/limits.h"
#include "nebula/segment.h"
#include "nova/limits.h"
#include "share/limits.h"

namespace stellarium::daemon {
namespace {

std::map<std::string, std::string> limits_of_the_code() {
    // All of them are whole numbers of a unit.
    const auto bytes = [](uint64_t value) {
        return std::regex_replace(format_size(value), std::regex("\\.0+ "), " ");
    };
    const auto count = [](uint64_t value) { return std::to_string(value); };
    return {
        {"kMinMemoryBytes", bytes(kMinMemoryBytes)},
        {"kMaxMemoryBytes", bytes(kMaxMemoryBytes)},
        {"kDefaultMemoryBytes", bytes(kDefaultMemoryBytes)},
        {"kMinHeldBytes", bytes(kMinHeldBytes)},
        {"kMaxHeldBytes", bytes(kMaxHeldBytes)},
        {"kMaxJsonBytes", bytes(control::kMaxJsonBytes)},
        {"kUsualJsonBytes", bytes(control::kUsualJsonBytes)},
        {"kMaxJsonValues", count(control::kMaxJsonValues)},
        {"kLongRequestBytes", bytes(kLongRequestBytes)},
        {"kMaxHeaderBytes", bytes(kMaxHeaderBytes)},
        {"kMaxDiffRanges", count(control::kMaxDiffRanges)},
        {"kMaxConnections", count(kMaxConnections)},
        {"kMaxTcpConnections", count(kMaxTcpConnections)},
        {"kConnectionBytes", bytes(kConnectionBytes)},
        {"kMaxStreams", count(kMaxStreams)},
        {"kMaxStreamsPerUser", count(kMaxStreamsPerUser)},
        {"kStreamBytes", bytes(kStreamBytes)},
        {"kHttpWorkers", count(kHttpWorkers)},
        {"kCommitBytes", bytes(nova::kCommitBytes)},
        {"kMaxRunsPerBatch", count(nova::kMaxRunsPerBatch)},
        {"kMaxRecordings", count(boot::kMaxRecordings)},
        {"kRecordingBytes", bytes(boot::kRecordingBytes)},
        {"kMaxTraces", count(boot::kMaxTraces)},
        {"kMaxTraceRuns", count(boot::kMaxTraceRuns)},
        {"kMaxTracePages", count(boot::kMaxTracePages)},
        {"kMergeBytes", bytes(boot::kMergeBytes)},
        {"kStageReadBytes", bytes(boot::kStageReadBytes)},
        {"kMaxWaitingPrefetches", count(boot::kMaxWaitingPrefetches)},
        {"kMaxBootManifestBytes", bytes(nova::kMaxBootManifestBytes)},
        {"kMaxBootManifests", count(nova::kMaxBootManifests)},
        {"kCommitMemoryBytes", bytes(kCommitMemoryBytes)},
        {"kProgramBytes", bytes(kProgramBytes)},
        {"kFileWorkers", count(fuse::kFileWorkers)},
        {"kMaxWaitingOfFile", count(fuse::kMaxWaitingOfFile)},
        {"kMaxWaitingOfFiles", count(fuse::kMaxWaitingOfFiles)},
        {"kMaxKeptBytes", bytes(fuse::kMaxKeptBytes)},
        {"kMaxOpenNames", count(fuse::kMaxOpenNames)},
        {"kMaxFileTransferBytes", bytes(fuse::kMaxFileTransferBytes)},
        {"kMaxBackgroundRequests", count(fuse::kMaxBackgroundRequests)},
        {"kMaxOpenFiles", count(fuse::kMaxOpenFiles)},
        {"kMaxListings", count(fuse::kMaxListings)},
        {"kDescriptorsOfMount", count(fuse::kDescriptorsOfMount)},
        {"kMaxQueues", count(vhost::kMaxQueues)},
        {"kMaxQueueSize", count(vhost::kMaxQueueSize)},
        {"kMaxChainDescriptors", count(vhost::kMaxChainDescriptors)},
        {"kMaxRequestBytes", bytes(vhost::kMaxRequestBytes)},
        {"kMaxAsyncRequests", count(vhost::kMaxAsyncRequests)},
        {"kMaxDiscardSegments", count(vhost::kMaxDiscardSegments)},
        {"kMaxPayloadBytes", bytes(vhost::kMaxPayloadBytes)},
        {"kMaxGuestMappings", count(vhost::kMaxGuestMappings)},
        {"kMaxMemorySlots", count(vhost::kMaxMemorySlots)},
        {"kMaxIops", count(kMaxIops)},
        {"kMaxBandwidthBytes", bytes(kMaxBandwidthBytes)},
        {"kMaxBurstSeconds", count(kMaxBurstSeconds)},
        {"kMaxOpenSegmentFiles", count(nebula::kMaxOpenSegmentFiles)},
        {"kFixedDescriptors", count(kFixedDescriptors)},
        {"kMaxFdsPerMessage", count(vhost::kMaxFdsPerMessage)},
        {"kDescriptorsOfAttachment", count(kDescriptorsOfAttachment)},
        {"kNbdDescriptors", count(kNbdDescriptors)},
        {"kMaxClients", count(nbd::kMaxClients)},
        {"kInputBytes", bytes(nbd::kInputBytes)},
        {"kReservedBytes", bytes(nbd::kReservedBytes)},
        {"kMaxClientBytes", bytes(nbd::kMaxClientBytes)},
        {"kSharedBytes", bytes(nbd::kSharedBytes)},
        {"kMaxClientRequests", count(nbd::kMaxClientRequests)},
        {"kMaxTransferBytes", bytes(nbd::kMaxTransferBytes)},
        {"kMaxUnfragmentedBytes", bytes(nbd::kMaxUnfragmentedBytes)},
        {"kMaxStatusExtents", count(nbd::kMaxStatusExtents)},
        {"kMaxOptionBytes", bytes(nbd::kMaxOptionBytes)},
        {"kListPage", count(nbd::kListPage)},
        {"kHandshakeTimeout", count(static_cast<uint64_t>(nbd::kHandshakeTimeout.count()) / 1000)},
        {"kStallTimeout", count(static_cast<uint64_t>(nbd::kStallTimeout.count()) / 1000)},
        {"kMaxBorrowers", count(share::kMaxBorrowers)},
        {"kMaxLeases", count(share::kMaxLeases)},
        {"kMaxFiles", count(share::kMaxFiles)},
        {"kMaxLentFiles", count(share::kMaxLentFiles)},
        {"kMaxGatheredBytes", bytes(share::kMaxGatheredBytes)},
        {"kMostMappings", count(share::kMostMappings)},
        {"kLenderDescriptors", count(share::kLenderDescriptors)},
        {"kMaxMappedFooters", count(nebula::kMaxMappedFooters)},
        {"kOtherMappings", count(kOtherMappings)},
    };
}

TEST(Limits, ThePageSaysWhatTheCodeHas) {
    std::ifstream file(STELLARIUM_SOURCE_DIR "/docs/internals/limits.md");
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    const std::regex row(R"(\n\| [^|]* \| `(\S+)` \| ([^|]*) \|)");
    std::map<std::string, std::string> page;
    for (std::sregex_iterator it(text.begin(), text.end(), row), end; it != end; ++it) {
        EXPECT_TRUE(page.emplace((*it)[1], (*it)[2]).second) << (*it)[1] << " stands there twice";
    }
    EXPECT_EQ(page, limits_of_the_code());
}

TEST(Limits, LessMemoryIsTakenWhereThereIsNoRoomForIt) {
    EXPECT_EQ(memory_that_fits(320 * kMiB, kGiB), 320 * kMiB);
    EXPECT_EQ(memory_that_fits(320 * kMiB, 0), kMinMemoryBytes);
    EXPECT_EQ(memory_that_fits(16 * kMiB, 0), kMinMemoryBytes);
    for (const uint64_t room : {32 * kMiB, 64 * kMiB, 100 * kMiB, 250 * kMiB, 290 * kMiB}) {
        const uint64_t fits = memory_that_fits(320 * kMiB, room);
        EXPECT_LT(fits, 320 * kMiB);
        EXPECT_GE(fits, room / 2) << "what there is is used";
        EXPECT_LE(fits / 5 * 4 / 64 * 65, room / 8 * 7) << "with room for its slots' headers";
    }
}

TEST(Limits, TooFewDescriptorsAreRefusedWithAdvice) {
    const auto with_limit = [](rlim_t hard) {
        rlimit limit{};
        limit.rlim_cur = std::min<rlim_t>(hard, 256);
        limit.rlim_max = hard;
        setrlimit(RLIMIT_NOFILE, &limit);
        return check_process_limits(0, 1);
    };
    // In processes of their own: a hard limit cannot be taken back.
    EXPECT_EXIT(
        {
            const auto few = with_limit(512);
            std::fprintf(stderr, "%s\n", few ? "" : std::string(few.error().message()).c_str());
            std::_Exit(few ? 1 : 0);
        },
        testing::ExitedWithCode(0), "512 descriptors.*LimitNOFILE");
    const rlim_t enough = descriptors_without_attachments(1);
    EXPECT_EXIT(std::_Exit(with_limit(enough).value_or(0) == enough ? 0 : 1),
                testing::ExitedWithCode(0), "");
}

TEST(Limits, TooFewMappingsAreRefusedWithAdvice) {
    const auto few = check_process_limits(1000, 1);
    ASSERT_FALSE(few);
    EXPECT_EQ(few.error().code(), ErrorCode::kLimitExceeded);
    EXPECT_NE(few.error().message().find("vm.max_map_count"), std::string::npos);
    EXPECT_TRUE(check_process_limits(65'530, 1)) << "the usual value is enough";
}

}  // namespace
}  // namespace stellarium::daemon
