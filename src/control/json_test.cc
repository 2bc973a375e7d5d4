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

TEST(ParseJson, SaysNothingOfTheParser) {
    const Result<Json> parsed = parse_json("[1e9999]", "request body");
    ASSERT_FALSE(parsed);
    EXPECT_EQ(parsed.error().message().find("json.exception"), std::string::npos);
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

TEST(Json, TextThatWouldTakeMuchMemoryIsRefusedUnparsed) {
    const auto code_of = [](const std::string& text, size_t max_values) {
        const Result<Json> parsed = parse_json(text, "text", max_values);
        return parsed ? std::nullopt : std::optional(parsed.error().code());
    };
    const std::string deepest = std::string(kMaxJsonDepth, '[') + std::string(kMaxJsonDepth, ']');
    EXPECT_EQ(code_of(deepest, 1000), std::nullopt);
    EXPECT_EQ(code_of("[" + deepest + "]", 1000), ErrorCode::kLimitExceeded);
    EXPECT_EQ(code_of(std::string(size_t{16} << 20, '['), 1000), ErrorCode::kLimitExceeded);
    EXPECT_EQ(code_of("[1,2,3]", 4), std::nullopt);
    EXPECT_EQ(code_of("[1,2,3]", 3), ErrorCode::kLimitExceeded);
    EXPECT_EQ(code_of("[{},{},{}]", 4), ErrorCode::kLimitExceeded);
    // Text is not counted, whatever is in it.
    EXPECT_EQ(code_of("[\"" + std::string(100, '[') + ",,,\\\",[\"]", 2), std::nullopt);
}

TEST(Json, RepeatedKeysAreFoundInTheirObject) {
    EXPECT_TRUE(refuse_repeated_keys(R"({"a": {"b": 1}, "b": [{"a": 1}, {"a": 2}]})", "text"));
    for (const char* text : {R"({"a": 1, "a": 2})", R"([{"x": {"b": 1, "c": 2, "b": 3}}])"}) {
        const Result<void> refused = refuse_repeated_keys(text, "text");
        ASSERT_FALSE(refused) << text;
        EXPECT_EQ(refused.error().code(), ErrorCode::kInvalidArgument);
    }
}

}  // namespace
}  // namespace stellarium::control
