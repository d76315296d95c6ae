#include "server/core/placement.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/core/planted_bugs.h"

namespace lockstep::server {

std::vector<MemberPlacement> Place(std::vector<FreeSlots> free, int slots, int shards) {
  std::sort(free.begin(), free.end(), [](const FreeSlots& a, const FreeSlots& b) {
    if (a.slots.size() != b.slots.size()) return a.slots.size() > b.slots.size();
    return a.worker < b.worker;
  });
  std::vector<MemberPlacement> members;
  int placed = 0;
  for (FreeSlots& worker : free) {
    if (placed == slots) break;
    const int count = std::min<int>(static_cast<int>(worker.slots.size()), slots - placed);
    if (count == 0) break;
    worker.slots.resize(count);
    MemberPlacement member{std::move(worker.worker), std::move(worker.slots), {}};
    for (int i = placed; i <= placed + count; ++i) {
      member.bounds.push_back(static_cast<int32_t>(int64_t{i} * shards / slots));
    }
    if (Planted(PlantedBug::kShardGap) && placed > 0 && member.bounds[1] > member.bounds[0] + 1) {
      ++member.bounds[0];
    }
    placed += count;
    members.push_back(std::move(member));
  }
  if (placed < slots) members.clear();
  return members;
}

std::string DescribeSlots(const std::vector<int>& slots) {
  std::string text = slots.size() == 1 ? "slot " : "slots ";
  for (size_t i = 0; i < slots.size();) {
    size_t last = i;
    while (last + 1 < slots.size() && slots[last + 1] == slots[last] + 1) ++last;
    if (i > 0) text += ",";
    absl::StrAppend(&text, slots[i]);
    if (last > i) absl::StrAppend(&text, "-", slots[last]);
    i = last + 1;
  }
  return text;
}

}  // namespace lockstep::server
