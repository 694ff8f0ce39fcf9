#include "decode_attention/decode_rows.h"
#include "rearrange/pieces.h"
#include "vkernels/cpu/attention_backward.h"
#include "vkernels/cpu/attention_core.h"
#include "vkernels/cpu/short_attention_math.h"
#include "vkernels/cpu/tiles.h"

namespace vk::VK_ISA {

TileSizes tile_sizes() {
  static constexpr TileSize kSizes[] = {
      {"apply_rope", "elements of a vector", kLanes},
      {"attention", "queries of a strip", Vectors<false>::kRows},
      {"attention", "keys of a panel", kPanel},
      {"attention", "keys of a slab", Vectors<false>::kSlab},
      {"attention", "bytes of packed keys and values", kChunkBytes},
      {"attention", "backward: queries of a block", kBlock},
      {"attention", "backward: keys of a slab", kBackSlab},
      {"attention", "groups of few tokens: queries of a block", short_attention::kQueryBlock},
      {"decode_attention", "query rows of a pass", decode::kRows},
      {"decode_attention", "tokens of a step", decode::kRun},
      {"divided_attention", "queries of a block", short_attention::kQueryBlock},
      {"divided_attention", "keys of a score vector", short_attention::kHalf},
      {"divided_attention", "output rows of a product", short_attention::kRowTile},
      {"divided_attention", "output columns of a product", short_attention::kColTile * kLanes},
      {"kv_append", "elements of a vector", kLanes},
      {"qkv_prologue", "elements of a vector", kLanes},
      {"rearrange", "bytes of a task", kGrainBytes},
      {"rearrange", "side of a turned tile, 2 bytes", kTurnedSide<2>},
      {"rearrange", "side of a turned tile, 4 bytes", kTurnedSide<4>},
#if defined(VK_HAS_TILES)
      {"attention", "bfloat16, in matrix tiles: queries of a strip", Tiles::kRows},
      {"divided_attention", "bfloat16, long groups in matrix tiles: queries of a strip", Tiles::kRows},
#endif
  };
  int64_t count = sizeof kSizes / sizeof *kSizes;
#if defined(VK_HAS_TILES)
  if (active_isa() != Isa::amx) count -= 2;
#endif
  return {kSizes, count};
}

}  // namespace vk::VK_ISA
