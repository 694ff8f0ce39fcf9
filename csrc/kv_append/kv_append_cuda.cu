// Tokens into a KV cache, one launch per call.
//
// append_rows copies. append_codes has a block per (sequence, head, task), for keys and for values: the task codes one
// group, whose tokens come from the recent window or from the call, and then keeps the tokens that take its place in
// the window, so that no other block touches those slots. The last tasks fill the sinks. How many tasks there are
// follows from sizes; which of them has work, from lengths on the device, in the call's bounds whatever the memory
// says.
#include <algorithm>

#include "kv_append_cuda.h"
#include "vkernels/device/launch.h"
#include "vkernels/device/piece.h"
#include "vkernels/device/sync.h"
#include "vkernels/device/warp.h"

namespace vk {
namespace {

using namespace device;

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // tokens whose loads are under way

struct Source {
  const void* data;
  int64_t b, s, m;
  bool loose;  // rows start at addresses that are no multiple of 16 bytes
};

// Of keys or of values.
struct Store {
  Source from;
  void *rows, *recent, *sink;
  int32_t* codes;
  f16* scale;
};

struct Params {
  Store part[2];  // keys, values
  const int32_t *count, *length, *table;
  CacheLayout layout;
  int64_t tokens, s, pages, table_pages;
  int m, d;
  int token_lanes, lanes;  // append_rows: a token's vectors are dealt to `lanes` threads
  int tasks, all_tasks;    // append_codes: groups, then sinks
};

VK_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
VK_DEVICE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Tokens that were there, and tokens that come.
struct Lengths {
  int64_t old, count;
};
VK_DEVICE Lengths lengths_of(const Params& p, int64_t sample) {
  return {larger(load(p.length + sample), 0), smaller(larger(load(p.count + sample), 0), p.s)};
}

// The page of a history slot; -1 where the table has none.
VK_DEVICE int64_t page_of(const Params& p, int64_t sample, int64_t slot) {
  const int64_t column = slot / p.layout.page;
  if (column >= p.table_pages) return -1;
  const int64_t page = load(p.table + sample * p.table_pages + column);
  return page >= 0 && page < p.pages ? page : -1;
}

template <class T>
VK_DEVICE const T* call_row(const Source& x, int64_t sample, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + sample * x.b + token * x.s + head * x.m;
}
template <class T>
VK_DEVICE Vector load_vector(const Source& x, const T* from) {
  return x.loose ? load_elements<T, kLanesOf<T>>(from) : load16(from);
}

// Where a token of full precision goes: element of the rows (or of the sinks), and how far its heads are apart.
struct Target {
  bool there, sink;
  int64_t at, head;
};
VK_DEVICE Target target_of(const Params& p, int64_t sample, int64_t token, const Lengths& l) {
  const int64_t index = l.old + token - p.layout.sinks, d = p.d;
  if (token >= l.count) return {};
  if (index < 0) return {true, true, (sample * p.m * p.layout.sinks + l.old + token) * d, p.layout.sinks * d};
  if (index < history_begin(p.layout, l.old + l.count - p.layout.sinks)) return {};
  const int64_t slot = history_slot(p.layout, index), page = page_of(p, sample, slot);
  return {page >= 0, false, (page * p.m * p.layout.page + slot % p.layout.page) * d, p.layout.page * d};
}

template <class T>
VK_KERNEL(kThreads, 4)
append_rows(const Params p) {
  constexpr int kWidth = kLanesOf<T>, kBatch = 2;
  const int lane = thread_index() % p.lanes, token_lane = thread_index() / p.lanes;
  const int each = p.d / kWidth, vectors = p.m * each;
  const int64_t task = block_x() * p.token_lanes + token_lane;
  if (token_lane >= p.token_lanes || task >= p.tokens) return;
  const int64_t sample = task / p.s, token = task - sample * p.s;
  const Target to = target_of(p, sample, token, lengths_of(p, sample));
  if (!to.there) return;
  for (int i = lane; i < vectors; i += kBatch * p.lanes) {
    Vector x[kBatch][2];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int v = i + j * p.lanes;
      if (v >= vectors) break;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const Source& from = p.part[part].from;
        x[j][part] = load_vector(from, call_row<T>(from, sample, token, v / each) + v % each * kWidth);
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int v = i + j * p.lanes;
      if (v >= vectors) break;
      const int64_t at = to.at + v / each * to.head + v % each * kWidth;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const Store& store = p.part[part];
        store16(static_cast<T*>(to.sink ? store.sink : store.rows) + at, x[j][part]);
      }
    }
  }
}

