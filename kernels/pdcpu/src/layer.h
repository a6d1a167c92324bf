// Decoder layers of the Llama family on packed weights: a whole run of them in one call.
//
// Between products a row is float32 (the residual stream, q, k, v); what enters a product is rounded to bfloat16
// as it is made, so no pass does only that.
#pragma once

#include "attention.h"

namespace pdcpu {

struct Layer {
    const float* input_norm;  // weight * sqrt(hidden), see rms_norm
    const float* post_norm;
    const float* q_norm;  // weight * sqrt(head_dim), or null
    const float* k_norm;
    Weight qkv, out, gate_up, down;  // gate_up.panels null: the caller computes the MLP
};

struct Model {
    int64_t hidden, heads, kv_heads, head_dim, window;
    float eps, qk_eps;
    const float *cos, *sin;  // [positions][head_dim], see rope.py
    PoolShape pool;
};

struct Step {
    int64_t rows, num_slices, num_tasks;
    const int64_t* positions;
    const int32_t* row_slice;  // which slice a row belongs to
    const Slice* slices;
    const int32_t* tables;
    const Task* tasks;
};

constexpr long ROW_GRAIN = 16;  // rows of a tile in loops over rows

template <class Body>
void over_rows(long rows, Body&& body) {
    parallel((rows + ROW_GRAIN - 1) / ROW_GRAIN, [&](long i) {
        for (long r = i * ROW_GRAIN, end = std::min(rows, (i + 1) * ROW_GRAIN); r < end; r++) body(r);
    });
}

// x * w / sqrt(|x|^2 + eps * size), where w carries sqrt(size). Returns the factor of x * w.
inline float norm_factor(const float* x, long size, float eps) {
    vf squares = zero();
    long i = 0;
    for (; i + W <= size; i += W) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (; i < size; i++) total += x[i] * x[i];
    return 1.0f / std::sqrt(total + eps * float(size));
}

inline void norm_row(const float* x, const float* weight, long size, float eps, float* out) {
    float factor = norm_factor(x, size, eps);
    vf f = splat(factor);
    long i = 0;
    for (; i + W <= size; i += W) store(out + i, mul(mul(load(x + i), load(weight + i)), f));
    for (; i < size; i++) out[i] = x[i] * weight[i] * factor;
}

inline void norm_row_bf16(const float* x, const float* weight, long size, float eps, bf16* out, long out_stride) {
    float factor = norm_factor(x, size, eps);
    vf f = splat(factor);
    long i = 0;
    for (; i + W <= size; i += W) store_bf16(out + i, mul(mul(load(x + i), load(weight + i)), f));
    for (; i < size; i++) out[i] = to_bf16(x[i] * weight[i] * factor);
    for (; i < out_stride; i++) out[i] = 0;
}

// Norm (if given) and rotate one head; head_dim in whole 2 * W.
inline void rotate(float* x, long dim, const float* norm, float eps, const float* cos, const float* sin, bf16* out) {
    if (norm) norm_row(x, norm, dim, eps, x);
    long half = dim / 2;
    for (long i = 0; i < half; i += W) {
        vf low = load(x + i), high = load(x + half + i);
        store_bf16(out + i, fma(high, load(sin + i), mul(low, load(cos + i))));
        store_bf16(out + half + i, fma(low, load(sin + half + i), mul(high, load(cos + half + i))));
    }
}

// q of every row to q[T][heads][head_dim], k and v into the pool.
inline void rope_and_write(const Model& m, const Step& s, const float* q_norm, const float* k_norm, long layer, float* qkv,
                           bf16* q) {
    const long dim = m.head_dim, width = (m.heads + 2 * m.kv_heads) * dim, size = m.pool.block_tokens;
    over_rows(s.rows, [&](long r) {
        float* row = qkv + r * width;
        const float *cos = m.cos + s.positions[r] * dim, *sin = m.sin + s.positions[r] * dim;
        for (long h = 0; h < m.heads; h++)
            rotate(row + h * dim, dim, q_norm, m.qk_eps, cos, sin, q + (r * m.heads + h) * dim);
        long block = s.tables[s.slices[s.row_slice[r]].table + s.positions[r] / size];
        long inside = s.positions[r] % size * dim;
        for (long h = 0; h < m.kv_heads; h++) {
            float *k = row + (m.heads + h) * dim, *v = row + (m.heads + m.kv_heads + h) * dim;
            rotate(k, dim, k_norm, m.qk_eps, cos, sin, m.pool.head(block, layer, 0, h) + inside);
            round_row(v, dim, m.pool.head(block, layer, 1, h) + inside, dim);
        }
    });
}

inline void attend(const Model& m, const Step& s, long layer, const bf16* q, bf16* out, long out_stride) {
    Attention attention{m.pool, layer, m.heads, m.window, s.slices, s.tables, q, out, out_stride};
    // Long tasks come last in a sequence; they start first.
    const long tiles = s.num_tasks * m.kv_heads, last = s.num_tasks - 1;
    parallel(tiles, [&](long i) {
        const Task* next = i + 1 < tiles ? &s.tasks[last - (i + 1) / m.kv_heads] : nullptr;
        attention.attend(s.tasks[last - i / m.kv_heads], i % m.kv_heads, next, (i + 1) % m.kv_heads);
    });
}

// Buffers of one step, from the caller: see `work_bytes`.
struct Work {
    bf16* normed;   // [rows][padded_row(hidden)]
    float* qkv;     // [rows][(heads + 2 kv_heads) * head_dim]
    bf16* q;        // [rows][heads * head_dim]
    bf16* mixed;    // [rows][padded_row(heads * head_dim)]
    bf16* gated;    // [rows][padded_row(ff)]
    long normed_stride, mixed_stride, gated_stride;
};

inline long work_bytes(const Model& m, long rows, long ff, char* base, Work* work) {
    long at = 0;
    auto take = [&](long bytes) {
        char* here = base + at;
        at += (bytes + 63) / 64 * 64;
        return (void*)here;
    };
    long q = m.heads * m.head_dim;
    work->normed_stride = padded_row(m.hidden);
    work->mixed_stride = padded_row(q);
    work->gated_stride = padded_row(ff);
    work->normed = (bf16*)take(2 * rows * work->normed_stride);
    work->qkv = (float*)take(4 * rows * (q + 2 * m.kv_heads * m.head_dim));
    work->q = (bf16*)take(2 * rows * q);
    work->mixed = (bf16*)take(2 * rows * work->mixed_stride);
    work->gated = (bf16*)take(2 * rows * work->gated_stride);
    return at;
}

// Adds one layer to the residual [rows][hidden]. `keep`: rows to go on with once their KV is written (the residual
// then has these rows alone, in its first places); num_keep < 0: all. Returns the number of rows left.
inline long run_layer(const Model& m, const Layer& l, long index, const Step& s, float* residual, const int64_t* keep,
                      long num_keep, const Work& w) {
    long rows = s.rows, q_width = m.heads * m.head_dim;
    over_rows(rows, [&](long r) {
        norm_row_bf16(residual + r * m.hidden, l.input_norm, m.hidden, m.eps, w.normed + r * w.normed_stride,
                      w.normed_stride);
    });
    product(l.qkv, w.normed, w.normed_stride, rows, Result::STORE, w.qkv, l.qkv.outputs);
    rope_and_write(m, s, l.q_norm, l.k_norm, index, w.qkv, w.q);
    if (num_keep == 0) return 0;
    attend(m, s, index, w.q, w.mixed, w.mixed_stride);
    if (num_keep >= 0) {  // ascending, so nothing is overwritten that is still to be read
        for (long i = 0; i < num_keep; i++) {
            if (keep[i] == i) continue;
            std::memcpy(residual + i * m.hidden, residual + keep[i] * m.hidden, sizeof(float) * m.hidden);
            std::memcpy(w.mixed + i * w.mixed_stride, w.mixed + keep[i] * w.mixed_stride, sizeof(bf16) * q_width);
        }
        rows = num_keep;
    }
    product(l.out, w.mixed, w.mixed_stride, rows, Result::ADD, residual, m.hidden);
    if (!l.gate_up.panels) return rows;
    over_rows(rows, [&](long r) {
        norm_row_bf16(residual + r * m.hidden, l.post_norm, m.hidden, m.eps, w.normed + r * w.normed_stride,
                      w.normed_stride);
    });
    product(l.gate_up, w.normed, w.normed_stride, rows, Result::GATED, w.gated, w.gated_stride);
    product(l.down, w.gated, w.gated_stride, rows, Result::ADD, residual, m.hidden);
    return rows;
}

}  // namespace pdcpu
