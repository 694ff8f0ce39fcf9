// Backward of the epilogue: rows are gathered again rather than saved. One task is one of a fixed number of row chunks,
// with its own sums for the parameters, so results do not depend on the thread count.
#include "rows.h"

namespace vk::VK_ISA {
namespace {

template <class T>
void backward_rows(const RearrangeRowsBwdParams& q) {
  const RearrangeRowsParams& p = q.forward;
  const Rows rows(p);
  const int64_t b = q.dy.size(0), n_out = q.dy.size(1), c = q.dy.size(2), chunks = q.partial.size(0);
  const int64_t padded = (c + kLanes - 1) / kLanes * kLanes;
  const float* bias = p.bias.given ? p.bias.ptr<const float>() : nullptr;
  const float* gate = p.gate.given ? p.gate.ptr<const float>() : nullptr;
  const float* norm_weight = p.norm_weight.given ? p.norm_weight.ptr<const float>() : nullptr;
  const float inverse_c = 1.0f / static_cast<float>(c);
  parallel_tasks(chunks, [&](int64_t chunk) {
    float* v = static_cast<float*>(scratch(0, static_cast<size_t>(padded) * 16));
    float *u = v + padded, *g = u + padded, *extra = g + padded;
    float* sums = q.partial.ptr<float>() + chunk * q.partial.stride(0);
    float *dbias = sums, *dgate = sums + c, *dweight = sums + 2 * c, *dnorm_bias = sums + 3 * c;
    for (int64_t i = 0; i < 4 * c; ++i) sums[i] = 0.0f;
    const int64_t begin = b * n_out * chunk / chunks, end = b * n_out * (chunk + 1) / chunks;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / n_out, row = task % n_out;
      reduce_taps<T>(rows, batch, taps_of(p, batch, row), p.reduce, v, c);
      load_row(q.dy, batch, row, g);
      if (p.norm) {
        memcpy(u, v, static_cast<size_t>(c) * 4);
        if (p.residual.given) load_row(p.residual, batch, row, extra);
        add_scale(p, p.residual.given ? extra : nullptr, u, c);
        const Stats s = stats_of(u, c, p.norm, p.eps);
        // du = rstd * (g w - mean(g w) - xhat mean(g w xhat)); RMS has no mean term.
        f32v total = f32v{}, dot = f32v{};
        for (int64_t i = 0; i < c; i += kLanes) {
          const int64_t n = c - i;
          const f32v xhat = (load(u + i, n) - s.mean) * s.rstd;
          const f32v dy = load(g + i, n);
          const f32v dxhat = norm_weight ? dy * load(norm_weight + i, n) : dy;
          store(dweight + i, load(dweight + i, n) + dy * xhat, n);
          store(dnorm_bias + i, load(dnorm_bias + i, n) + dy, n);
          total = total + dxhat;  // lanes past c hold dy = 0
          dot = dot + dxhat * xhat;
          store(u + i, xhat, n);
          store(g + i, dxhat, n);
        }
        const float mean_g = p.norm == 1 ? reduce_add(total) * inverse_c : 0.0f;
        const float mean_gx = reduce_add(dot) * inverse_c;
        for (int64_t i = 0; i < c; i += kLanes)
          store(g + i, (load(g + i, c - i) - mean_g - load(u + i, c - i) * mean_gx) * s.rstd, c - i);
      }
      if (q.dsum.given) {
        load_row(q.dsum, batch, row, extra);
        for (int64_t i = 0; i < c; ++i) g[i] += extra[i];
      }
      store_row(q.du, batch, row, g, false);
      for (int64_t i = 0; i < c; i += kLanes) {
        const int64_t n = c - i;
        const f32v du = load(g + i, n) * p.scale;
        const f32v before = bias ? load(v + i, n) + load(bias + i, n) : load(v + i, n);
        const f32v dv = gate ? du * load(gate + i, n) : du;
        store(dgate + i, load(dgate + i, n) + du * before, n);
        store(dbias + i, load(dbias + i, n) + dv, n);
        store(g + i, dv, n);
      }
      if (q.dv.given) store_row(q.dv, batch, row, g, false);
    }
  });
}

template <class T>
void backward_max(const RearrangeMaxBwdParams& p) {
  const int64_t b = p.dy.size(0), n_out = p.dy.size(1), c = p.dy.size(2);
  const int64_t blocks = (c + kLanes - 1) / kLanes;
  // A task owns kLanes channels of a sample: no two tasks add to the same element. Equal maxima share.
  parallel_for(0, b * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / blocks, at = task % blocks * kLanes, n = c - at;
      const int64_t i = p.idx.size(0) == 1 ? 0 : batch;
      const int32_t* idx = p.idx.ptr<const int32_t>() + i * p.idx.stride(0);
      const int32_t* ptr = p.ptr.ptr<const int32_t>() + i * p.ptr.stride(0);
      const T* x = p.x.ptr<const T>() + batch * p.x.stride(0) + at;
      float* dx = p.dx.ptr<float>() + batch * p.dx.stride(0) + at;
      for (int64_t row = 0; row < n_out; ++row) {
        const int32_t first = ptr[row], last = ptr[row + 1];
        if (first >= last) continue;
        f32v best = load(x + idx[first] * p.x.stride(1), n);
        for (int32_t k = first + 1; k < last; ++k) {
          const f32v value = load(x + idx[k] * p.x.stride(1), n);
          best = value > best ? value : best;
        }
        f32v ties = f32v{};
        for (int32_t k = first; k < last; ++k)
          ties = ties + (load(x + idx[k] * p.x.stride(1), n) == best ? splat(1.0f) : f32v{});
        f32v dy;
        with_type(p.dy.dtype, [&](auto type) {
          using D = decltype(type);
          dy = load(p.dy.ptr<const D>() + batch * p.dy.stride(0) + row * p.dy.stride(1) + at, n);
        });
        const f32v share = dy / max(ties, splat(1.0f));
        for (int32_t k = first; k < last; ++k) {
          float* to = dx + idx[k] * p.dx.stride(1);
          const f32v hit = load(x + idx[k] * p.x.stride(1), n) == best ? share : f32v{};
          store(to, load(to, n) + hit, n);
        }
      }
    }
  });
}

}  // namespace

void rearrange_rows_bwd(const RearrangeRowsBwdParams& p) {
  with_type(p.forward.x[0].dtype, [&](auto type) { backward_rows<decltype(type)>(p); });
}

void rearrange_max_bwd(const RearrangeMaxBwdParams& p) {
  if (p.dy.numel() == 0) return;
  with_type(p.x.dtype, [&](auto type) { backward_max<decltype(type)>(p); });
}

}  // namespace vk::VK_ISA
