// Products with packed bfloat16 weights: y = x . weight^T, float32 sums.
//
// A weight [N, K] is kept as panels of 64 outputs. Within a panel, K runs in pairs: one line of 64 dwords per
// pair, dword j holding (w[j][2i], w[j][2i + 1]); the dpbf16 instruction multiplies and adds such pairs.
//
//   panel 0: | pair 0: 64 dwords | pair 1: 64 dwords | ... | pair K/2 - 1 |   panel 1: ...
//
// Every sum is one chain over K in order, whatever the number of rows and the blocking: the chain is carried from
// one block of K to the next in float32. So a row's result has the same bits alone and among others.
#pragma once

#include <algorithm>
#include <vector>

#include "pool.h"
#include "simd.h"

namespace pdcpu {

constexpr int STREAM = 4;  // lines of a pair

struct Weight {
    const uint32_t* panels;
    const float* bias;  // or null
    long outputs;
    long inputs;

    long pairs() const { return (inputs + 1) / 2; }
    long num_panels() const { return (outputs + PANEL - 1) / PANEL; }
    const uint32_t* panel(long p) const { return panels + p * pairs() * PANEL; }
};

// Elements between rows of bfloat16 activations: whole vectors, and no power of two, which would make rows share
// cache sets.
inline long padded_row(long inputs) { return (inputs + 31) / 32 * 32 + 32; }

// LINES lines of `ahead` for every pair: all that a pass reads, and into the first-level cache; or a part of what
// the next pass will read, and into the second, for the first is full of what is read again and again now.
template <int LINES>
inline void prefetch(const char* ahead, long pair) {
    for (int i = 0; i < LINES; i++)
        if (LINES == STREAM) _mm_prefetch(ahead + (pair * LINES + i) * 64, _MM_HINT_T0);
        else _mm_prefetch(ahead + (pair * LINES + i) * 64, _MM_HINT_T1);
}

#if defined(__AVX512BF16__)

constexpr int TILE_ROWS = 6;

// c[R][64] (+)= a[R] . panel over `pairs` pairs.
template <int R, int PREFETCH>
void tile(const bf16* a, long a_stride, const uint32_t* panel, long pairs, float* c, bool fresh, const char* ahead) {
    vf acc[R][4];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 4; v++) acc[r][v] = fresh ? zero() : load(c + r * PANEL + v * W);
    for (long i = 0; i < pairs; i++) {
        __m512bh b[4];
        for (int v = 0; v < 4; v++) b[v] = (__m512bh)_mm512_loadu_si512(panel + i * PANEL + v * W);
        prefetch<PREFETCH>(ahead, i);
        for (int r = 0; r < R; r++) {
            int pair;
            std::memcpy(&pair, a + r * a_stride + 2 * i, 4);
            __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < 4; v++) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, b[v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 4; v++) store(c + r * PANEL + v * W, acc[r][v]);
}

#else  // pairs are taken apart by shifts and multiplied in float32

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int TILE_ROWS = 4;
constexpr int COLUMNS = 4;  // vectors of a row's sums in registers
inline void take_apart(vi x, vf& low, vf& high) {
    low = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    high = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u))));
}
inline vi load_pairs(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline vi splat_pair(int x) { return _mm512_set1_epi32(x); }
#else
constexpr int TILE_ROWS = 2;
constexpr int COLUMNS = 4;
inline void take_apart(vi x, vf& low, vf& high) {
    low = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    high = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000u))));
}
inline vi load_pairs(const uint32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline vi splat_pair(int x) { return _mm256_set1_epi32(x); }
#endif

template <int R, int PREFETCH>
void tile(const bf16* a, long a_stride, const uint32_t* panel, long pairs, float* c, bool fresh, const char* ahead) {
    for (int column = 0; column < PANEL; column += COLUMNS * W) {
        vf acc[R][COLUMNS];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < COLUMNS; v++) acc[r][v] = fresh ? zero() : load(c + r * PANEL + column + v * W);
        for (long i = 0; i < pairs; i++) {
            if (column == 0) prefetch<PREFETCH>(ahead, i);
            vf x0[R], x1[R];
            for (int r = 0; r < R; r++) {
                int pair;
                std::memcpy(&pair, a + r * a_stride + 2 * i, 4);
                take_apart(splat_pair(pair), x0[r], x1[r]);
            }
            for (int v = 0; v < COLUMNS; v++) {
                vf w0, w1;
                take_apart(load_pairs(panel + i * PANEL + column + v * W), w0, w1);
                for (int r = 0; r < R; r++) acc[r][v] = fma(x1[r], w1, fma(x0[r], w0, acc[r][v]));
            }
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < COLUMNS; v++) store(c + r * PANEL + column + v * W, acc[r][v]);
    }
}

