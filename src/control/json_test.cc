#include "control/json.h"

#include <gtest/gtest.h>

#include "control/service.h"
#include "control/suggest.h"

namespace stellarium::control {
namespace {

TEST(ObjectReader, ReportsEveryFaultAtOnce) {
    const Json json = *parse_json(R"({"name": 7, "siez": 1, "count": 70, "on": "yes"})", "request");
    ObjectReader reader(json, "request");
    reader.required_string("name");
    reader.required_size("size");
    reader.optional_number("count", 1, 64);
    reader.optional_bool("on");
    const Result<void> result = reader.finish();
    ASSERT_FALSE(result);
    EXPECT_EQ(result.error().code(), ErrorCode::kInvalidArgument);
    EXPECT_EQ(
        result.error().message(),
        "the request is wrong: 'name' must be text, and is number; 'size' is missing; 'count' "
        "is 70, and must be from 1 to 64; 'on' must be true or false, and is string; 'siez' "
        "is not a known key; did you mean 'size'?");
}

TEST(ObjectReader, TakesSizesAsNumbersAndAsText) {
    const Json json = *parse_json(R"({"a": 512, "b": "10GiB", "c": "much", "d": -1})", "request");
    ObjectReader reader(json, "request");
    EXPECT_EQ(reader.required_size("a"), 512U);
    EXPECT_EQ(reader.required_size("b"), uint64_t{10} << 30);
    EXPECT_EQ(reader.optional_size("c"), std::nullopt);
    EXPECT_EQ(reader.optional_size("d"), std::nullopt);
    EXPECT_EQ(reader.complaints().size(), 2U);
}

TEST(ObjectReader, RefusesWhatIsNoObject) {
    for (const char* text : {"[]", "7", "null", "\"x\""}) {
        const Json json = *parse_json(text, "request");
        ObjectReader reader(json, "request");
        reader.required_string("name");
        const Result<void> result = reader.finish();
        ASSERT_FALSE(result) << text;
        EXPECT_NE(result.error().message().find("must be a JSON object"), std::string::npos);
    }
}

TEST(ParseJson, SaysWhere) {
    const Result<Json> parsed = parse_json("{\"a\": }", "request body");
    ASSERT_FALSE(parsed);
    EXPECT_EQ(parsed.error().message(), "the request body is not valid JSON: wrong at byte 7 of 7");
}

TEST(ParseJson, DeepNestingIsAnErrorAndNoCrash) {
    const std::string deep(1'000'000, '[');
    EXPECT_FALSE(parse_json(deep, "request"));
}

TEST(ToText, NeverThrowsOnBytesThatAreNoText) {
    EXPECT_EQ(to_text(Json("a\xff")), "\"a\xef\xbf\xbd\"");
}

TEST(ErrorJson, ComesBackAsItWas) {
    for (int i = 0; i < kErrorCodeCount; ++i) {
        const Error error(static_cast<ErrorCode>(i), "message \"x\"");
        const Error back = error_from_json(to_text(error_to_json(error)), 500);
        EXPECT_EQ(back.code(), error.code());
        EXPECT_EQ(back.message(), error.message());
    }
    EXPECT_EQ(error_from_json("<html>", 502).code(), ErrorCode::kProtocol);
    EXPECT_EQ(error_from_json(R"({"code": "new_kind", "message": "x"})", 500).code(),
              ErrorCode::kProtocol);
}

TEST(EditDistance, CountsInsertionsRemovalsReplacementsAndSwaps) {
    EXPECT_EQ(edit_distance("volume", "volume", 3), 0U);
    EXPECT_EQ(edit_distance("volme", "volume", 3), 1U);
    EXPECT_EQ(edit_distance("voulme", "volume", 3), 1U);
    EXPECT_EQ(edit_distance("VOLUME", "volume", 3), 0U);
    EXPECT_EQ(edit_distance("image", "volume", 2), 3U);
    EXPECT_EQ(edit_distance("", "ab", 5), 2U);
}

TEST(Closest, SuggestsOnlyWhatIsNear) {
    const std::vector<std::string> names{"image", "volume", "snapshot"};
    EXPECT_EQ(closest("snapshto", names), "snapshot");
    EXPECT_EQ(closest("xyz", names), std::nullopt);
    EXPECT_EQ(did_you_mean("imge", names), "; did you mean 'image'?");
    EXPECT_EQ(did_you_mean("xyz", names), "");
}

TEST(PercentCode, ComesBackAndRefusesNonsense) {
    const std::string odd = "a b/c%@\xc3\xa9?&=";
    EXPECT_EQ(*percent_decode(percent_encode(odd)), odd);
    for (const char* wrong : {"%", "%4", "%zz", "a%0", "%00"}) {
        EXPECT_FALSE(percent_decode(wrong)) << wrong;
    }
}

}  // namespace
}  // namespace stellarium::control
