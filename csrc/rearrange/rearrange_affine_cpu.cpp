// A pure move by strides. Neighbouring factors that run on are merged first. What remains is walked in tiles of the
// output's fastest factor x the input's fastest factor, so that both sides use whole lines and few pages at a time:
//   the innermost factor is contiguous on both sides: a tile of runs is copied
//   it is not (the channel axis moves): a tile of elements is read row by row into a buffer, turned there, and written
//   row by row. Reading columns straight from x would put 32 lines of stride 4 KB into one 8-way cache set.
#include "rows.h"

namespace vk::VK_ISA {
namespace {

struct Loop {
  int rank = 0;
  int64_t sizes[RearrangeAffineParams::kMaxFactors];
  int64_t x[RearrangeAffineParams::kMaxFactors];
  int64_t y[RearrangeAffineParams::kMaxFactors];
};

Loop merged(const RearrangeAffineParams& p) {
  Loop l;
  for (int i = 0; i < p.rank; ++i) {
    if (p.sizes[i] == 1) continue;
    const int last = l.rank - 1;
    if (l.rank > 0 && l.x[last] == p.x_strides[i] * p.sizes[i] && l.y[last] == p.y_strides[i] * p.sizes[i]) {
      l.sizes[last] *= p.sizes[i];
      l.x[last] = p.x_strides[i];
      l.y[last] = p.y_strides[i];
    } else {
      l.sizes[l.rank] = p.sizes[i];
      l.x[l.rank] = p.x_strides[i];
      l.y[l.rank++] = p.y_strides[i];
    }
  }
  return l;
}

template <int kBytes>
struct Unit;
template <>
struct Unit<1> {
  using type = uint8_t;
};
template <>
struct Unit<2> {
  using type = uint16_t;
};
template <>
struct Unit<4> {
  using type = uint32_t;
};
template <>
struct Unit<8> {
  using type = uint64_t;
};

// Offsets of outer iteration `index` over the first `outer` factors.
VK_INLINE void offsets(const Loop& l, int outer, int64_t index, int64_t& x, int64_t& y) {
  for (int d = outer - 1; d >= 0; --d) {
    const int64_t i = index % l.sizes[d];
    index /= l.sizes[d];
    x += i * l.x[d];
    y += i * l.y[d];
  }
}

template <int kBytes>
void move(const RearrangeAffineParams& p) {
  using U = typename Unit<kBytes>::type;
  Loop l = merged(p);
  const U* x = reinterpret_cast<const U*>(p.x);
  U* y = reinterpret_cast<U*>(p.y);
  int64_t total = 1;
  for (int d = 0; d < l.rank; ++d) total *= l.sizes[d];
  if (total == 0) return;
  if (l.rank == 0 || l.y[l.rank - 1] != 1 || l.x[l.rank - 1] != 1) {
    l.sizes[l.rank] = 1;  // no common run: an innermost run of one element
    l.x[l.rank] = 1;
    l.y[l.rank++] = 1;
  }
  const int outer = l.rank - 1;
  const int64_t run = l.sizes[outer];
  const bool stream = total * kBytes > kCacheBytes;
  if (outer < 2) {
    parallel_for(0, total / run, kGrainBytes / (run * kBytes) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t ox = 0, oy = 0;
        offsets(l, outer, i, ox, oy);
        copy_row(reinterpret_cast<char*>(y + oy), reinterpret_cast<const char*>(x + ox), run * kBytes, stream, nullptr);
      }
      if (stream) streaming_fence();
    });
    return;
  }
  int fast_y = 0, fast_x = 0;
  for (int d = 0; d < outer; ++d) {
    if (l.y[d] < l.y[fast_y]) fast_y = d;
    if (l.x[d] > 0 && (l.x[fast_x] == 0 || l.x[d] < l.x[fast_x])) fast_x = d;
  }
  if (fast_x == fast_y) fast_x = fast_y == 0 ? 1 : 0;
  Loop rest;
  for (int d = 0; d < outer; ++d) {
    if (d == fast_y || d == fast_x) continue;
    rest.sizes[rest.rank] = l.sizes[d];
    rest.x[rest.rank] = l.x[d];
    rest.y[rest.rank++] = l.y[d];
  }
  const int64_t n_y = l.sizes[fast_y], n_x = l.sizes[fast_x];
  const int64_t yy = l.y[fast_y], yx = l.x[fast_y], xy = l.y[fast_x], xx = l.x[fast_x];
  constexpr int64_t kTile = kTurnedSide<kBytes>;
  const int64_t tiles_y = (n_y + kTile - 1) / kTile, tiles_x = (n_x + kTile - 1) / kTile;
  const int64_t tiles = total / run / (n_y * n_x) * tiles_y * tiles_x;
  const bool turn = run == 1 && xx == 1 && yy == 1;
  parallel_for(0, tiles, kGrainBytes / (kTile * kTile * run * kBytes) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t ox = 0, oy = 0;
      const int64_t ty = tile % tiles_y * kTile, tx = tile / tiles_y % tiles_x * kTile;
      offsets(rest, rest.rank, tile / (tiles_y * tiles_x), ox, oy);
      const int64_t count_y = n_y - ty < kTile ? n_y - ty : kTile, count_x = n_x - tx < kTile ? n_x - tx : kTile;
      const U* from = x + ox + ty * yx + tx * xx;
      U* to = y + oy + ty * yy + tx * xy;
      if (!turn) {
        for (int64_t j = 0; j < count_x; ++j)
          for (int64_t i = 0; i < count_y; ++i)
            copy_row(reinterpret_cast<char*>(to + j * xy + i * yy),
                     reinterpret_cast<const char*>(from + j * xx + i * yx), run * kBytes, stream, nullptr);
        continue;
      }
      U read[kTile][kTile + 1];
      alignas(64) U turned[kTile];
      for (int64_t i = 0; i < count_y; ++i)
        for (int64_t j = 0; j < count_x; ++j) read[i][j] = from[i * yx + j];
      for (int64_t j = 0; j < count_x; ++j) {
        for (int64_t i = 0; i < count_y; ++i) turned[i] = read[i][j];
        copy_row(reinterpret_cast<char*>(to + j * xy), reinterpret_cast<const char*>(turned), count_y * kBytes, stream,
                 nullptr);
      }
    }
    if (stream) streaming_fence();
  });
}

}  // namespace

void rearrange_affine(const RearrangeAffineParams& p) {
  switch (p.element_bytes) {
    case 1:
      return move<1>(p);
    case 2:
      return move<2>(p);
    case 8:
      return move<8>(p);
    default:
      return move<4>(p);
  }
}

}  // namespace vk::VK_ISA