#endif

using TileFn = void (*)(const bf16*, long, const uint32_t*, long, float*, bool, const char*);

template <int PREFETCH>
inline TileFn tile_of(int rows) {
    static const TileFn by_rows[] = {
        nullptr,           tile<1, PREFETCH>,
        tile<2, PREFETCH>,
#if defined(__AVX512F__)
        tile<3, PREFETCH>, tile<4, PREFETCH>,
#endif
#if defined(__AVX512BF16__)
        tile<5, PREFETCH>, tile<6, PREFETCH>,
#endif
    };
    return by_rows[rows];
}

constexpr long BLOCK_PAIRS = 96;     // a block of a panel: 24 KiB of a first-level cache of 32
constexpr long STREAM_AHEAD = 4096;  // bytes, where a panel is read once

// c[rows][64] = a . panel. Prefetches what follows the panel in memory.
inline void panel_product(const bf16* a, long a_stride, long rows, const uint32_t* panel, long pairs, float* c) {
    if (rows <= TILE_ROWS) {
        tile_of<STREAM>(int(rows))(a, a_stride, panel, pairs, c, true, (const char*)panel + STREAM_AHEAD);
        return;
    }
    long tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (long first = 0; first < pairs; first += BLOCK_PAIRS) {
        long count = std::min(BLOCK_PAIRS, pairs - first);
        const uint32_t* block = panel + first * PANEL;
        const char* next = (const char*)(block + count * PANEL);
        long per_pair = tiles <= 3 ? 2 : 1, fetched = 0;
        // Tiles of nearly the same height.
        for (long t = 0, row = 0; t < tiles; t++) {
            int height = int((rows - row + (tiles - t) - 1) / (tiles - t));
            const bf16* from = a + row * a_stride + 2 * first;
            const char* ahead = next + fetched * 64;
            TileFn run = fetched >= STREAM * BLOCK_PAIRS ? tile_of<0>(height)
                         : per_pair == 2             ? tile_of<2>(height)
                                                     : tile_of<1>(height);
            run(from, a_stride, block, count, c + row * PANEL, first == 0, ahead);
            fetched += per_pair * count;
            row += height;
        }
    }
}

// One panel of a weight [N, K] in row-major bfloat16, `row_stride` elements apart; what is outside is zero.
inline void pack_panel(const bf16* weight, long row_stride, long outputs, long inputs, uint32_t* panel) {
    long pairs = (inputs + 1) / 2;
    for (long first = 0; first < pairs; first += 32) {  // short runs of many rows: stays in the cache
        long end = std::min(pairs, first + 32);
        for (long j = 0; j < PANEL; j++) {
            if (j >= outputs) {
                for (long i = first; i < end; i++) panel[i * PANEL + j] = 0;
                continue;
            }
            const bf16* row = weight + j * row_stride;
            for (long i = first; i < end; i++) {
                uint32_t high = 2 * i + 1 < inputs ? row[2 * i + 1] : 0;
                panel[i * PANEL + j] = uint32_t(row[2 * i]) | (high << 16);
            }
        }
    }
}

// float32 rows to padded bfloat16 rows, zero behind the end.
inline void round_row(const float* x, long size, bf16* out, long out_stride) {
    long i = 0;
    for (; i + W <= size; i += W) store_bf16(out + i, load(x + i));
    for (; i < size; i++) out[i] = to_bf16(x[i]);
    for (; i < out_stride; i++) out[i] = 0;
}