// One task of one head of a sequence.
struct Task {
  int64_t sample, head;
  Lengths length;
  int64_t first, end, index;  // groups first .. end are to be coded, this one begins at `index`
  int64_t place;              // of the group among all groups of the storage; -1: it has none
  int number;
};

VK_DEVICE Task task_of(const Params& p) {
  const CacheLayout& c = p.layout;
  Task t;
  t.head = block_x() % p.m;
  t.number = static_cast<int>(block_x() / p.m % p.all_tasks);
  t.sample = block_x() / p.m / p.all_tasks;
  t.length = lengths_of(p, t.sample);
  t.end = history_end(c, t.length.old + t.length.count);
  t.first = larger(history_end(c, t.length.old), history_begin(c, t.end));
  t.index = smaller(t.first, t.end - c.residual - c.group) + t.number * c.group;
  t.place = -1;
  if (t.number < p.tasks && t.index >= t.first && t.index < t.end) {
    const int64_t slot = history_slot(c, t.index), page = page_of(p, t.sample, slot);
    if (page >= 0) t.place = (page * p.m + t.head) * (c.page / c.group) + slot % c.page / c.group;
  }
  return t;
}

// A vector of token t of the group: from the window, or from the call.
template <class T>
VK_DEVICE Vector group_vector(const Params& p, const Store& x, const Task& task, int t, int column) {
  const int64_t index = task.index + t, token = index + p.layout.sinks - task.length.old;
  if (token < 0) {
    const int64_t window = p.layout.residual + p.layout.group;
    const int64_t row = (task.sample * p.m + task.head) * window + index % window;
    return load16(static_cast<const T*>(x.recent) + row * p.d + column);
  }
  if (token >= task.length.count) return {};
  return load_vector(x.from, call_row<T>(x.from, task.sample, token, task.head) + column);
}

// Smallest and largest of a group; a NaN makes the largest infinite.
struct Range {
  float low, high;
};
VK_DEVICE float within_half(float x) { return fminf(fmaxf(x, -kHalfMax), kHalfMax); }
VK_DEVICE void widen_range(Range& r, float x) {
  r.low = fminf(r.low, within_half(x));
  r.high = fmaxf(r.high, x != x ? INFINITY : within_half(x));
}
VK_DEVICE QuantScale scale_of(const Range& r, int bits) {
  const bool bad = r.high > kHalfMax;
  return quant_scale(bad ? NAN : r.low, bad ? NAN : r.high, bits);
}

// 1.5 * 2^23: what is added to it is rounded to an integer, in the lowest bits of the sum.
constexpr float kRounds = 12582912.0f;
VK_DEVICE uint32_t code_of(float x, float zero, float inverse, float top) {
  const float t = fminf(fmaxf((within_half(x) - zero) * inverse, 0.0f), top);  // NaN becomes 0
  return float_bits(t + kRounds) - float_bits(kRounds);
}

// The group's keys in shared memory, rows of whole 8 vectors: vector v of token t lies at v ^ t / 4 % 8, so that
// neighbouring quads of tokens read the same channels from different banks.
VK_DEVICE int key_vector(int row_vectors, int t, int v) { return t * row_vectors + (v ^ t / 4 % 8); }

