// The C interface of pdcpu; see kernels/pdcpu/library.py, which declares the same for ctypes.
//
// Nothing here checks its arguments: the Python wrappers do. Calls from several threads are safe as long as their
// outputs differ.
#include "layer.h"

using namespace pdcpu;

extern "C" {

// Raised with every change of a signature or of a layout below.
int32_t pd_abi(void) { return 2; }

const char* pd_instructions(void) {
#if defined(__AVX512BF16__)
    return "avx512_bf16";
#elif defined(__AVX512F__)
    return "avx512";
#else
    return "avx2";
#endif
}

// Helpers of this process: the core of each (-1: any), and for each the addresses of bytes that say whether
// the core's owners are busy: owners[first_owner[i]] up to owners[first_owner[i + 1]].
void pd_set_helpers(int32_t count, const int32_t* cpus, const int32_t* first_owner, const uint8_t* const* owners) {
    std::vector<HelperSpec> helpers(count);
    for (int i = 0; i < count; i++) {
        helpers[i].cpu = cpus[i];
        for (int j = first_owner[i]; j < first_owner[i + 1]; j++) helpers[i].owners.push_back(owners[j]);
    }
    pool().set_helpers(std::move(helpers));
}

// What a fresh `Patience` would say after each of these loops: 1 where helpers on borrowed cores rest. For tests.
void pd_patience(int64_t count, const int64_t* shared, const int64_t* waited, const int64_t* at, uint8_t* rests) {
    Patience patience;
    for (int64_t i = 0; i < count; i++) {
        patience.note(shared[i], waited[i], at[i]);
        rests[i] = patience.rests(at[i]);
    }
}

int64_t pd_packed_bytes(int64_t outputs, int64_t inputs) {
    return (outputs + PANEL - 1) / PANEL * PANEL * ((inputs + 1) / 2) * 4;
}

void pd_pack(const bf16* weight, int64_t row_stride, int64_t outputs, int64_t inputs, uint32_t* packed) {
    long panels = (outputs + PANEL - 1) / PANEL, pairs = (inputs + 1) / 2;
    parallel(panels, [&](long p) {
        pack_panel(weight + p * PANEL * row_stride, row_stride, std::min<long>(PANEL, outputs - p * PANEL), inputs,
                   packed + p * pairs * PANEL);
    });
}

// out[rows][outputs] = x[rows][inputs] . weight^T + bias, all float32, x rounded to bfloat16.
// work: 2 * rows * pd_padded_row(inputs) bytes.
void pd_linear(const Weight* weight, const float* x, int64_t x_stride, int64_t rows, float* out, bf16* work) {
    long stride = padded_row(weight->inputs);
    over_rows(rows, [&](long r) { round_row(x + r * x_stride, weight->inputs, work + r * stride, stride); });
    product(*weight, work, stride, rows, Result::STORE, out, weight->outputs);
}

int64_t pd_padded_row(int64_t inputs) { return padded_row(inputs); }

// The norm of x and the logits of it; work as pd_linear.
void pd_norm_linear(const Weight* weight, const float* x, const float* norm, float eps, int64_t rows, float* out,
                    bf16* work) {
    long stride = padded_row(weight->inputs), size = weight->inputs;
    over_rows(rows, [&](long r) { norm_row_bf16(x + r * size, norm, size, eps, work + r * stride, stride); });
    product(*weight, work, stride, rows, Result::STORE, out, weight->outputs);
}

int64_t pd_work_bytes(const Model* model, int64_t rows, int64_t ff) {
    Work work;
    return work_bytes(*model, rows, ff, nullptr, &work);
}

// Layers [first, last) in turn. `keep` (num_keep < 0: all) is of the last of them; returns the rows left.
int64_t pd_layers(const Model* model, const Layer* layers, int64_t first, int64_t last, int64_t ff, const Step* step,
                  float* residual, const int64_t* keep, int64_t num_keep, char* memory) {
    Work work;
    work_bytes(*model, step->rows, ff, memory, &work);
    long rows = step->rows;
    for (long i = first; i < last; i++)
        rows = run_layer(*model, layers[i], i, *step, residual, keep, i + 1 == last ? num_keep : -1, work);
    return rows;
}

// For layers that are computed one operation at a time.
void pd_rope_and_write(const Model* model, const Step* step, const float* q_norm, const float* k_norm, int64_t layer,
                       float* qkv, bf16* q) {
    rope_and_write(*model, *step, q_norm, k_norm, layer, qkv, q);
}

void pd_attention(const Model* model, const Step* step, int64_t layer, const bf16* q, bf16* out) {
    attend(*model, *step, layer, q, out, model->heads * model->head_dim);
}

}  // extern "C"
