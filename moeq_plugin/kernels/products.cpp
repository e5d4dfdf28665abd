// Products of packed weights with activations, on CPUs: y = x W^T, W never whole in memory.
//
// Activations are multiplied while codes are looked up. For many of them the caller decodes a strip of
// the weight into the cache and takes a matrix product.
//
// There is no header of torch in here, so that it compiles in seconds; python hands over pointers.
//
// There are three ways: AVX-512 with its byte permutations and products of bfloats, which looks up in
// registers and multiplies several vectors at once; AVX2, which looks up likewise or
// loads centroid by centroid; and plain loops for all others. Machines are little endian.

#include "codebooks_avx2.h"
#include "codebooks_wide.h"
#include "grids_wide.h"

namespace {

// Multiply rows of floats.
template <typename Weight>
void times_floats(const Weight& w, const float* x, int64_t rows, float* y, int threads) {
#ifdef MEDIUM
  if constexpr (std::is_same_v<Weight, Codebooks>)
    if (is_shuffled(w)) return times_shuffled(w, x, rows, y, threads);
#endif
  for (int64_t row = 0; row < rows; ++row)
    times_vector(w, x + row * w.columns, y + row * w.rows, threads);
}

template <typename Weight>
void times_narrow(const Weight& w, const float* x, int64_t rows, float* y, int threads) {
  times_floats(w, x, rows, y, threads);
}
template <typename Weight>
void times_narrow(const Weight& w, const Bfloat* x, int64_t rows, Bfloat* y, int threads) {
  std::vector<float> from(rows * w.columns), to(rows * w.rows);
  for (size_t i = 0; i < from.size(); ++i) from[i] = float(x[i]);
  times_floats(w, from.data(), rows, to.data(), threads);
  for (size_t i = 0; i < to.size(); ++i) y[i] = Bfloat(to[i]);
}

template <typename Weight, typename T>
void times(const Weight& w, const T* x, int64_t rows, T* y, int threads) {
#ifdef WIDE
  if (is_wide(w)) return times_wide(w, x, rows, y, threads);
#endif
  times_narrow(w, x, rows, y, threads);
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
#ifdef MEDIUM
  if (is_shuffled(w)) return 64;
#endif
  (void)w;
  return 4;
}
int64_t few(const Grid& w) {
#ifdef WIDE
  if (is_wide(w)) return 8;
#endif
  (void)w;
#ifdef MEDIUM
  return 16;
#else
  return 4;
#endif
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
    if (is_bfloat) decode_any(*w, begin, end, static_cast<Bfloat*>(out), threads);               \
    else decode_any(*w, begin, end, static_cast<float*>(out), threads);                          \
  }

extern "C" {
MOEQ_FUNCTIONS(codebook, Codebooks)
MOEQ_FUNCTIONS(grid, Grid)
}