struct KeyRoom {
  Vector* rows;       // group x row_vectors
  float *low, *high;  // token lanes x d
  float *zero, *inverse;
};
template <class T>
VK_DEVICE KeyRoom key_room(const Params& p) {
  const int each = p.d / kLanesOf<T>, row_vectors = (each + 7) / 8 * 8, token_lanes = kThreads / each;
  KeyRoom r;
  r.rows = reinterpret_cast<Vector*>(shared_memory());
  r.low = reinterpret_cast<float*>(r.rows + p.layout.group * row_vectors);
  r.high = r.low + token_lanes * p.d;
  r.zero = r.high + token_lanes * p.d;
  r.inverse = r.zero + p.d;
  return r;
}

// Rows into shared memory, and every channel's range over the tokens of a token lane.
template <class T>
VK_DEVICE void stage_keys(const Params& p, const Task& task, const KeyRoom& room) {
  constexpr int kWidth = kLanesOf<T>;
  const int each = p.d / kWidth, row_vectors = (each + 7) / 8 * 8, token_lanes = kThreads / each;
  const int v = thread_index() % each, lane = thread_index() / each, group = static_cast<int>(p.layout.group);
  if (lane >= token_lanes) return;
  Range range[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) range[i] = {kHalfMax, -kHalfMax};
  for (int t0 = lane; t0 < group; t0 += kInFlight * token_lanes) {
    Vector x[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
      if (t0 + j * token_lanes < group) x[j] = group_vector<T>(p, p.part[0], task, t0 + j * token_lanes, v * kWidth);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int t = t0 + j * token_lanes;
      if (t >= group) break;
      store_shared(room.rows + key_vector(row_vectors, t, v), x[j]);
      float wide[kWidth];
      widen<T>(x[j], wide);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) widen_range(range[i], wide[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    store_shared(room.low + lane * p.d + v * kWidth + i, range[i].low);
    store_shared(room.high + lane * p.d + v * kWidth + i, range[i].high);
  }
}

template <class T>
VK_DEVICE void scale_keys(const Params& p, const Task& task, const KeyRoom& room) {
  const int token_lanes = kThreads / (p.d / kLanesOf<T>);
  f16* delta = p.part[0].scale + task.place * 2 * p.d;
  for (int c = thread_index(); c < p.d; c += kThreads) {
    Range r{kHalfMax, -kHalfMax};
    for (int lane = 0; lane < token_lanes && lane < p.layout.group; ++lane) {
      r.low = fminf(r.low, load_shared(room.low + lane * p.d + c));
      r.high = fmaxf(r.high, load_shared(room.high + lane * p.d + c));
    }
    const QuantScale s = scale_of(r, static_cast<int>(p.layout.bits));
    store(delta + c, s.delta);
    store(delta + p.d + c, s.zero);
    store_shared(room.zero + c, s.zero_value);
    store_shared(room.inverse + c, s.inverse);
  }
}

// Four tokens and as many channels as fill whole words and whole vectors.
template <class T>
VK_DEVICE void pack_keys(const Params& p, const Task& task, const KeyRoom& room) {
  constexpr int kWidth = kLanesOf<T>, kHalf = kWidth / 2;
  const int bits = static_cast<int>(p.layout.bits), per = 32 / bits, group = static_cast<int>(p.layout.group);
  const int row_vectors = (p.d / kWidth + 7) / 8 * 8, quads = group / 4;
  const int vectors = per > kWidth ? per / kWidth : 1, channels = vectors * kWidth, words = (p.d + per - 1) / per;
  const float top = static_cast<float>((1 << bits) - 1);
  int32_t* codes = p.part[0].codes + task.place * words * group;
  for (int item = thread_index(); item < quads * ((p.d + channels - 1) / channels); item += kThreads) {
    const int t = item % quads * 4, first = item / quads * channels;
    uint32_t word[2][4] = {};  // of the two halves of a vector, which share a word where one takes as many codes
    for (int k = 0; k < vectors && first + k * kWidth < p.d; ++k) {
      const int column = first + k * kWidth;
      float zero[kWidth], inverse[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        zero[i] = load_shared(room.zero + column + i);
        inverse[i] = load_shared(room.inverse + column + i);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float x[kWidth];
        widen<T>(load_shared(room.rows + key_vector(row_vectors, t + j, column / kWidth)), x);
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          word[i / kHalf][j] |= code_of(x[i], zero[i], inverse[i], top) << bits * ((k * kWidth + i) % per);
      }
    }
    Vector low, high;
#pragma unroll
    for (int j = 0; j < 4; ++j) low.word[j] = word[0][j], high.word[j] = word[1][j];
    int32_t* to = codes + first / per * group + t;
    if (per >= kWidth) {
#pragma unroll
      for (int j = 0; j < 4; ++j) low.word[j] |= high.word[j];
    } else {
      store16(to + group, high);
    }
    store16(to, low);
  }
}

// A lane holds as many tokens as share a word, one vector of channels of each: ranges are those of the lanes that hold
// a group of channels, codes stay in registers until their words are full.
template <class T>
VK_DEVICE void code_values(const Params& p, const Task& task) {
  constexpr int kWidth = kLanesOf<T>;
  const Store& x = p.part[1];
  const int bits = static_cast<int>(p.layout.bits), per = 32 / bits, group = static_cast<int>(p.layout.group);
  const int d_pad = (p.d + 15) / 16 * 16, groups = (p.d + group - 1) / group;
  const int lanes = group / kWidth, row = groups * lanes, total = row * (group / per);
  const float top = static_cast<float>((1 << bits) - 1);
  for (int base = 0; base < total; base += kThreads) {
    const int item = base + thread_index(), column = item % row * kWidth, tokens = item / row * per;
    const bool live = item < total, inside = live && column < p.d;
    uint32_t word[kWidth] = {};
    for (int k = 0; k < per; k += kInFlight) {
      Vector raw[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        raw[j] = {};
        if (inside) raw[j] = group_vector<T>(p, x, task, tokens + k + j, column);
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        float v[kWidth];
        widen<T>(raw[j], v);
        Range r{kHalfMax, -kHalfMax};
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          if (inside) widen_range(r, v[i]);
        for (int bit = lanes / 2; bit > 0; bit /= 2) {
          r.low = fminf(r.low, shuffle_xor(r.low, bit));
          r.high = fmaxf(r.high, shuffle_xor(r.high, bit));
        }
        const QuantScale s = scale_of(r, bits);
        if (inside && item % lanes == 0) {
          f16* delta = x.scale + (task.place * 2 * groups + column / group) * group + tokens + k + j;
          store(delta, s.delta);
          store(delta + groups * group, s.zero);
        }
#pragma unroll
        for (int i = 0; i < kWidth; ++i) word[i] |= code_of(v[i], s.zero_value, s.inverse, top) << bits * (k + j);
      }
    }
    if (!live || column >= d_pad) continue;
    int32_t* to = x.codes + (task.place * (group / per) + tokens / per) * d_pad + column;
#pragma unroll
    for (int i = 0; i < kWidth; i += 4)
      store16(to + i, inside ? Vector{{word[i], word[i + 1], word[i + 2], word[i + 3]}} : Vector{});
  }
}

// Tokens of the call, from history index `index` (or position, for the sinks) on, go where they are kept uncoded.
template <class T, class Row>
VK_DEVICE void keep_rows(const Params& p, const Store& x, const Task& task, int64_t token, const Row& row) {
  constexpr int kWidth = kLanesOf<T>;
  const int each = p.d / kWidth;
  for (int i = thread_index(); i < each * p.layout.group; i += kThreads) {
    const int64_t t = i / each, from = token + t;
    T* to = from >= 0 && from < task.length.count ? row(t) : nullptr;
    if (to)
      store16(to + i % each * kWidth,
              load_vector(x.from, call_row<T>(x.from, task.sample, from, task.head) + i % each * kWidth));
  }
}

template <class T>
VK_KERNEL(kThreads, 2)
append_codes(const Params p) {
  const Task task = task_of(p);
  const CacheLayout& c = p.layout;
  const Store& x = p.part[block_y()];
  const int64_t head = task.sample * p.m + task.head, window = c.residual + c.group;
  if (task.number >= p.tasks) {
    const int64_t first = int64_t(task.number - p.tasks) * c.group;
    return keep_rows<T>(p, x, task, first, [&](int64_t t) {
      const int64_t position = task.length.old + first + t;
      return position < c.sinks ? static_cast<T*>(x.sink) + (head * c.sinks + position) * p.d : nullptr;
    });
  }
  if (task.index >= task.end) return;
  if (task.place >= 0 && block_y() == 0) {
    const KeyRoom room = key_room<T>(p);
    stage_keys<T>(p, task, room);
    sync_block();
    scale_keys<T>(p, task, room);
    sync_block();
    pack_keys<T>(p, task, room);
  } else if (task.place >= 0) {
    code_values<T>(p, task);
  }
  sync_block();  // the window is read above and written below
  const int64_t later = task.index + window;
  keep_rows<T>(p, x, task, later + c.sinks - task.length.old, [&](int64_t t) {
    return later + t >= task.end ? static_cast<T*>(x.recent) + (head * window + (later + t) % window) * p.d : nullptr;
  });
}

template <class T>
Store store_of(const TensorRef& x, const TensorRef& rows, const TensorRef& codes, const TensorRef& scale,
               const TensorRef& recent, const TensorRef& sink) {
  bool loose = reinterpret_cast<uintptr_t>(x.data) % sizeof(Vector) != 0;
  for (int dim = 0; dim < 3; ++dim) loose = loose || (x.size(dim) > 1 && x.stride(dim) % kLanesOf<T>);
  return {{x.data, x.stride(0), x.stride(1), x.stride(2), loose},
          rows.data,
          recent.data,
          sink.data,
          codes.ptr<int32_t>(),
          scale.ptr<f16>()};
}

template <class T>
void run(const KvAppendCudaParams& a, const Stream& stream) {
  const CacheRef& c = a.cache;
  Params p{};
  p.part[0] = store_of<T>(a.k, c.k_rows, c.k_codes, c.k_scale, c.k_recent, c.k_sink);
  p.part[1] = store_of<T>(a.v, c.v_rows, c.v_codes, c.v_scale, c.v_recent, c.v_sink);
  p.count = a.count.ptr<const int32_t>(), p.length = c.length, p.table = c.table;
  p.layout = c.layout;
  p.s = a.k.size(1), p.tokens = c.b * p.s;
  p.pages = (c.layout.bits ? c.k_codes : c.k_rows).size(0), p.table_pages = c.table_pages;
  p.m = int(c.m), p.d = int(c.d);
  if (p.tokens == 0) return;
  const int each = p.d / kLanesOf<T>;
  if (c.layout.bits == 0) {
    p.lanes = std::min((p.m * each + 1) / 2, kThreads);
    p.token_lanes = kThreads / p.lanes;
    const int64_t blocks = (p.tokens + p.token_lanes - 1) / p.token_lanes;
    return launch("kv_append, rows", append_rows<T>, {blocks, 1, kThreads}, stream, p);
  }
  const int64_t g = c.layout.group;
  // Groups that s tokens can complete, and those of the window; then the sinks they can fill.
  p.tasks = int(std::max((p.s + g - 1) / g, c.layout.residual / g + 1));
  p.all_tasks = p.tasks + int((std::min(p.s, c.layout.sinks) + g - 1) / g);
  const size_t rows = size_t(g) * size_t((each + 7) / 8 * 8) * sizeof(Vector);
  const size_t floats = size_t(2 * (kThreads / each) + 2) * size_t(p.d);
  launch("kv_append, codes", append_codes<T>, {c.b * c.m * p.all_tasks, 2, kThreads, rows + floats * sizeof(float)},
         stream, p);
}

}  // namespace

void kv_append_cuda(const KvAppendCudaParams& p, const Stream& stream) {
  switch (p.cache.dtype) {
    case Dtype::bf16:
      return run<bf16>(p, stream);
    case Dtype::f16:
      return run<f16>(p, stream);
    default:
      return run<float>(p, stream);
  }
}

}  // namespace vk
