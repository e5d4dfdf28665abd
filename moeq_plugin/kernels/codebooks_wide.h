// Products with codebook weights on AVX-512: see wide.h.

#pragma once

#include "codebooks.h"
#include "wide.h"

#ifdef WIDE

// Where 64 codes in a row lie in tiles: several rows, one row, or a part of one.
struct Strip {
  int64_t rows, chunks;  // rows that 64 codes cover, chunks of 64 codes that a row takes
  explicit Strip(const Codebooks& w)
      : rows(std::max<int64_t>(1, WIDE_CODES / w.group_vectors)),
        chunks(std::max<int64_t>(1, w.group_vectors / WIDE_CODES)) {}
};

inline bool is_wide(const Codebooks& w) {
  const bool whole = w.group_vectors == 16 || w.group_vectors == 32 || w.group_vectors % 64 == 0;
  return whole && w.dim <= 2 && w.bits <= MAX_LOOKED_UP && w.vectors % 8 == 0 && w.rounded != 16;
}

inline bool is_whole(const Codebooks& w, const Tile& tile) {
  return tile.num_vectors == w.group_vectors && tile.bit % 8 == 0;
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

// Activations in the order in which centroids are found: [column group, chunk, dim, 2, stream].
template <int DIM, int S>
std::vector<Wide> ordered(const Codebooks& w, const Streams& x, int64_t first) {
  const Strip strip(w);
  std::vector<Wide> result(w.column_groups * strip.chunks * DIM * 2 * S);
  const int64_t within = std::min<int64_t>(w.group_vectors, WIDE_CODES);
  Wide* to = result.data();
  for (int64_t chunk = 0; chunk < w.column_groups * strip.chunks; ++chunk)
    for (int d = 0; d < DIM; ++d)
      for (int half = 0; half < 2; ++half)
        for (int stream = 0; stream < S; ++stream, ++to)
          for (int quarter = 0; quarter < 4; ++quarter) {
            const int64_t vector = chunk * within + (16 * quarter + 8 * half) % within;
            if (vector >= w.vectors) continue;  // of a tile that is not whole
            const uint16_t* from = x.vectors[first + stream] + vector * DIM;
            __m128i eight;
            if constexpr (DIM == 1) {
              eight = _mm_loadu_si128((const __m128i*)from);
            } else {
              const __m256i pairs = _mm256_loadu_si256((const __m256i*)from);
              eight = _mm256_cvtepi32_epi16(d ? _mm256_srli_epi32(pairs, 16) : pairs);
            }
            _mm_storeu_si128((__m128i*)to + quarter, eight);
          }
  return result;
}

// Add a tile's products to `sums`, [as many rows as 64 codes cover, stream, 16 lanes].
template <int DIM, int PARTS, int S>
void add_wide(const Codebooks& w, const Tile& tile, const WideCodes& codes,
              const Book<DIM, PARTS>& book, const Strip& strip, const Wide* x, float* sums) {
  const uint8_t* p = w.codes + tile.bit / 8;
  for (int64_t row = 0; row < tile.num_rows; row += strip.rows, sums += 16 * S) {
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
      const __m512 before = _mm512_load_ps(sums + 16 * s);
      _mm512_store_ps(sums + 16 * s, _mm512_fmadd_ps(book.scale, sum[s], before));
    }
  }
}

// Likewise for a tile at the edge, one code after the other.
inline void add_edge(const Codebooks& w, const Tile& tile, const float* table, const Strip& strip,
                     const uint16_t* x, float* sums, int streams) {
  const int64_t lanes = 16 / strip.rows;
  int64_t bit = tile.bit;
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    float* to = sums + row / strip.rows * 16 * streams + row % strip.rows * lanes;
    for (int64_t v = 0; v < tile.num_vectors; ++v, bit += w.bits) {
      const uint32_t code = code_at(w.codes, bit, w.bits);
      for (int d = 0; d < w.dim; ++d) {
        Bfloat value;
        value.upper = x[v * w.dim + d];
        *to += table[d * w.centroids() + code] * float(value);
      }
    }
  }
}

// Multiply S streams from `first` on; y is [stream, rows].
template <int DIM, int PARTS, int S>
void times_streams(const Codebooks& w, const Streams& x, int64_t first, float* y, int threads) {
  const Strip strip(w);
  const std::vector<Wide> all = ordered<DIM, S>(w, x, first);
  const int64_t lanes = 16 / strip.rows, units = (w.group_rows + strip.rows - 1) / strip.rows;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    // of each thread's own, so that they stay in registers
    const WideCodes codes(w.bits, end_of(w));
    const Reading reading(w);
    Lines sums(units * 16 * S), table(w.centroids() * DIM);
#pragma omp for schedule(static)
    for (int64_t row_group = 0; row_group < w.row_groups; ++row_group) {
      std::fill_n(sums.data(), units * 16 * S, 0.0f);
      for (int64_t column_group = 0; column_group < w.column_groups; ++column_group) {
        const Tile tile(w, row_group, column_group);
        const int64_t number = row_group * w.column_groups + column_group;
        if (is_whole(w, tile)) {
          const Wide* part = all.data() + column_group * strip.chunks * DIM * 2 * S;
          add_wide<DIM, PARTS, S>(w, tile, codes, {w, reading, number}, strip, part, sums.data());
          continue;
        }
        fill_table(w, number, table.data());
        for (int s = 0; s < S; ++s)
          add_edge(w, tile, table.data(), strip, x.vectors[first + s] + tile.first_vector * DIM,
                   sums.data() + 16 * s, S);
      }
      const Tile tile(w, row_group, 0);
      for (int64_t row = 0; row < tile.num_rows; ++row)
        for (int s = 0; s < S; ++s) {
          const float* from =
              sums.data() + (row / strip.rows * S + s) * 16 + row % strip.rows * lanes;
          float sum = 0;
          for (int64_t lane = 0; lane < lanes; ++lane) sum += from[lane];
          y[s * w.rows + tile.first_row + row] = sum;
        }
    }
  }
}

// Call `by(dim, parts)`, both constants.
template <typename By>
void by_kind(const Codebooks& w, By by) {
  const auto by_parts = [&](auto dim) {
    const int parts = parts_for(w.bits);
    if (parts == 1) by(dim, std::integral_constant<int, 1>());
    if (parts == 2) by(dim, std::integral_constant<int, 2>());
    if (parts == 4) by(dim, std::integral_constant<int, 4>());
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
      times_streams<dim.value, parts.value, s.value>(w, streams, first,
                                                     sums.data() + first * w.rows, threads);
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
  const int64_t within = std::min<int64_t>(tile.num_vectors, WIDE_CODES);
  for (int64_t row = 0; row < tile.num_rows; row += strip.rows)
    for (int64_t chunk = 0; chunk < strip.chunks; ++chunk, p += codes.step) {
      const __m512i code = codes.at(p);
      __m512i found[DIM][2];
      for (int d = 0; d < DIM; ++d) book.of[d].at(code, found[d][0], found[d][1]);
      Bfloat* to[4];
      for (int i = 0; i < 4; ++i)
        to[i] = out + (row + 16 * i / within) * w.columns +
                (chunk * WIDE_CODES + 16 * i % within) * DIM;
      write_codes<DIM>(found, to);
    }
}

// Write whole row groups of the weight, [rows, columns].
inline void decode_wide(const Codebooks& w, int64_t begin, int64_t end, Bfloat* out, int threads) {
  const Strip strip(w);
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
