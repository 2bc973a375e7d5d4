// Structured log lines on stderr: one event, some fields.
//
//     log.info("attached", {{"source", "vm-1"}, {"socket", path}});
//     // ts=2026-05-01T12:00:00.123Z level=info event="attached" source=vm-1 socket=/run/...
//     // or {"ts":"...","level":"info","event":"attached","source":"vm-1","socket":"/run/..."}
//
// Thread rule: any thread; lines are never mixed.
#pragma once

#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace stellarium::daemon {

enum class LogLevel : uint8_t { kDebug, kInfo, kWarning, kError };
enum class LogFormat : uint8_t { kText, kJson };

std::optional<LogLevel> log_level_from(std::string_view name);    ///< "debug" ... "error".
std::optional<LogFormat> log_format_from(std::string_view name);  ///< "text", "json".

struct LogField {
    std::string_view key;
    std::string value;
};

/// What comes after time and level, in either format; every control character is escaped, so that
/// no value can forge a line.
std::string format_event(LogFormat format, std::string_view event,
                         std::initializer_list<LogField> fields);

class Log {
  public:
    Log(LogLevel level, LogFormat format);
    ~Log();

    void debug(std::string_view event, std::initializer_list<LogField> fields = {});
    void info(std::string_view event, std::initializer_list<LogField> fields = {});
    void warning(std::string_view event, std::initializer_list<LogField> fields = {});
    void error(std::string_view event, std::initializer_list<LogField> fields = {});

  private:
    void write(LogLevel level, std::string_view event, std::initializer_list<LogField> fields);
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace stellarium::daemon