// Scratch of this thread, at least `size` floats, at a cache line. `which`: of SCRATCHES that do not overlap.
constexpr int SCRATCHES = 5;
inline float* scratch(size_t size, int which) {
    static thread_local std::vector<float> kept[SCRATCHES];
    if (kept[which].size() < size + 16) kept[which].resize(size + 16);
    return (float*)(((uintptr_t)kept[which].data() + 63) & ~uintptr_t(63));
}

enum class Result {
    STORE,  // out (float32) = y + bias
    ADD,    // out (float32) += y + bias
    GATED,  // out (bfloat16) = silu(y of the first half of the outputs) * y of the second
};

inline void finish(const float* c, long rows, long cols, const float* bias, Result result, float* out, long stride) {
    for (long r = 0; r < rows; r++, c += PANEL, out += stride) {
        long j = 0;
        for (; j + W <= cols; j += W) {
            vf y = load(c + j);
            if (bias) y = add(y, load(bias + j));
            if (result == Result::ADD) y = add(load(out + j), y);
            store(out + j, y);
        }
        for (; j < cols; j++) {
            float y = bias ? c[j] + bias[j] : c[j];
            out[j] = result == Result::ADD ? out[j] + y : y;
        }
    }
}

inline void finish_gated(const float* gate, const float* up, long rows, const float* gate_bias, const float* up_bias,
                         bf16* out, long stride) {
    for (long r = 0; r < rows; r++, gate += PANEL, up += PANEL, out += stride)
        for (long j = 0; j < PANEL; j += W) {
            vf g = load(gate + j), u = load(up + j);
            if (gate_bias) g = add(g, load(gate_bias + j)), u = add(u, load(up_bias + j));
            store_bf16(out + j, mul(silu(g), u));
        }
}

constexpr long BLOCK_BYTES = 384 << 10;  // of activations: with the sums, they stay in the second-level cache
constexpr long GRAIN_BYTES = 128 << 10;  // of weights in one tile of the loop, where there are few rows

// rows of a (bfloat16, zero from `inputs` to a_stride) times the weight. GATED: outputs / 2 in whole panels.
inline void product(const Weight& w, const bf16* a, long a_stride, long rows, Result result, void* out, long out_stride) {
    bool gated = result == Result::GATED;
    long pairs = w.pairs(), panels = gated ? w.num_panels() / 2 : w.num_panels();
    long most = std::max<long>(TILE_ROWS, BLOCK_BYTES / (2 * a_stride));
    long blocks = (rows + most - 1) / most;
    long height = blocks ? (rows + blocks - 1) / blocks : 0;
    long grain = std::max<long>(1, GRAIN_BYTES / (pairs * PANEL * 4));
    grain = std::max<long>(1, std::min(grain, panels / (4 * pool().num_threads())));
    long runs = (panels + grain - 1) / grain;
    parallel(blocks * runs, [&](long i) {
        long first = i / runs * height, count = std::min(height, rows - first);
        if (count <= 0) return;
        const bf16* from = a + first * a_stride;
        float* c = scratch(size_t(height) * PANEL, 0);
        long end = std::min(panels, (i % runs + 1) * grain);
        for (long p = i % runs * grain; p < end; p++) {
            panel_product(from, a_stride, count, w.panel(p), pairs, c);
            const float* bias = w.bias ? w.bias + p * PANEL : nullptr;
            if (gated) {
                float* up = scratch(size_t(height) * PANEL, 1);
                panel_product(from, a_stride, count, w.panel(p + panels), pairs, up);
                bf16* to = (bf16*)out + first * out_stride + p * PANEL;
                finish_gated(c, up, count, bias, bias ? bias + panels * PANEL : nullptr, to, out_stride);
            } else {
                long cols = std::min<long>(PANEL, w.outputs - p * PANEL);
                finish(c, count, cols, bias, result, (float*)out + first * out_stride + p * PANEL, out_stride);
            }
        }
    });
}

}  // namespace pdcpu
