// Which block computes what, and in which order.
#pragma once

#include "attention_mask.h"

namespace vk::device {

// A line is one head of one group of one sample. Lines whose keys and values fit the L2 cache together form a section;
// within a section the tiles with the most work of all its lines go first.
struct Schedule {
  int tiles, step;  // of a group; tokens of a tile
  int heads, groups;
  uint32_t lines, section;
  bool backward;  // the last tile has the most work
};

VK_DEVICE Place place_of(const Schedule& s, const Mask& m, int64_t block) {
  const uint32_t x = static_cast<uint32_t>(block), whole = s.section * static_cast<uint32_t>(s.tiles);
  const uint32_t first = x / whole * s.section, left = s.lines - first;
  const uint32_t lines = left < s.section ? left : s.section, inside = x - first * static_cast<uint32_t>(s.tiles);
  const int rank = static_cast<int>(inside / lines);
  const uint32_t line = first + inside % lines, heads = static_cast<uint32_t>(s.heads);
  Place at;
  at.tile = s.backward ? s.tiles - 1 - rank : rank;
  at.head = static_cast<int>(line % heads);
  at.group = static_cast<int>(line / heads % static_cast<uint32_t>(s.groups));
  at.sample = line / heads / static_cast<uint32_t>(s.groups);
  at.live_q = live_tokens(m.q, at.sample);
  at.live_k = live_tokens(m.k, at.sample);
  return at;
}

// Tiles of `tile` queries of every query head, or of keys of every key head.
inline Schedule schedule_of(const AttentionParams& a, const Mask& m, int tile, bool keys) {
  constexpr int64_t kCache = 32 << 20;  // bytes, of 50 MB (H200) or 40 MB (A100)
  const Side &mine = keys ? m.k : m.q, &theirs = keys ? m.q : m.k;
  const int64_t heads = a.q.size(2), key_heads = a.k.size(2), share = key_heads > 0 ? heads / key_heads : 1;
  Schedule s{};
  s.step = m.packed ? tile / mine.length * mine.length : tile;
  s.tiles = (mine.all + s.step - 1) / s.step;
  s.heads = int(keys ? key_heads : heads);
  s.groups = m.packed ? 1 : int(a.mask.layout.groups);
  const int64_t lines = s.heads * a.q.size(0) * s.groups;
  // What a key head's lines read: two tensors, of one head or of all its query heads.
  const int64_t bytes = 4 * theirs.all * a.q.size(3) * (keys ? share : 1), together = keys ? 1 : share;
  const int64_t fitting = kCache / (bytes > 0 ? bytes : 1) * together;
  s.lines = uint32_t(lines);
  s.section = uint32_t(fitting < together ? together : fitting > lines ? lines : fitting);
  s.backward = !keys;
  return s;
}

inline int64_t blocks_of(const Schedule& s) { return int64_t(s.lines) * s.tiles; }

}  // namespace vk::device
