#include "worker/collective/tree.h"

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

// Plays the leaves in order; a value takes the lowest free buffer.
class StackBuilder {
 public:
  StackBuilder(int begin, absl::Span<const uint8_t> present, StackSchedule* schedule)
      : begin_(begin), present_(present), schedule_(schedule) {}

  int Evaluate(Node node) {
    if (node.end - node.begin == 1) return Write(node.begin);
    const int split = SplitPoint(node);
    const int left = Evaluate({node.begin, split});
    const int right = Evaluate({split, node.end});
    if (left < 0) return right;
    if (right < 0) return left;
    schedule_->leaves[newest_ - begin_].combines.push_back({left, right});
    used_[right] = false;
    return left;
  }

 private:
  int Write(int leaf) {
    if (!present_[leaf]) return -1;
    int buffer = 0;
    while (buffer < static_cast<int>(used_.size()) && used_[buffer]) ++buffer;
    if (buffer == static_cast<int>(used_.size())) used_.push_back(false);
    used_[buffer] = true;
    schedule_->leaves[leaf - begin_].buffer = buffer;
    schedule_->buffers = static_cast<int>(used_.size());
    newest_ = leaf;
    return buffer;
  }

  const int begin_;
  const absl::Span<const uint8_t> present_;
  StackSchedule* const schedule_;
  std::vector<bool> used_;
  int newest_ = -1;  // the leaf written last
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

StackSchedule MakeStackSchedule(int leaves, int begin, int end, absl::Span<const uint8_t> present) {
  StackSchedule schedule;
  schedule.leaves.resize(end - begin);
  StackBuilder builder(begin, present, &schedule);
  for (const Node& part : MaximalSubtrees(leaves, begin, end)) {
    schedule.part_buffer.push_back(builder.Evaluate(part));
  }
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
