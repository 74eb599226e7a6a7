// Eight columns of a row at once, of float32 or bfloat16, and the last ones of a row.
#include <immintrin.h>
#include <stdint.h>

typedef int64_t Int;
typedef __m256 Floats;           // of eight columns
struct Half { uint16_t bits; };  // bfloat16

static const Int LANES = 8;

static inline Floats widened(__m128i halves) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
static inline __m128i narrowed(Floats x) {  // to the nearest, ties to even; NaN stays NaN
  const __m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i safe = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i high = _mm256_srli_epi32(safe, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
static inline Floats as_kept(Floats x, const float *) { return x; }
static inline Floats as_kept(Floats x, const Half *) { return widened(narrowed(x)); }

struct Whole {
  Floats get(const float *p) const { return _mm256_loadu_ps(p); }
  Floats get(const Half *p) const { return widened(_mm_loadu_si128((const __m128i *)p)); }
  void put(float *p, Floats x) const { _mm256_storeu_ps(p, x); }
  void put(Half *p, Floats x) const { _mm_storeu_si128((__m128i *)p, narrowed(x)); }
};
struct Part {  // zeros are read for what is not there, and it is not written
  int count;
  __m256i mask;
  explicit Part(Int columns) : count((int)columns) {
    mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  Floats get(const float *p) const { return _mm256_maskload_ps(p, mask); }
  void put(float *p, Floats x) const { _mm256_maskstore_ps(p, mask, x); }
  Floats get(const Half *p) const {
    Half own[8] = {};
    for (int i = 0; i < count; i++) own[i] = p[i];
    return Whole().get(own);
  }
  void put(Half *p, Floats x) const {
    Half own[8];
    Whole().put(own, x);
    for (int i = 0; i < count; i++) p[i] = own[i];
  }
};
template <class Body> static inline void for_columns(Int j, Int end, const Body &body) {
  for (; j + LANES <= end; j += LANES) body(j, Whole());
  if (j < end) body(j, Part(end - j));
}
static inline float sum(Floats x) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
static inline Int least(Int a, Int b) { return a < b ? a : b; }
