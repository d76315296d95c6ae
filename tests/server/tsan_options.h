// How ThreadSanitizer judges programs that use gRPC, for tests and for the programs that they
// start.
#pragma once

namespace lockstep::server {

constexpr char kTsanOptions[] = "ignore_noninstrumented_modules=1 suppressions=" LOCKSTEP_SOURCE_DIR
                                "/tests/server/tsan_suppressions.txt";

}  // namespace lockstep::server
