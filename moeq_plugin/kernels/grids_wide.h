// Products with weights on grids on AVX-512: see wide.h.

#pragma once

#include "grids.h"
#include "wide.h"

#ifdef WIDE

inline bool is_wide(const Grid& w) {
  return w.group_size % WIDE_CODES == 0 || w.group_size == WIDE_CODES / 2 || w.groups() == 1;
}

// What codes stand for around the middle one, which bfloats hold exactly.
template <int PARTS>
Entries<PARTS> steps_around_middle(int bits) {
  Entries<PARTS> result;
  float value[256];
  for (int code = 0; code < 256; ++code) value[code] = (code & ((1 << bits) - 1)) - (1 << (bits - 1));
  for (int part = 0; part < PARTS; ++part) {
    const float* of = value + 64 * part;
    result.set(part, _mm512_loadu_ps(of), _mm512_loadu_ps(of + 16), _mm512_loadu_ps(of + 32),
               _mm512_loadu_ps(of + 48));
  }
  return result;
}

// Activations in the order in which codes are found, and their sums by group.
template <int S>
struct GridInput {
  int64_t chunks;              // of 64 columns
  std::vector<Wide> parts;     // [chunk, 2, stream]
  std::vector<float> sums;     // [stream, group]

  GridInput(const Grid& w, const Streams& x, int64_t first)
      : chunks((w.columns + WIDE_CODES - 1) / WIDE_CODES), parts(chunks * 2 * S),
        sums(S * w.groups()) {
    std::vector<Bfloat> padded(chunks * WIDE_CODES);
    for (int s = 0; s < S; ++s) {
      std::copy_n(x.vectors[first + s], w.columns, padded.begin());
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int half = 0; half < 2; ++half)
          for (int quarter = 0; quarter < 4; ++quarter)
            std::memcpy((char*)&parts[(2 * chunk + half) * S + s] + 16 * quarter,
                        &padded[chunk * WIDE_CODES + 16 * quarter + 8 * half], 16);
      for (int64_t group = 0; group < w.groups(); ++group)
        sums[s * w.groups() + group] = sum(&padded[group * w.group_size], w.group_size);
    }
  }

 private:
  static float sum(const Bfloat* values, int64_t count) {
    __m512 result = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 there = count - i < 16 ? (1u << (count - i)) - 1 : 0xffff;
      const __m256i upper = _mm256_maskz_loadu_epi16(there, values + i);
      const __m512i whole = _mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16);
      result = _mm512_add_ps(result, _mm512_castsi512_ps(whole));
    }
    return _mm512_reduce_add_ps(result);
  }
};

// Return the sum over groups of scale * (middle - zero) * sum of x.
inline float middle_minus_zeros(int bits, int64_t groups, const float* scales, const uint8_t* zeros,
                                const float* sums) {
  const __m512i middle = _mm512_set1_epi32(1 << (bits - 1));
  __m512 result = _mm512_setzero_ps();
  for (int64_t group = 0; group < groups; group += 16) {
    const int64_t left = groups - group;
    const __mmask16 there = left < 16 ? (1u << left) - 1 : 0xffff;
    const __m128i codes = _mm_maskz_loadu_epi8(there, zeros + group);
    const __m512i steps = _mm512_sub_epi32(middle, _mm512_cvtepu8_epi32(codes));
    const __m512 scaled =
        _mm512_mul_ps(_mm512_cvtepi32_ps(steps), _mm512_maskz_loadu_ps(there, scales + group));
    result = _mm512_fmadd_ps(scaled, _mm512_maskz_loadu_ps(there, sums + group), result);
  }
  return _mm512_reduce_add_ps(result);
}

// The scales of 64 codes of which each half is a group. Of a product, eight lanes belong to each.
inline __m512 scales_of_halves(const float* scales, bool has_second) {
  const __m512 second = _mm512_set1_ps(has_second ? scales[1] : 0);
  return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scales[0]), second);
}

// The rows of a weight, as far as products are concerned.
template <int PARTS>
struct GridReader {
  const Grid& w;
  int64_t groups, chunks, run;  // of a row, of 64 codes; chunks that share scales
  bool halves;                  // each half of 64 codes is a group
  WideCodes codes;
  Entries<PARTS> steps;

  explicit GridReader(const Grid& w)
      : w(w), groups(w.groups()), chunks((w.columns + WIDE_CODES - 1) / WIDE_CODES),
        run(groups == 1 ? chunks : std::max<int64_t>(1, w.group_size / WIDE_CODES)),
        halves(groups > 1 && w.group_size == WIDE_CODES / 2),
        codes(w.bits, w.codes + w.rows * w.row_bytes), steps(steps_around_middle<PARTS>(w.bits)) {}

