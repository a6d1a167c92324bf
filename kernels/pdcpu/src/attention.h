// Causal attention over a paged pool of bfloat16 keys and values, [block, layer, K/V, kv head, token, head_dim].
//
// Work is cut into (sequence, kv head, up to 64 queries). Keys are taken in panels of 64 positions, aligned in the
// sequence; a panel's keys are packed like a weight's (pairs over head_dim), its values too (pairs over
// positions), so both products are those of product.h. A query's result follows from its own row and the
// sequence alone: it has the same bits in a chunk of a prompt, in another chunking, and as a decode step.
#pragma once

#include "product.h"

namespace pdcpu {

struct PoolShape {
    bf16* data;
    long layers, kv_heads, block_tokens, head_dim;

    // The first token's row of a head; k: 0 keys, 1 values.
    bf16* head(long block, long layer, long k, long kv_head) const {
        return data + (((block * layers + layer) * 2 + k) * kv_heads + kv_head) * block_tokens * head_dim;
    }
};

struct Slice {
    int64_t offset, length, start;  // rows [offset, offset + length) stand at positions from `start`
    int64_t table;                  // where its blocks begin among all tables
};

struct Task {
    int32_t slice, begin, end;  // queries [begin, end) of the slice
};

#if defined(__AVX512F__) && defined(__AVX512BW__)

// 16 rows of 16 dwords at `rows`, to 16 lines of a panel.
inline void transpose16(const uint32_t* const* rows, long column, uint32_t* out, long stride) {
    vi a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i] + column);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        store_pairs(out + i * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        store_pairs(out + (i + 8) * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        store_pairs(out + (i + 4) * stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        store_pairs(out + (i + 12) * stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

#else

inline void transpose16(const uint32_t* const* rows, long column, uint32_t* out, long stride) {
    for (int j = 0; j < 16; j++)
        for (int i = 0; i < 16; i++) out[i * stride + j] = rows[j][column + i];
}

#endif

// The rows of one head at positions [from, from + 64); `zeros` where `count` ends.
inline void find_rows(const PoolShape& pool, const int32_t* table, long layer, long k, long kv_head, long from, long count,
                      const bf16* zeros, const bf16** rows) {
    long size = pool.block_tokens;
    for (long j = 0; j < PANEL;) {
        if (j >= count) {
            rows[j++] = zeros;
            continue;
        }
        long position = from + j, inside = position % size;
        const bf16* head = pool.head(table[position / size], layer, k, kv_head) + inside * pool.head_dim;
        for (long run = std::min(size - inside, count - j); run > 0; run--, head += pool.head_dim) rows[j++] = head;
    }
}

// [pairs of head_dim][64 positions]; head_dim in whole 32. Meanwhile the rows that are next come nearer: a few at a
// time, for a CPU waits when too many are on their way.
inline void pack_keys(const bf16* const* rows, long head_dim, uint32_t* panel, const bf16* const* next) {
    for (long group = 0; group < PANEL; group += 16)
        for (long pair = 0; pair < head_dim / 2; pair += 16) {
            for (long j = 0; j < 16; j++) _mm_prefetch((const char*)(next[group + j] + 2 * pair), _MM_HINT_T1);
            transpose16((const uint32_t* const*)(rows + group), pair, panel + pair * PANEL + group, PANEL);
        }
}

// [pairs of positions][64 dimensions], one panel for every 64 of head_dim, zero behind its end.
inline void pack_values(const bf16* const* rows, long head_dim, uint32_t* panels, const bf16* const* next) {
    for (long column = 0; column < head_dim; column += PANEL) {
        uint32_t* panel = panels + column / PANEL * (PANEL / 2) * PANEL;
        long cols = std::min<long>(PANEL, head_dim - column);
        for (long pair = 0; pair < PANEL / 2; pair++, panel += PANEL) {
            const bf16 *a = rows[2 * pair] + column, *b = rows[2 * pair + 1] + column;
            for (long j = 0; j < cols; j += 32)
                for (long k = 0; k < 2; k++)
                    _mm_prefetch((const char*)(next[2 * pair + k] + column + j), _MM_HINT_T1);
            long j = 0;
            for (; j < cols; j += W) store_pairs(panel + j, join(load_words(a + j), load_words(b + j)));
            for (; j < PANEL; j++) panel[j] = 0;
        }
    }
}

// Scores of some rows against one panel of keys to bfloat16 weights, by the online softmax: running maximum per row,
// and running sums, one for each lane of a vector; `factors` is what a row's sums so far are scaled with. A row sees
// keys [low, high) of the panel, maybe none. Only row by row, in a fixed order within a row: who else is here
// changes no bit.
struct Rows {
    int count;
    int low[TILE_ROWS], high[TILE_ROWS];
    float factors[16];
};

// most: of the scores times `scale`. total: [rows][W].
inline void weigh(Rows& rows, float* scores, float scale, float* most, float* total, bf16* weights) {
    constexpr int VECTORS = PANEL / W;
    alignas(64) float now[16], before[16];
    for (int r = 0; r < rows.count; r++) {
        float* row = scores + r * PANEL;
        bool all = rows.low[r] <= 0 && rows.high[r] >= PANEL;
        vf highest = splat(-INFINITY);
        for (int v = 0; v < VECTORS; v++) {
            vf s = load(row + v * W);
            if (!all) store(row + v * W, s = within(s, rows.low[r] - v * W, rows.high[r] - v * W));
            highest = max(s, highest);
        }
        float found = max_of(highest) * scale;
        before[r] = most[r];
        if (found > most[r]) most[r] = found;
        now[r] = most[r] == -INFINITY ? 0.0f : most[r];  // nothing seen yet: weights of zero, and no NaN
    }
    for (int r = rows.count; r < 16; r++) now[r] = before[r] = 0.0f;
    for (int i = 0; i < 16; i += W) store(rows.factors + i, exp2(sub(load(before + i), load(now + i))));
    for (int r = 0; r < rows.count; r++) {
        vf sums = zero(), down = splat(-now[r]);
        for (int v = 0; v < VECTORS; v++) {
            vf p = exp2_rough(fma(load(scores + r * PANEL + v * W), splat(scale), down));
            sums = add(sums, p);
            store_bf16(weights + r * PANEL + v * W, p);
        }
        store(total + r * W, fma(load(total + r * W), splat(rows.factors[r]), sums));
    }
}

// What one task keeps while it goes over the panels.
struct Running {
    long rows, columns;  // columns: panels of head_dim
    float *sums;         // [columns][rows][64]
    float *total;        // [rows][W]
    float *most;         // [rows]
    float *scores;       // [TILE_ROWS][64], of one tile
    bf16 *queries;       // [rows][head_dim]
    bf16 *weights;       // [TILE_ROWS][64], of one tile
    bf16 *zeros;         // [head_dim]
    uint32_t *keys, *values;  // packed, of up to `GROUP` panels
};

constexpr long GROUP = 8;        // panels that are packed together where there are many rows
constexpr long BLOCK_ROWS = 24;  // that go over a group together: with a panel they fit into the first-level cache

struct Attention {
    PoolShape pool;
    long layer, heads, window;  // window 0: none
    const Slice* slices;
    const int32_t* tables;
    const bf16* q;  // [T][heads][head_dim], rotated
    bf16* out;      // [T] rows of out_stride
    long out_stride;

    long per_kv() const { return heads / pool.kv_heads; }
    long key_words() const { return pool.head_dim / 2 * PANEL; }
    long value_words() const { return (pool.head_dim + PANEL - 1) / PANEL * (PANEL / 2) * PANEL; }

    // The first position of a panel that the task sees.
    long first_panel(const Task& task) const {
        long first_query = slices[task.slice].start + task.begin;
        return window ? std::max<long>(0, first_query - window + 1) / PANEL * PANEL : 0;
    }

    // One tile of the loop; `next` (or null) and its head are who will probably be computed after it.
    void attend(const Task& task, long kv_head, const Task* next, long next_head) const;

    Running begin(const Task& task, long kv_head) const;
    void add_panel(const Task& task, Running& run, long row, long panel, long at) const;
    void finish(const Task& task, long kv_head, const Running& run) const;

    // Where a panel's keys and values lie; `zeros` behind the end of the sequence.
    struct Found {
        const bf16 *keys[PANEL], *values[PANEL];
    };
    void find(const Slice& slice, long panel, long kv_head, const bf16* zeros, Found& found) const {
        long count = std::min<long>(PANEL, slice.start + slice.length - panel);
        find_rows(pool, tables + slice.table, layer, 0, kv_head, panel, count, zeros, found.keys);
        find_rows(pool, tables + slice.table, layer, 1, kv_head, panel, count, zeros, found.values);
    }
};

inline Running Attention::begin(const Task& task, long kv_head) const {
    const Slice& slice = slices[task.slice];
    const long dim = pool.head_dim, group = per_kv();
    Running run;
    run.rows = (task.end - task.begin) * group;
    run.columns = (dim + PANEL - 1) / PANEL;
    run.sums = scratch(size_t(run.rows * (run.columns * PANEL + W + 1)), 0);
    run.total = run.sums + run.rows * run.columns * PANEL;
    run.most = run.total + run.rows * W;
    run.scores = scratch(size_t(TILE_ROWS * PANEL), 1);
    run.keys = (uint32_t*)scratch(size_t((key_words() + value_words()) * (run.rows > BLOCK_ROWS ? GROUP : 1)), 2);
    run.values = run.keys + key_words() * (run.rows > BLOCK_ROWS ? GROUP : 1);
    run.queries = (bf16*)scratch(size_t(run.rows * dim / 2 + dim / 2 + TILE_ROWS * PANEL / 2), 3);
    run.zeros = run.queries + run.rows * dim;
    run.weights = run.zeros + dim;
    std::memset(run.sums, 0, sizeof(float) * run.rows * (run.columns * PANEL + W));
    std::memset(run.zeros, 0, sizeof(bf16) * dim);
    for (long r = 0; r < run.rows; r++) {
        run.most[r] = -INFINITY;
        long t = slice.offset + task.begin + r / group;
        std::memcpy(run.queries + r * dim, q + (t * heads + kv_head * group + r % group) * dim, sizeof(bf16) * dim);
    }
    return run;
}

// One tile of rows from `row` over the panel at position `panel`, packed as number `at` of its group.
inline void Attention::add_panel(const Task& task, Running& run, long row, long panel, long at) const {
    const Slice& slice = slices[task.slice];
    const long dim = pool.head_dim, group = per_kv(), first_query = slice.start + task.begin;
    Rows tile;
    tile.count = int(std::min<long>(TILE_ROWS, run.rows - row));
    for (int r = 0; r < tile.count; r++) {
        long query = first_query + (row + r) / group - panel;  // its position in this panel
        tile.low[r] = window ? int(std::min<long>(PANEL, std::max<long>(0, query - window + 1))) : 0;
        tile.high[r] = int(std::max<long>(0, std::min<long>(PANEL, query + 1)));
    }
    tile_of<0>(tile.count)(run.queries + row * dim, dim, run.keys + at * key_words(), dim / 2, run.scores, true, nullptr);
    weigh(tile, run.scores, LOG2_E / std::sqrt(float(dim)), run.most + row, run.total + row * W, run.weights);
    const long pairs = (tile.high[tile.count - 1] + 1) / 2;  // what no row sees adds nothing
    for (long c = 0; c < run.columns; c++) {
        float* part = run.sums + (c * run.rows + row) * PANEL;
        for (int r = 0; r < tile.count; r++) {
            if (tile.factors[r] == 1.0f) continue;
            vf factor = splat(tile.factors[r]);
            for (int j = 0; j < PANEL; j += W) store(part + r * PANEL + j, mul(load(part + r * PANEL + j), factor));
        }
        const uint32_t* values = run.values + at * value_words() + c * (PANEL / 2) * PANEL;
        tile_of<0>(tile.count)(run.weights, PANEL, values, pairs, part, false, nullptr);
    }
}

inline void Attention::finish(const Task& task, long kv_head, const Running& run) const {
    const long dim = pool.head_dim, group = per_kv();
    for (long r = 0; r < run.rows; r++) {
        long t = slices[task.slice].offset + task.begin + r / group;
        bf16* to = out + t * out_stride + (kv_head * group + r % group) * dim;
        vf factor = splat(1.0f / sum(load(run.total + r * W)));
        for (long j = 0; j < dim; j += W)
            store_bf16(to + j, mul(load(run.sums + (j / PANEL * run.rows + r) * PANEL + j % PANEL), factor));
    }
}

inline void Attention::attend(const Task& task, long kv_head, const Task* next, long next_head) const {
    const Slice& slice = slices[task.slice];
    const long group = per_kv(), first_query = slice.start + task.begin, last_query = slice.start + task.end - 1;
    Running run = begin(task, kv_head);
    Found both[2];
    Found *now = &both[0], *later = &both[1];
    find(slice, first_panel(task), kv_head, run.zeros, *now);
    const long together = run.rows > BLOCK_ROWS ? GROUP : 1;
    for (long first = first_panel(task); first <= last_query; first += together * PANEL) {
        const long count = std::min(together, (last_query - first) / PANEL + 1);
        for (long at = 0; at < count; at++) {
            long after = first + (at + 1) * PANEL;
            if (after <= last_query) find(slice, after, kv_head, run.zeros, *later);
            else if (next) find(slices[next->slice], first_panel(*next), next_head, run.zeros, *later);
            else *later = *now;
            pack_keys(now->keys, pool.head_dim, run.keys + at * key_words(), later->keys);
            pack_values(now->values, pool.head_dim, run.values + at * value_words(), later->values);
            std::swap(now, later);
        }
        for (long block = 0; block < run.rows; block += BLOCK_ROWS)
            for (long at = 0; at < count; at++)
                for (long row = block; row < std::min(run.rows, block + BLOCK_ROWS); row += TILE_ROWS) {
                    long last_row = std::min(row + TILE_ROWS, run.rows) - 1, panel = first + at * PANEL;
                    if (first_query + last_row / group < panel) continue;  // all of them end before it
                    add_panel(task, run, row, panel, at);
                }
    }
    finish(task, kv_head, run);
}

}  // namespace pdcpu
