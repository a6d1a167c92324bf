// Vectors of float32 and the conversions to and from bfloat16, for the instruction sets that pdcpu knows.
//
// W lanes of a vector `vf`. Everything above this file is written once, in terms of these functions.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pdcpu {

using bf16 = uint16_t;

constexpr int PANEL = 64;  // outputs of a packed panel of weights, keys of a panel of attention

inline float from_bf16(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline bf16 to_bf16(float x) {  // to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40);
    return bf16((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__) && defined(__AVX512BW__)

constexpr int W = 16;
using vf = __m512;
using vi = __m512i;

inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline vf splat(float x) { return _mm512_set1_ps(x); }
inline vf zero() { return _mm512_setzero_ps(); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf nearest(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float sum(vf a) { return _mm512_reduce_add_ps(a); }
inline float max_of(vf a) { return _mm512_reduce_max_ps(a); }
// a where x >= limit or x is NaN, else 0
inline vf where_ge(vf x, vf limit, vf a) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), a);
}
// a in lanes [low, high), minus infinity in the others
inline vf within(vf a, int low, int high) {
    vi lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __mmask16 seen = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(low)) & _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(high));
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, a);
}
// a * 2 ** n for whole n
inline vf scale_by(vf a, vf n) { return _mm512_scalef_ps(a, n); }
// The same where x >= limit or x is NaN, else 0; n are the low bits of `magic`, and nothing overflows.
inline vf scale_where_ge(vf x, vf limit, vf a, vf magic) {
    vi n = _mm512_slli_epi32(_mm512_castps_si512(magic), 23);
    __mmask16 seen = _mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(seen, _mm512_castps_si512(a), n));
}

inline vi load_words(const bf16* p) {  // 16 bf16, each in the low half of a lane
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
inline vi join(vi low, vi high) { return _mm512_or_si512(low, _mm512_slli_epi32(high, 16)); }
inline void store_pairs(uint32_t* p, vi x) { _mm512_storeu_si512(p, x); }
inline vf load_bf16(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(load_words(p), 16)); }

inline void store_bf16(bf16* p, vf x) {
#if defined(__AVX512BF16__)
    __m256bh y = _mm512_cvtneps_pbh(x);
    std::memcpy(p, &y, 32);
#else
    vi bits = _mm512_castps_si512(x);
    vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    vi rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    vi quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}

#else  // AVX2 and FMA

constexpr int W = 8;
using vf = __m256;
using vi = __m256i;

inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
inline vf splat(float x) { return _mm256_set1_ps(x); }
inline vf zero() { return _mm256_setzero_ps(); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm256_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf nearest(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float sum(vf a) {
    alignas(32) float t[W];
    _mm256_store_ps(t, a);
    return ((t[0] + t[4]) + (t[1] + t[5])) + ((t[2] + t[6]) + (t[3] + t[7]));
}
inline float max_of(vf a) {
    alignas(32) float t[W];
    _mm256_store_ps(t, a);
    float m = t[0];
    for (int i = 1; i < W; i++) m = t[i] > m ? t[i] : m;
    return m;
}
inline vf where_ge(vf x, vf limit, vf a) { return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_NLT_UQ), a); }
inline vf within(vf a, int low, int high) {
    vi lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    vi hidden = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(low), lane),
                                _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(high - 1)));
    return _mm256_blendv_ps(a, _mm256_set1_ps(-INFINITY), _mm256_castsi256_ps(hidden));
}
inline vf scale_by(vf a, vf n) {  // n in [-126, 127]
    vi exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}

inline vf scale_where_ge(vf x, vf limit, vf a, vf magic) {
    vi n = _mm256_slli_epi32(_mm256_castps_si256(magic), 23);
    return where_ge(x, limit, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), n)));
}

inline vi load_words(const bf16* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline vi join(vi low, vi high) { return _mm256_or_si256(low, _mm256_slli_epi32(high, 16)); }
inline void store_pairs(uint32_t* p, vi x) { _mm256_storeu_si256((__m256i*)p, x); }
inline vf load_bf16(const bf16* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(load_words(p), 16)); }

inline void store_bf16(bf16* p, vf x) {
    vi bits = _mm256_castps_si256(x);
    vi odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    vi rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    vi quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    vi nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}

#endif

// 2 ** x for x <= 127; exactly 1 at 0, exactly 0 below -126, NaN of a NaN. Relative error below 2 ** -22.
// The polynomial is that of exp(r ln 2) on [-1/2, 1/2], its Taylor coefficients ln(2)^k / k!.
inline vf exp2(vf x) {
    const vf low = splat(-126.0f);
    vf n = nearest(min(max(x, low), splat(127.0f)));
    vf r = sub(x, n);
    vf p = splat(1.5403530e-4f);
    p = fma(p, r, splat(1.3333558e-3f));
    p = fma(p, r, splat(9.6181291e-3f));
    p = fma(p, r, splat(5.5504109e-2f));
    p = fma(p, r, splat(2.4022651e-1f));
    p = fma(p, r, splat(6.9314718e-1f));
    p = fma(p, r, splat(1.0f));
    return where_ge(x, low, scale_by(p, n));
}

// 2 ** x for x <= 1 with a relative error below 5e-6, for what is rounded to bfloat16 next; 0 below -125, NaN of a
// NaN. The polynomial interpolates 2 ** r at the Chebyshev nodes of [-1/2, 1/2].
inline vf exp2_rough(vf x) {
    const vf shift = splat(12582912.0f);  // 1.5 * 2 ** 23: adding it leaves the whole number in the low bits
    vf magic = add(x, shift);
    vf r = sub(x, sub(magic, shift));
    vf p = splat(0.00966636837f);
    p = fma(p, r, splat(0.0559219755f));
    p = fma(p, r, splat(0.240223497f));
    p = fma(p, r, splat(0.693121016f));
    p = fma(p, r, splat(1.0f));
    return scale_where_ge(x, splat(-125.0f), p, magic);
}

constexpr float LOG2_E = 1.44269504f;

// x / (1 + exp(-x)); a NaN stays one, for x is a factor
inline vf silu(vf x) {
    vf e = exp2(min(mul(x, splat(-LOG2_E)), splat(126.0f)));
    return div(x, add(splat(1.0f), e));
}

}  // namespace pdcpu