  // Multiply R rows with S streams; `y` is [stream, rows of the weight].
  template <int S, int R>
  void times(int64_t row, const GridInput<S>& x, float* y) const {
    const float* scales = w.scales + row * groups;
    const uint8_t* p = w.codes + row * w.row_bytes;
    const Wide* at = x.parts.data();
    __m512 total[R][S];
    for (int r = 0; r < R; ++r)
      for (int s = 0; s < S; ++s) total[r][s] = _mm512_setzero_ps();
    for (int64_t begin = 0; begin < chunks; begin += run) {
      __m512 sum[R][S];
      for (int r = 0; r < R; ++r)
        for (int s = 0; s < S; ++s) sum[r][s] = _mm512_setzero_ps();
      for (int64_t chunk = 0; chunk < run; ++chunk, p += codes.step, at += 2 * S)
        for (int r = 0; r < R; ++r) {
          __m512i found[2];
          // rows are short, and the processor does not know that the next ones follow
          _mm_prefetch((const char*)p + (r + R) * w.row_bytes, _MM_HINT_T0);
          steps.at(codes.at(p + r * w.row_bytes), found[0], found[1]);
          for (int half = 0; half < 2; ++half)
            for (int s = 0; s < S; ++s)
              sum[r][s] = _mm512_dpbf16_ps(sum[r][s], (__m512bh)found[half],
                                           (__m512bh)at[half * S + s].all);
        }
      for (int r = 0; r < R; ++r) {
        const float* own = scales + r * groups;
        const __m512 scale = halves ? scales_of_halves(own, 2 * begin + 1 < groups)
                                    : _mm512_set1_ps(*own);
        for (int s = 0; s < S; ++s) total[r][s] = _mm512_fmadd_ps(scale, sum[r][s], total[r][s]);
      }
      scales += halves ? 2 : 1;
    }
    for (int r = 0; r < R; ++r)
      for (int s = 0; s < S; ++s)
        y[s * w.rows + row + r] = _mm512_reduce_add_ps(total[r][s]) + of_zeros(row + r, x, s);
  }

  template <int S>
  float of_zeros(int64_t row, const GridInput<S>& x, int s) const {
    if (!w.zeros) return 0;
    return middle_minus_zeros(w.bits, groups, w.scales + row * groups, w.zeros + row * groups,
                              x.sums.data() + s * groups);
  }
};

// Multiply S streams from `first` on; y is [stream, rows].
template <int PARTS, int S>
void times_streams(const Grid& w, const Streams& streams, int64_t first, float* y, int threads) {
  constexpr int64_t R = 4;  // rows that share loads of x; more sums than that find no registers
  const GridInput<S> x(w, streams, first);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const GridReader<PARTS> reader(w);  // of each thread's own, so that it stays in registers
#pragma omp for schedule(static)
    for (int64_t row = 0; row < w.rows; row += R) {
      if (row + R <= w.rows) {
        reader.template times<S, R>(row, x, y);
      } else {
        for (int64_t last = row; last < w.rows; ++last) reader.template times<S, 1>(last, x, y);
      }
    }
  }
}

template <typename T, int PARTS>
void times_wide(const Grid& w, const T* x, int64_t rows, T* y, int threads) {
  const Streams streams(x, rows, w.columns);
  const int64_t count = streams.vectors.size();
  std::vector<float> sums(count * w.rows);
  in_batches<4>(count, [&](auto s, int64_t first) {
    times_streams<PARTS, s.value>(w, streams, first, sums.data() + first * w.rows, threads);
  });
  write_results(sums, rows, w.rows, y);
}

template <typename T>
void times_wide(const Grid& w, const T* x, int64_t rows, T* y, int threads) {
  const int parts = parts_for(w.bits);
  if (parts == 1) times_wide<T, 1>(w, x, rows, y, threads);
  if (parts == 2) times_wide<T, 2>(w, x, rows, y, threads);
  if (parts == 4) times_wide<T, 4>(w, x, rows, y, threads);
}

// Writes rows of a weight as bfloats, 64 codes at a time.
struct GridWriter {
  const Grid& w;
  int64_t groups;
  WideCodes codes;
  __m512i mask, spread[4];  // of codes; one of four in each word

  explicit GridWriter(const Grid& w)
      : w(w), groups(w.groups()), codes(w.bits, w.codes + w.rows * w.row_bytes) {
    mask = _mm512_set1_epi8((1 << w.bits) - 1);
    const __m512i ascending =
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int i = 0; i < 4; ++i) spread[i] = _mm512_add_epi32(ascending, _mm512_set1_epi32(16 * i));
  }

  void write(int64_t row, Bfloat* out) const {
    const uint8_t* p = w.codes + row * w.row_bytes;
    for (int64_t column = 0; column < w.columns; column += WIDE_CODES, p += codes.step) {
      const __m512i code = _mm512_and_si512(codes.at(p), mask);
      write_half(row, column, spread, code, out);
      if (column + HALF < w.columns) write_half(row, column + HALF, spread + 2, code, out);
    }
  }

 private:
  static constexpr int64_t HALF = WIDE_CODES / 2;  // bfloats of one register, which share a scale

  void write_half(int64_t row, int64_t column, const __m512i* spread, __m512i code,
                  Bfloat* out) const {
    const int64_t group = row * groups + column / w.group_size, left = w.columns - column;
    const __m512 scale = _mm512_set1_ps(w.scales[group]);
    const __m512i zero = _mm512_set1_epi32(w.zeros ? w.zeros[group] : 1 << (w.bits - 1));
    const auto value = [&](__m512i one_of_four) {
      const __m512i alone = _mm512_maskz_permutexvar_epi8(0x1111111111111111, one_of_four, code);
      return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(alone, zero)), scale);
    };
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(value(spread[1]), value(spread[0]));
    const __mmask32 there = left < HALF ? (1u << left) - 1 : ~0u;
    _mm512_mask_storeu_epi16(out + column, there, both);
  }
};

// Write rows of the weight, [rows, columns].
inline void decode_wide(const Grid& w, int64_t begin, int64_t end, Bfloat* out, int threads) {
  const GridWriter writer(w);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = begin; row < end; ++row) writer.write(row, out + (row - begin) * w.columns);
}
#endif
