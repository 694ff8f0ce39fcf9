#pragma once

#include "tiled_turn_cuda.h"

namespace vk {
namespace {

// Scores of the keys of a tile, hidden from `live` on.
template <class Traits, bool kInRegisters>
VK_DEVICE void score_tile(FragmentC (&s)[kTileRows / 8], const Tiled& p, const Held<Traits, kInRegisters>& q,
                          const typename Traits::Others& k, int live) {
#pragma unroll
  for (int i = 0; i < kTileRows / 16; ++i) {
    FragmentC two[2];
    if (16 * i < live) multiply_rows(two, p, q, sixteen<Traits>(k, 16 * i));
    s[2 * i] = two[0];
    s[2 * i + 1] = two[1];
  }
  if (live == kTileRows) return;
#pragma unroll
  for (int i = 0; i < kTileRows / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (8 * i + s[i].column(lane(), j) >= live) s[i].value[j] = kNothing;
}

template <class Traits>
VK_KERNEL(Traits::kForwardThreads, Traits::kBlocks)
tiled_forward(const Tiled p) {
  using T = typename Traits::T;
  const Block b = block_of(p);
  const auto room = Room<Traits, 1>::at(p, b);
  const auto kv = others<T>(b, p.k, p.v, quotient(b.head, p.per_key));
  const auto start = [&](int tile) {
    if (tile < p.tiles) copy_others(p, b, room, tile % 2, tile, kv);
    commit_copies();
  };
  copy_held<Traits>(p, b, rows_in(room, 0), p.q, b.head);
  commit_copies();
  start(0);
  turn_held(p, b, room);

  OnlineSoftmax row;
  Sums<Traits> o{};
  for (int tile = 0; tile < p.tiles; ++tile) {
    const int stage = tile % 2, live = live_rows(p, tile);
    start(tile + 1);
    wait_for_copies<1>();
    sync_block();
    turn_others(p, b, room, stage, tile);
    Held<Traits, true> q;
    hold(q, rows_in(room, 0));  // of every tile anew: the registers serve the sums in between
    if (p.cls && tile == 0) {   // a key more: the softmax starts with it
      const float one[2] = {1, 1};
      multiply_row(row.top, q, cls_in(room, stage, 0));
      mix_row<Traits>(o, one, cls_in(room, stage, 1));
      row.total[0] = row.total[1] = lane() % 4 == 0;
    }
    if (live > 0) {
      FragmentC s[kTileRows / 8];
      float keep[2];
      score_tile(s, p, q, others_in(room, stage, 0), live);
      softmax_step(row, s, p.scale_log2, keep);
      rescale(o, keep);
#pragma unroll
      for (int i = 0; i < kTileRows / 16; ++i)
        if (16 * i < live)
          mix_rows<Traits>(o, p, as_operand<T>(s[2 * i], s[2 * i + 1]),
                           sixteen<Traits>(others_in(room, stage, 1), 16 * i));
    }
    sync_block();  // the stage is filled again next
  }
  complete(row);
  const int cls = cls_half(p, b);
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    factor[half] = inverse_of(row.total[half]) / float(half == cls ? p.where.outer : 1);
  store_sums<Traits>(p, b, o, factor, rows_in(room, 0), p.o, b.head, part_of(p, b, p.part, p.n, b.head));
}

}  // namespace
}  // namespace vk
