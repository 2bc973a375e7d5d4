// Ctrl-C, SIGTERM, and the end of the terminal, so that a long transfer ends cleanly: no image is
// left, and no temporary file.
//
// After install_interrupt_handler() the first signal only sets a flag, and system calls return
// EINTR; a second one ends the process as usual. Code that lasts looks at the flag.
//
// Thread rule: any thread; install once, on the thread that does the work.
#pragma once

#include "base/error.h"

namespace stellarium::cli {

void install_interrupt_handler();
bool interrupted();
/// kCancelled once a signal has come.
Result<void> check_interrupt();

}  // namespace stellarium::cli
