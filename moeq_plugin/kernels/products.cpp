// Products of packed weights with activations, on CPUs: y = x W^T, W never whole in memory.
//
// Activations are multiplied while codes are looked up. For many of them the caller decodes a strip of
// the weight into the cache and takes a matrix product.
//
// There is no header of torch in here, so that it compiles in seconds; python hands over pointers.
//
// There are three ways: AVX-512 with its byte permutations and products of bfloats, which looks up in
// registers and multiplies several vectors at once; AVX2, which loads centroid by centroid; and plain
// loops for all others. Machines are little endian.

#include "codebooks_wide.h"
#include "grids_wide.h"

namespace {

// Multiply rows of activations, one after the other and in float.
template <typename Weight, typename T>
void times_rows(const Weight& w, const T* x, int64_t rows, T* y, int threads) {
  std::vector<float> from(w.columns), to(w.rows);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < w.columns; ++i) from[i] = float(x[row * w.columns + i]);
    times_vector(w, from.data(), to.data(), threads);
    for (int64_t i = 0; i < w.rows; ++i) y[row * w.rows + i] = T(to[i]);
  }
}

template <typename Weight, typename T>
void times(const Weight& w, const T* x, int64_t rows, T* y, int threads) {
#ifdef WIDE
  if (is_wide(w)) return times_wide(w, x, rows, y, threads);
#endif
  times_rows(w, x, rows, y, threads);
}

// Write what a product of many rows needs of a weight: bfloats fast, where they are what it rounds to.
template <typename Weight, typename T>
void decode_any(const Weight& w, int64_t begin, int64_t end, T* out, int threads) {
#ifdef WIDE
  if constexpr (std::is_same_v<T, Bfloat>)
    if (is_wide(w)) return decode_wide(w, begin, end, out, threads);
#endif
  decode(w, begin, end, out, threads);
}

// Return for how many rows of activations decoding does not pay; measured.
int64_t few(const Codebooks& w) {
#ifdef WIDE
  if (is_wide(w)) return w.rounded == 8 ? 24 : 8;
#endif
  (void)w;
  return 4;
}
int64_t few(const Grid& w) {
#ifdef WIDE
  if (is_wide(w)) return 8;
#endif
  (void)w;
  return 4;
}

}  // namespace

#define MOEQ_FUNCTIONS(kind, Weight)                                                             \
  int64_t moeq_##kind##_few(const Weight* w) { return few(*w); }                                 \
  void moeq_##kind##_times(const Weight* w, const void* x, int64_t rows, void* y, int is_bfloat, \
                           int threads) {                                                        \
    if (is_bfloat)                                                                               \
      times(*w, static_cast<const Bfloat*>(x), rows, static_cast<Bfloat*>(y), threads);          \
    else                                                                                         \
      times(*w, static_cast<const float*>(x), rows, static_cast<float*>(y), threads);            \
  }                                                                                              \
  void moeq_##kind##_decode(const Weight* w, int64_t begin, int64_t end, void* out,              \
                            int is_bfloat, int threads) {                                        \
    if (is_bfloat) decode_any(*w, begin, end, static_cast<Bfloat*>(out), threads);                   \
    else decode_any(*w, begin, end, static_cast<float*>(out), threads);                              \
  }

extern "C" {
MOEQ_FUNCTIONS(codebook, Codebooks)
MOEQ_FUNCTIONS(grid, Grid)
}
