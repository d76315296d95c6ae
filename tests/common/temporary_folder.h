// A folder of its own for each test, removed afterwards. Owned by the test.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>

#include "common/fs.h"
#include "gtest/gtest.h"

namespace lockstep {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern =
        (std::filesystem::temp_directory_path() / "lockstep-test-XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~TemporaryFolder() { EXPECT_EQ(RemoveTree(path_), absl::OkStatus()); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return JoinPath(path_, name); }

 private:
  std::string path_;
};

}  // namespace lockstep
