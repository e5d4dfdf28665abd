// Products with weights on grids, compressed-tensors' `pack-quantized`: every row is a stream of codes,
// with a scale and perhaps a zero point for each group of columns.

#pragma once

#include "codes.h"

struct Grid {
  int64_t rows, columns, group_size;
  int bits;
  const uint8_t* codes;  // [rows, row_bytes]
  int64_t row_bytes;
  const float* scales;   // [rows, groups]
  const uint8_t* zeros;  // [rows, groups], or null where codes lie around 2^(bits - 1)

  int64_t groups() const { return columns / group_size; }
};

// Return a row times x: the sum over groups of scale * (sum of code * x - zero * sum of x).
inline float row_product(const Grid& w, int64_t row, const uint8_t* row_codes, const Codes& codes,
                  const float* x, const float* sum_of_x) {
  const float* scales = w.scales + row * w.groups();
  const uint8_t* zeros = w.zeros ? w.zeros + row * w.groups() : nullptr;
  const float middle = 1 << (w.bits - 1);
  float rest = 0;  // what lanes do not hold
#ifdef MEDIUM
  __m256 total = _mm256_setzero_ps();
#else
  float total[LANES] = {};
#endif
  for (int64_t group = 0; group < w.groups(); ++group) {
    const uint8_t* p = row_codes + group * w.group_size * w.bits / 8;
    const float* part = x + group * w.group_size;
    int64_t column = 0;
#ifdef MEDIUM
    __m256 sums = _mm256_setzero_ps();
    for (; column + LANES <= w.group_size; column += LANES, p += w.bits)
      sums = _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes.at(p)), _mm256_loadu_ps(part + column), sums);
    total = _mm256_fmadd_ps(_mm256_set1_ps(scales[group]), sums, total);
#else
    float sums[LANES] = {};
    for (; column + LANES <= w.group_size; column += LANES, p += w.bits) {
      uint64_t word;
      std::memcpy(&word, p, 8);
      for (int i = 0; i < LANES; ++i)
        sums[i] += static_cast<float>(static_cast<int32_t>((word >> (w.bits * i)) & codes.mask)) *
                   part[column + i];
    }
    for (int i = 0; i < LANES; ++i) total[i] += scales[group] * sums[i];
#endif
    float left = -(zeros ? zeros[group] : middle) * sum_of_x[group];
    for (int64_t bit = 0; column < w.group_size; ++column, bit += w.bits)
      left += code_at(p, bit, w.bits) * part[column];
    rest += scales[group] * left;
  }
#ifdef MEDIUM
  alignas(32) float lanes[LANES];
  _mm256_store_ps(lanes, total);
  for (int i = 0; i < LANES; ++i) rest += lanes[i];
  return rest;
#else
  for (int i = 0; i < LANES; ++i) rest += total[i];
  return rest;
#endif
}

// Finds rows of codes. 8 bytes are read at a time, of which up to 7 lie behind a row: behind the last
// rows that would be behind the tensor, so that these are copied.
class Rows {
 public:
  explicit Rows(const Grid& w)
      : w(w), first_copied(std::max<int64_t>(0, w.rows - 1 - 6 / w.row_bytes)),
        copy((w.rows - first_copied) * w.row_bytes + 7) {
    std::memcpy(copy.data(), w.codes + first_copied * w.row_bytes, copy.size() - 7);
  }
  const uint8_t* at(int64_t row) const {
    return row < first_copied ? w.codes + row * w.row_bytes
                              : copy.data() + (row - first_copied) * w.row_bytes;
  }

 private:
  const Grid& w;
  int64_t first_copied;
  std::vector<uint8_t> copy;
};

inline void times_vector(const Grid& w, const float* x, float* y, int threads) {
  std::vector<float> sum_of_x(w.groups());
  for (int64_t column = 0; column < w.columns; ++column) sum_of_x[column / w.group_size] += x[column];
  const Rows rows(w);
  const Codes codes(w.bits);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < w.rows; ++row)
    y[row] = row_product(w, row, rows.at(row), codes, x, sum_of_x.data());
}

// Write rows of the weight, [rows, columns].
template <typename T>
void decode(const Grid& w, int64_t begin, int64_t end, T* out, int threads) {
  const Rows rows(w);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* codes = rows.at(row);
    for (int64_t group = 0; group < w.groups(); ++group) {
      const int64_t scale = row * w.groups() + group;
      const int zero = w.zeros ? w.zeros[scale] : 1 << (w.bits - 1);
      T values[256];  // what each code of the group stands for
      // only a matter of time, as both ways give the same
      const int count = w.group_size < 256 && w.bits == 8 ? 0 : 1 << w.bits;
      for (int code = 0; code < count; ++code) values[code] = T((code - zero) * w.scales[scale]);
      T* to = out + (row - begin) * w.columns + group * w.group_size;
      int64_t bit = group * w.group_size * w.bits;
      for (int64_t column = 0; column < w.group_size; ++column, bit += w.bits) {
        const uint32_t code = code_at(codes, bit, w.bits);
        to[column] = count ? values[code] : T((int(code) - zero) * w.scales[scale]);
      }
    }
  }
}

