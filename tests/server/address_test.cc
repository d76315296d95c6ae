#include "common/rpc/address.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "common/rpc/status.h"

namespace lockstep::rpc {
namespace {

TEST(AddressTest, ParsesWhatPeopleWrite) {
  for (const char* text : {"127.0.0.1:7070", "localhost:0", "[::1]:65535", "gpu-3.lab:1"}) {
    const auto address = ParseAddress(text);
    ASSERT_TRUE(address.ok()) << address.status();
    EXPECT_EQ(address->ToString(), text);
  }
  EXPECT_EQ(ParseAddress("[fe80::2]:80")->host, "fe80::2");
}

TEST(AddressTest, RefusesWhatIsNone) {
  for (const char* text : {"", ":", "host", "host:", ":80", "host:70707", "host:-1", "host:+1",
                           "host:8o", "::1:80", "[::1]", "[]:80", "a b:80", "http://host:80"}) {
    const auto address = ParseAddress(text);
    EXPECT_EQ(address.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(address.status().message()), testing::HasSubstr("HOST:PORT"));
  }
}

TEST(AddressTest, PlaintextBeyondTheMachineNeedsInsecure) {
  for (const char* loopback : {"127.0.0.1:1", "127.8.8.8:1", "localhost:1", "[::1]:1"}) {
    const auto warning = CheckPlaintext(loopback, false);
    ASSERT_TRUE(warning.ok()) << warning.status();
    EXPECT_EQ(*warning, "");
  }
  for (const char* far : {"0.0.0.0:1", "[::]:1", "10.0.0.1:1", "gpu-3:1", "127.0.0.1.evil:1"}) {
    const auto refused = CheckPlaintext(far, false);
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition) << far;
    EXPECT_THAT(std::string(refused.status().message()), testing::HasSubstr("--insecure"));
    const auto warning = CheckPlaintext(far, true);
    ASSERT_TRUE(warning.ok());
    EXPECT_THAT(*warning, testing::HasSubstr(far));
  }
}

TEST(StatusTest, CodesAndMessagesSurviveTheWire) {
  for (int code = 1; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "why");
    EXPECT_EQ(FromGrpc(ToGrpc(status)), status);
  }
  EXPECT_TRUE(FromGrpc(ToGrpc(absl::OkStatus())).ok());
  EXPECT_EQ(ToGrpc(absl::UnknownError("two\nlines")).error_message(), "two lines");
}

}  // namespace
}  // namespace lockstep::rpc
