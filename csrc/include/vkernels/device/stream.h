#pragma once

namespace vk::device {

// Where a kernel is started: torch's device index and its current stream, taken at call time.
struct Stream {
  int device;
  void* handle;
};

}  // namespace vk::device
