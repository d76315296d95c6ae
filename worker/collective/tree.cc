#include "worker/collective/tree.h"

#include <algorithm>
#include <numeric>

namespace lockstep::collective {

int SplitPoint(Node node) {
  const int leaves = node.end - node.begin;
  int half = 1;
  while (half * 2 < leaves) half *= 2;
  return node.begin + half;
}

namespace {

void AppendSubtrees(Node node, int begin, int end, std::vector<Node>* out) {
  if (node.end <= begin || end <= node.begin) return;
  if (begin <= node.begin && node.end <= end) {
    out->push_back(node);
    return;
  }
  const int split = SplitPoint(node);
  AppendSubtrees({node.begin, split}, begin, end, out);
  AppendSubtrees({split, node.end}, begin, end, out);
}

// Plays the leaves in the order in which they are written: a value takes the lowest free buffer,
// and two siblings are folded as soon as the later is there.
class StackBuilder {
 public:
  StackBuilder(int begin, int end, absl::Span<const uint8_t> present, StackSchedule* schedule)
      : begin_(begin), present_(present), schedule_(*schedule), value_of_(end - begin, kNone) {}

  // Returns the value that stands for `node`, or kNone where no leaf of it exists.
  int Add(Node node) {
    if (node.end - node.begin == 1) {
      if (!present_[node.begin]) return kNone;
      return value_of_[node.begin - begin_] = NewValue();
    }
    const int split = SplitPoint(node);
    const int left = Add({node.begin, split}), right = Add({split, node.end});
    if (left == kNone || right == kNone) return left == kNone ? right : left;
    const int sum = NewValue();
    values_[left].sum = values_[right].sum = sum;
    values_[left].sibling = right;
    values_[right].sibling = left;
    values_[left].is_left = true;
    return sum;
  }

  void Write(int leaf) {
    int value = value_of_[leaf - begin_];
    if (value == kNone) return;
    StackSchedule::Leaf& written = schedule_.leaves[leaf - begin_];
    written.buffer = values_[value].buffer = TakeBuffer();
    while (values_[value].sum != kNone && values_[values_[value].sibling].buffer != kNone) {
      const Value& sibling = values_[values_[value].sibling];
      const int left = values_[value].is_left ? values_[value].buffer : sibling.buffer;
      const int right = values_[value].is_left ? sibling.buffer : values_[value].buffer;
      written.combines.push_back({left, right});
      used_[right] = false;
      value = values_[value].sum;
      values_[value].buffer = left;
    }
  }

  int BufferOf(int value) const { return value == kNone ? -1 : values_[value].buffer; }

 private:
  static constexpr int kNone = -1;
  struct Value {
    int buffer = kNone;
    int sum = kNone, sibling = kNone;  // of the fold that takes it
    bool is_left = false;
  };

  int NewValue() {
    values_.emplace_back();
    return static_cast<int>(values_.size()) - 1;
  }
  int TakeBuffer() {
    int buffer = 0;
    while (buffer < static_cast<int>(used_.size()) && used_[buffer]) ++buffer;
    if (buffer == static_cast<int>(used_.size())) used_.push_back(false);
    used_[buffer] = true;
    schedule_.buffers = static_cast<int>(used_.size());
    return buffer;
  }

  const int begin_;
  const absl::Span<const uint8_t> present_;
  StackSchedule& schedule_;
  std::vector<int> value_of_;  // by own leaf
  std::vector<Value> values_;
  std::vector<bool> used_;
};

// The value of `node` from parts [first, last), which lie inside it; -1 where there is none.
int Fold(Node node, absl::Span<const Node> parts, int first, int last,
         std::vector<Combine>* combines) {
  if (first == last) return -1;
  if (last - first == 1) return first;
  const int split = SplitPoint(node);
  int middle = first;
  while (middle < last && parts[middle].begin < split) ++middle;
  const int left = Fold({node.begin, split}, parts, first, middle, combines);
  const int right = Fold({split, node.end}, parts, middle, last, combines);
  if (left < 0) return right;
  if (right < 0) return left;
  combines->push_back({left, right});
  return left;
}

}  // namespace

std::vector<Node> MaximalSubtrees(int leaves, int begin, int end) {
  std::vector<Node> subtrees;
  if (begin < end) AppendSubtrees({0, leaves}, begin, end, &subtrees);
  return subtrees;
}

std::vector<int> WriteOrder(int begin, int end, int interleaved) {
  std::vector<int> order(end - begin);
  std::iota(order.begin(), order.end(), begin);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return a % interleaved < b % interleaved; });
  return order;
}

StackSchedule MakeStackSchedule(int leaves, int begin, int end, absl::Span<const uint8_t> present,
                                int interleaved) {
  StackSchedule schedule;
  schedule.leaves.resize(end - begin);
  StackBuilder builder(begin, end, present, &schedule);
  std::vector<int> parts;
  for (const Node& part : MaximalSubtrees(leaves, begin, end)) parts.push_back(builder.Add(part));
  for (const int leaf : WriteOrder(begin, end, interleaved)) builder.Write(leaf);
  for (const int part : parts) schedule.part_buffer.push_back(builder.BufferOf(part));
  return schedule;
}

FoldSchedule MakeFoldSchedule(int /*leaves*/, absl::Span<const Node> parts,
                              absl::Span<const Node> targets) {
  FoldSchedule schedule;
  const int count = static_cast<int>(parts.size());
  int first = 0;
  for (const Node& target : targets) {
    while (first < count && parts[first].begin < target.begin) ++first;
    int last = first;
    while (last < count && parts[last].end <= target.end) ++last;
    schedule.target_buffer.push_back(Fold(target, parts, first, last, &schedule.combines));
    first = last;
  }
  return schedule;
}

}  // namespace lockstep::collective
