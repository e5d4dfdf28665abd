// Products with codebook weights on AVX-512: see wide.h.

#pragma once

#include "codebooks_fast.h"
#include "wide.h"

#ifdef WIDE

inline bool is_wide(const Codebooks& w) {
  return w.bits <= 7 && fits(w, WIDE_CODES);  // 8 would take half as long again to compile
}

inline const uint8_t* end_of(const Codebooks& w) {
  return (const uint8_t*)w.books + w.row_groups * w.column_groups * w.centroids() * w.dim;
}

// How the centroids of every tile are read.
struct Reading {
  __mmask64 readable;
  __m512i repeated;  // fewer than 64 are repeated, so that the bits above a code do not count
  explicit Reading(const Codebooks& w)
      : readable(~uint64_t(0) >> (64 - std::min<int64_t>(64, w.centroids()))) {
    alignas(64) uint8_t from[64];
    for (int i = 0; i < 64; ++i) from[i] = i & (w.centroids() - 1);
    repeated = _mm512_load_si512(from);
  }
};

// The centroids of a tile. Bfloats are what decoding gives; other weights get their scale later.
template <int DIM, int PARTS>
struct Book {
  Entries<PARTS> of[DIM];
  __m512 scale;

  Book(const Codebooks& w, const Reading& reading, int64_t tile) {
    const int64_t entries = w.centroids();
    const int8_t* book = w.books + tile * entries * DIM;
    const bool scales = w.rounded == 8;
    const __m512 now = _mm512_set1_ps(scales ? w.scales[tile] : 1);
    scale = _mm512_set1_ps(scales ? 1 : w.scales[tile]);
    for (int d = 0; d < DIM; ++d)
      for (int part = 0; part < PARTS; ++part) {
        const int8_t* from = book + d * entries + 64 * part;
        const __m512i all = entries >= 64
            ? _mm512_loadu_si512(from)
            : _mm512_permutexvar_epi8(reading.repeated,
                                      _mm512_maskz_loadu_epi8(reading.readable, from));
        of[d].set(part, floats_of(_mm512_extracti32x4_epi32(all, 0), now),
                  floats_of(_mm512_extracti32x4_epi32(all, 1), now),
                  floats_of(_mm512_extracti32x4_epi32(all, 2), now),
                  floats_of(_mm512_extracti32x4_epi32(all, 3), now));
      }
  }
};

// The way of AVX-512: see times_streams.
template <int DIM, int PARTS>
struct WideWay {
  using Input = Streams;
  static constexpr int64_t CODES = WIDE_CODES, LANES = 16;
  WideCodes codes;
  Reading reading;

  explicit WideWay(const Codebooks& w) : codes(w.bits, end_of(w)), reading(w) {}

  // Return activations in the order in which centroids are found: [chunk, dim, 2, stream].
  template <int S>
  static std::vector<Wide> ordered(const Codebooks& w, const Strip& strip, const Streams& x,
                                   int64_t first) {
    std::vector<Wide> result(w.column_groups * strip.chunks * DIM * 2 * S);
    Wide* to = result.data();
    for (int64_t chunk = 0; chunk < w.column_groups * strip.chunks; ++chunk)
      for (int d = 0; d < DIM; ++d)
        for (int half = 0; half < 2; ++half)
          for (int s = 0; s < S; ++s, ++to)
            for (int quarter = 0; quarter < 4; ++quarter) {
              const int64_t vector = strip.vector(w, chunk, 16 * quarter + 8 * half);
              if (vector >= w.vectors) continue;  // of a tile that is not whole
              const __m128i eight = eight_of(&x.vectors[first + s]->upper + vector * DIM, d);
              _mm_storeu_si128((__m128i*)to + quarter, eight);
            }
    return result;
  }

  template <int S>
  void add(const Codebooks& w, const Tile& tile, int64_t number, const Strip& strip, const Wide* x,
           float* sums) const {
    const Book<DIM, PARTS> book(w, reading, number);
    const uint8_t* p = w.codes + tile.bit / 8;
    for (int64_t row = 0; row < tile.num_rows; row += strip.rows, sums += LANES * S) {
      __m512 sum[S];
      for (int s = 0; s < S; ++s) sum[s] = _mm512_setzero_ps();
      const Wide* at = x;
      for (int64_t chunk = 0; chunk < strip.chunks; ++chunk, p += codes.step) {
        const __m512i code = codes.at(p);
        for (int d = 0; d < DIM; ++d) {
          __m512i found[2];
          book.of[d].at(code, found[0], found[1]);
          for (int half = 0; half < 2; ++half)
            for (int s = 0; s < S; ++s, ++at)
              sum[s] = _mm512_dpbf16_ps(sum[s], (__m512bh)found[half], (__m512bh)at->all);
        }
      }
      for (int s = 0; s < S; ++s) {
        const __m512 before = _mm512_load_ps(sums + LANES * s);
        _mm512_store_ps(sums + LANES * s, _mm512_fmadd_ps(book.scale, sum[s], before));
      }
    }
  }

