// How a call is cut into tasks: enough for every thread to balance, each large enough to pay for packing its keys.
#include <algorithm>

#include "attention.h"
#include "vkernels/cpu/parallel.h"

namespace vk {
namespace {

constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kLeastRows = 192;  // queries that pay for packing the keys once more
constexpr int64_t kRowUnit = 64;

int64_t pieces(int64_t problems, int64_t length) {
  const int64_t wanted = (kTasksPerThread * num_threads() + problems - 1) / std::max<int64_t>(problems, 1);
  return std::max<int64_t>(1, std::min(wanted, length / kLeastRows));
}

int64_t piece_size(int64_t length, int64_t pieces) {
  return std::max<int64_t>((((length + pieces - 1) / pieces) + kRowUnit - 1) / kRowUnit * kRowUnit, 1);
}

// Visible keys of every kRowUnit-th query, times the queries it stands for.
double work(const AttentionMask& mask, int64_t batch, int64_t begin, int64_t end) {
  const TensorRef& ranges = mask.ranges;
  if (!ranges) return static_cast<double>((end - begin) * mask.live_k(batch));
  double sum = 0;
  for (int64_t i = begin; i < end; i += kRowUnit) {
    const int32_t* row =
        ranges.ptr<const int32_t>() + (ranges.size(0) == 1 ? 0 : batch) * ranges.stride(0) + i * ranges.stride(1);
    for (int64_t r = 0; r < ranges.size(2); r += 2)
      sum += static_cast<double>(std::max<int64_t>(0, int64_t{row[r + 1]} - row[r])) * std::min(kRowUnit, end - i);
  }
  return sum;
}

void longest_first(std::vector<AttentionTask>& tasks) {
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const AttentionTask& a, const AttentionTask& b) { return a.work > b.work; });
}

}  // namespace

std::vector<AttentionTask> attention_forward_tasks(const AttentionMask& mask, int64_t b, int64_t m) {
  std::vector<AttentionTask> tasks;
  for (int64_t batch = 0; batch < b; ++batch) {
    const int64_t len_q = mask.live_q(batch), len_k = mask.live_k(batch);
    const int64_t size = piece_size(len_q, pieces(b * mask.layout.groups * m, len_q));
    for (int64_t begin = 0; begin < len_q; begin += size) {
      const int64_t end = std::min(begin + size, len_q);
      const double cost = work(mask, batch, begin, end);
      for (int64_t group = 0; group < mask.layout.groups; ++group)
        for (int64_t head = 0; head < m; ++head)
          tasks.push_back({batch, group, head, begin, end, 0, len_k, true, false, cost});
    }
  }
  longest_first(tasks);
  return tasks;
}

// One pass per problem where there are enough problems; else gradients of queries and of keys are tasks of their own,
// which computes the scores twice and keeps every thread busy.
std::vector<AttentionTask> attention_backward_tasks(const AttentionMask& mask, int64_t b, int64_t m) {
  std::vector<AttentionTask> tasks;
  const int64_t problems = b * mask.layout.groups * m;
  const bool one_pass = problems >= num_threads();
  for (int64_t batch = 0; batch < b; ++batch) {
    const int64_t len_q = mask.live_q(batch), len_k = mask.live_k(batch);
    const double all = work(mask, batch, 0, len_q);
    const int64_t q_size = piece_size(len_q, pieces(problems, len_q));
    const int64_t k_size = piece_size(len_k, pieces(problems, len_k));
    for (int64_t group = 0; group < mask.layout.groups; ++group)
      for (int64_t head = 0; head < m; ++head) {
        if (one_pass) {
          tasks.push_back({batch, group, head, 0, len_q, 0, len_k, true, true, 5 * all});
          continue;
        }
        for (int64_t at = 0; at < len_q; at += q_size) {
          const int64_t end = std::min(at + q_size, len_q);
          tasks.push_back({batch, group, head, at, end, 0, len_k, true, false, 3 * work(mask, batch, at, end)});
        }
        for (int64_t at = 0; at < len_k; at += k_size) {
          const int64_t end = std::min(at + k_size, len_k);
          const double share = static_cast<double>(end - at) / static_cast<double>(len_k);
          tasks.push_back({batch, group, head, 0, len_q, at, end, false, true, 4 * all * share});
        }
      }
  }
  longest_first(tasks);
  return tasks;
}

}  // namespace vk
