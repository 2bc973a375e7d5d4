#include "daemon/log.h"

#include <algorithm>

#include <fmt/format.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include "control/json.h"

namespace stellarium::daemon {
namespace {

spdlog::level::level_enum level_of(LogLevel level) {
    switch (level) {
        case LogLevel::kDebug:
            return spdlog::level::debug;
        case LogLevel::kInfo:
            return spdlog::level::info;
        case LogLevel::kWarning:
            return spdlog::level::warn;
        case LogLevel::kError:
            return spdlog::level::err;
    }
    return spdlog::level::info;
}

/// A JSON string, quotes included: also right for text with blanks or quotes in logfmt.
std::string json_quoted(std::string_view text) {
    return control::to_text(control::Json(text));
}

bool plain(std::string_view text) {
    return !text.empty() && std::ranges::all_of(text, [](char c) {
        return c > ' ' && c <= '~' && c != '"' && c != '=' && c != '\\';
    });
}

}  // namespace

std::optional<LogLevel> log_level_from(std::string_view name) {
    if (name == "debug") {
        return LogLevel::kDebug;
    }
    if (name == "info") {
        return LogLevel::kInfo;
    }
    if (name == "warning") {
        return LogLevel::kWarning;
    }
    return name == "error" ? std::optional(LogLevel::kError) : std::nullopt;
}

std::optional<LogFormat> log_format_from(std::string_view name) {
    if (name == "text") {
        return LogFormat::kText;
    }
    return name == "json" ? std::optional(LogFormat::kJson) : std::nullopt;
}

std::string format_event(LogFormat format, std::string_view event,
                         std::initializer_list<LogField> fields) {
    std::string line;
    if (format == LogFormat::kJson) {
        line = "\"event\":" + json_quoted(event);
        for (const LogField& field : fields) {
            line += fmt::format(",{}:{}", json_quoted(field.key), json_quoted(field.value));
        }
        return line;
    }
    line = "event=" + (plain(event) ? std::string(event) : json_quoted(event));
    for (const LogField& field : fields) {
        line += fmt::format(" {}={}", field.key,
                            plain(field.value) ? field.value : json_quoted(field.value));
    }
    return line;
}

struct Log::Impl {
    LogFormat format;
    spdlog::logger logger{"stellariumd", std::make_shared<spdlog::sinks::stderr_sink_mt>()};
};

Log::Log(LogLevel level, LogFormat format) : impl_(new Impl{.format = format}) {
    impl_->logger.set_level(level_of(level));
    impl_->logger.set_pattern(format == LogFormat::kJson
                                  ? R"({"ts":"%Y-%m-%dT%H:%M:%S.%eZ","level":"%l",%v})"
                                  : "ts=%Y-%m-%dT%H:%M:%S.%eZ level=%l %v",
                              spdlog::pattern_time_type::utc);
    impl_->logger.flush_on(spdlog::level::trace);
}

Log::~Log() = default;

void Log::write(LogLevel level, std::string_view event, std::initializer_list<LogField> fields) {
    if (impl_->logger.should_log(level_of(level))) {
        // spdlog takes a string as it is when there are no arguments.
        impl_->logger.log(level_of(level), format_event(impl_->format, event, fields));
    }
}

void Log::debug(std::string_view event, std::initializer_list<LogField> fields) {
    write(LogLevel::kDebug, event, fields);
}
void Log::info(std::string_view event, std::initializer_list<LogField> fields) {
    write(LogLevel::kInfo, event, fields);
}
void Log::warning(std::string_view event, std::initializer_list<LogField> fields) {
    write(LogLevel::kWarning, event, fields);
}
void Log::error(std::string_view event, std::initializer_list<LogField> fields) {
    write(LogLevel::kError, event, fields);
}

}  // namespace stellarium::daemon