 private:
  static __m128i eight_of(const uint16_t* from, int d) {
    if constexpr (DIM == 1) return _mm_loadu_si128((const __m128i*)from);
    const __m256i pairs = _mm256_loadu_si256((const __m256i*)from);
    return _mm256_cvtepi32_epi16(d ? _mm256_srli_epi32(pairs, 16) : pairs);
  }
};

// Call `by(dim, parts)`, both constants.
template <typename By>
void by_kind(const Codebooks& w, By by) {
  const auto by_parts = [&](auto dim) {
    const int parts = parts_for(w.bits);
    if (parts == 1) by(dim, std::integral_constant<int, 1>());
    if (parts == 2) by(dim, std::integral_constant<int, 2>());
  };
  if (w.dim == 1) by_parts(std::integral_constant<int, 1>());
  if (w.dim == 2) by_parts(std::integral_constant<int, 2>());
}

template <typename T>
void times_wide(const Codebooks& w, const T* x, int64_t rows, T* y, int threads) {
  const Streams streams(x, rows, w.columns);
  const int64_t count = streams.vectors.size();
  std::vector<float> sums(count * w.rows);
  by_kind(w, [&](auto dim, auto parts) {
    in_batches<8>(count, [&](auto s, int64_t first) {
      using Way = WideWay<dim.value, parts.value>;
      times_streams<Way, s.value>(w, streams, first, sums.data() + first * w.rows, threads);
    });
  });
  write_results(sums, rows, w.rows, y);
}

// Write the bfloats of 64 codes, 16 to a quarter, each quarter where `to` says.
template <int DIM>
void write_codes(const __m512i (&found)[DIM][2], Bfloat* const (&to)[4]) {
  const auto quarter = [](__m512i from, int number, Bfloat* out) {
    __m128i part;
    if (number == 0) part = _mm512_extracti32x4_epi32(from, 0);
    if (number == 1) part = _mm512_extracti32x4_epi32(from, 1);
    if (number == 2) part = _mm512_extracti32x4_epi32(from, 2);
    if (number == 3) part = _mm512_extracti32x4_epi32(from, 3);
    _mm_storeu_si128((__m128i*)out, part);
  };
  for (int half = 0; half < 2; ++half)
    for (int number = 0; number < 4; ++number) {
      Bfloat* out = to[number] + half * 8 * DIM;
      if constexpr (DIM == 1) {
        quarter(found[0][half], number, out);
      } else {
        quarter(_mm512_unpacklo_epi16(found[0][half], found[1][half]), number, out);
        quarter(_mm512_unpackhi_epi16(found[0][half], found[1][half]), number, out + 8);
      }
    }
}

// Write a whole tile; `out` is where its first weight goes.
template <int DIM, int PARTS>
void write_wide(const Codebooks& w, const Tile& tile, const WideCodes& codes,
                const Book<DIM, PARTS>& book, const Strip& strip, Bfloat* out) {
  const uint8_t* p = w.codes + tile.bit / 8;
  for (int64_t row = 0; row < tile.num_rows; row += strip.rows)
    for (int64_t chunk = 0; chunk < strip.chunks; ++chunk, p += codes.step) {
      const __m512i code = codes.at(p);
      __m512i found[DIM][2];
      for (int d = 0; d < DIM; ++d) book.of[d].at(code, found[d][0], found[d][1]);
      Bfloat* to[4];
      for (int i = 0; i < 4; ++i)
        to[i] = out + (row + i * strip.rows / 4) * w.columns + strip.vector(w, chunk, 16 * i) * DIM;
      write_codes<DIM>(found, to);
    }
}

// Write whole row groups of the weight, [rows, columns].
inline void decode_wide(const Codebooks& w, int64_t begin, int64_t end, Bfloat* out, int threads) {
  const Strip strip(w, WIDE_CODES);
  by_kind(w, [&](auto dim, auto parts) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const WideCodes codes(w.bits, end_of(w));
      const Reading reading(w);
      TileWriter<Bfloat> writer(w);
#pragma omp for schedule(static)
      for (int64_t group = begin; group < end; ++group)
        for_tiles(w, group, out + (group - begin) * w.group_rows * w.columns,
                  [&](const Tile& tile, int64_t number, Bfloat* to) {
                    if (is_whole(w, tile) && tile.num_rows % strip.rows == 0) {
                      const Book<dim.value, parts.value> book(w, reading, number);
                      write_wide<dim.value, parts.value>(w, tile, codes, book, strip, to);
                    } else {
                      writer.write(tile, number, to);
                    }
                  });
    }
  });
}
#endif
