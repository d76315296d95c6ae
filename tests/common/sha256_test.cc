#include "common/sha256.h"

#include <string>

#include "gtest/gtest.h"
#include "tests/common/temporary_folder.h"

namespace lockstep {
namespace {

// FIPS 180-4's examples (NIST, "SHA256.pdf").
TEST(Sha256, MatchesFipsExamples) {
  EXPECT_EQ(Sha256Hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Sha256Hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Sha256Hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(Sha256Hex(std::string(1'000'000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, StreamedEqualsWhole) {
  const std::string text = "The quick brown fox jumps over the lazy dog";
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    Sha256 hash;
    hash.Update(text.substr(0, cut));
    hash.Update(text.substr(cut));
    EXPECT_EQ(hash.FinishHex(), Sha256Hex(text)) << cut;
  }
}

TEST(Sha256, HashesFilesInBlocks) {
  TemporaryFolder folder;
  const std::string content((1 << 20) + 17, 'x');  // more than one block
  ASSERT_EQ(WriteFileAtomically(folder / "f", content), absl::OkStatus());
  const auto hash = HashFile(RealFileSystem(), folder / "f");
  ASSERT_EQ(hash.status(), absl::OkStatus());
  EXPECT_EQ(hash->bytes, static_cast<int64_t>(content.size()));
  EXPECT_EQ(hash->sha256, Sha256Hex(content));
  EXPECT_EQ(HashFile(RealFileSystem(), folder / "none").status().code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace lockstep
