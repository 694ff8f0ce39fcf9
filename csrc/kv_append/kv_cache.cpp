#include "kv_cache_check.h"

namespace vk {

CacheRef checked_cache(const char* op, const TensorRef& length, const TensorRef& table,
                       const std::vector<TensorRef>& storage, const std::vector<int64_t>& layout, int64_t b, int64_t m,
                       int64_t d, const int32_t* count) {
  const CacheRef c = checked_cache_shapes(op, length, table, storage, layout, b, m, d);
  const CacheLayout& l = c.layout;
  const int64_t pages = (l.bits ? c.k_codes : c.k_rows).size(0);
  const int64_t room = c.table_pages * l.page;
  for (int64_t i = 0; i < b; ++i) {
    VK_CHECK(c.length[i] >= 0, op, "length", "be at least 0", c.length[i]);
    const int64_t end = history_end(l, int64_t{c.length[i]} + (count ? count[i] : 0));
    VK_CHECK(l.ring || end <= room, op, "length", "fit the pages of the table", end);
    const int64_t used = l.ring && end > l.ring ? l.ring : end;
    for (int64_t j = 0; j < (used + l.page - 1) / l.page; ++j) {
      const int64_t page = c.table[i * c.table_pages + j];
      VK_CHECK(page >= 0 && page < pages, op, "table", "hold pages below " + std::to_string(pages), page);
    }
  }
  return c;
}

}  // namespace vk
