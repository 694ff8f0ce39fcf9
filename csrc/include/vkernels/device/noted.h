// Launches that are noted down instead of started, while somebody asks what a call would launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vk::device {

struct NotedLaunch {
  std::string name;
  int64_t blocks_x, blocks_y;
  int threads;
  size_t shared_bytes;
};

inline thread_local std::vector<NotedLaunch>* noted_launches = nullptr;  // not null: note, do not start

}  // namespace vk::device
