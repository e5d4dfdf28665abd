// Products with codebook weights (moeq_plugin/core/packed_codebook.py): a weight is cut into tiles of
// rows times columns; each tile has its own codebook, and its indices lie together, row by row.

#pragma once

#include "codes.h"

struct Codebooks {
  int64_t rows, columns;               // of the weight
  int64_t vectors;                     // of a row: columns / dim
  int64_t row_groups, column_groups;   // tiles
  int64_t group_rows, group_vectors;   // of a tile; the last ones may have fewer
  int bits, dim;                       // of an index; columns that share one
  int rounded;                         // centroids are rounded to: 32 float, 16 half, 8 bfloat
  const uint8_t* codes;                // and behind them, in one tensor, scales and books
  const int8_t* books;                 // [tile, dim, centroids]
  const float* scales;                 // [tile]

  int64_t centroids() const { return int64_t(1) << bits; }
};

struct Tile {
  int64_t first_row, num_rows, first_vector, num_vectors, bit;  // bit: where its codes begin

  Tile(const Codebooks& w, int64_t row_group, int64_t column_group) {
    first_row = row_group * w.group_rows;
    num_rows = std::min(w.group_rows, w.rows - first_row);
    first_vector = column_group * w.group_vectors;
    num_vectors = std::min(w.group_vectors, w.vectors - first_vector);
    bit = (first_row * w.vectors + num_rows * first_vector) * w.bits;
  }
};

// Write the centroids of a tile, [dim, centroids]; both are what decoding gives, bit for bit.
inline void fill_table(const Codebooks& w, int64_t tile, float* table) {
  const int64_t entries = w.centroids() * w.dim;
  const int8_t* book = w.books + tile * entries;
  const float scale = w.scales[tile];
  for (int64_t i = 0; i < entries; ++i) table[i] = rounded_to(w.rounded, book[i] * scale);
}

// Add a row's part of a tile, times activations, to `sums`; x begins with the tile's first vector.
inline void add_row(const Codebooks& w, const Tile& tile, int64_t bit, const float* table,
             const float* x, int64_t done, float* sums) {
  for (int64_t v = done; v < tile.num_vectors; ++v) {
    const uint32_t code = code_at(w.codes, bit + v * w.bits, w.bits);
    for (int d = 0; d < w.dim; ++d)
      sums[v % LANES] += table[d * w.centroids() + code] * x[v * w.dim + d];
  }
}

#ifdef MEDIUM
// Return the sum over a chunk of 8 vectors whose centroids are loaded one by one, in 8 lanes.
template <int DIM, int BITS>
__m256 add_chunk(uint64_t word, const float* pairs, const float* x, __m256 sum) {
  const auto at = [&](int i) { return (word >> (BITS * i)) & ((1 << BITS) - 1); };
  if constexpr (DIM == 1) {
    const __m256 found = _mm256_setr_ps(pairs[at(0)], pairs[at(1)], pairs[at(2)], pairs[at(3)],
                                        pairs[at(4)], pairs[at(5)], pairs[at(6)], pairs[at(7)]);
    return _mm256_fmadd_ps(found, _mm256_loadu_ps(x), sum);
  }
  const auto both = [&](int i) {  // two floats are loaded as one
    double pair;
    std::memcpy(&pair, pairs + 2 * at(i), 8);
    return pair;
  };
  for (int i = 0; i < 8; i += 4) {
    const __m256d found = _mm256_setr_pd(both(i), both(i + 1), both(i + 2), both(i + 3));
    sum = _mm256_fmadd_ps(_mm256_castpd_ps(found), _mm256_loadu_ps(x + 2 * i), sum);
  }
  return sum;
}
#endif

template <int DIM, int BITS>
void add_tile(const Codebooks& w, const Tile& tile, const Codes&, const float* table,
              const float* x, float* sums) {
  const int64_t centroids = w.centroids(), whole = tile.num_vectors / LANES * LANES;
  alignas(32) float pairs[DIM << BITS];
  for (int64_t c = 0; c < centroids; ++c)
    for (int d = 0; d < DIM; ++d) pairs[DIM * c + d] = table[d * centroids + c];
  for (int64_t row = 0; row < tile.num_rows; ++row, sums += LANES) {
    const int64_t bit = tile.bit + row * tile.num_vectors * w.bits;
    // a row that begins within a byte is left to the plain loop below
    const int64_t fast = bit % 8 ? 0 : whole;
    const uint8_t* p = w.codes + bit / 8;
#ifdef MEDIUM
    __m256 sum = _mm256_loadu_ps(sums);
    for (int64_t v = 0; v < fast; v += LANES, p += w.bits) {
      uint64_t word;
      std::memcpy(&word, p, 8);
      sum = add_chunk<DIM, BITS>(word, pairs, x + DIM * v, sum);
    }
    _mm256_storeu_ps(sums, sum);
#else
    float sum[LANES] = {};
    for (int64_t v = 0; v < fast; v += LANES, p += w.bits) {
      uint64_t word;
      std::memcpy(&word, p, 8);
      for (int i = 0; i < LANES; ++i) {
        const float* found = pairs + DIM * ((word >> (BITS * i)) & ((1 << BITS) - 1));
        for (int d = 0; d < DIM; ++d) sum[i] += found[d] * x[DIM * (v + i) + d];
      }
    }
    for (int i = 0; i < LANES; ++i) sums[i] += sum[i];
#endif
    if (fast < tile.num_vectors) add_row(w, tile, bit, table, x, fast, sums);
  }
}

using AddTile = void (*)(const Codebooks&, const Tile&, const Codes&, const float*, const float*,
                         float*);

inline void add_plainly(const Codebooks& w, const Tile& tile, const Codes&, const float* table,
                 const float* x, float* sums) {
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    const int64_t bit = tile.bit + row * tile.num_vectors * w.bits;
    add_row(w, tile, bit, table, x, 0, sums + row * LANES);
  }
}

template <int DIM>
AddTile way_for_bits(int bits) {
  constexpr AddTile ways[] = {add_tile<DIM, 1>, add_tile<DIM, 2>, add_tile<DIM, 3>, add_tile<DIM, 4>,
                              add_tile<DIM, 5>, add_tile<DIM, 6>, add_tile<DIM, 7>, add_tile<DIM, 8>};
  return ways[bits - 1];
}

inline AddTile way_for(const Codebooks& w) {
  if (w.dim > 2 || w.bits > MAX_LOOKED_UP) return add_plainly;
  return w.dim == 2 ? way_for_bits<2>(w.bits) : way_for_bits<1>(w.bits);
}

inline void times_vector(const Codebooks& w, const float* x, float* y, int threads) {
  const AddTile add = way_for(w);
  const Codes codes(std::min<int>(w.bits, MAX_LOOKED_UP));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Lines table(w.centroids() * w.dim), sums(w.group_rows * LANES);
#pragma omp for schedule(static)
    for (int64_t row_group = 0; row_group < w.row_groups; ++row_group) {
      std::fill_n(sums.data(), w.group_rows * LANES, 0.0f);
      for (int64_t column_group = 0; column_group < w.column_groups; ++column_group) {
        const Tile tile(w, row_group, column_group);
        fill_table(w, row_group * w.column_groups + column_group, table.data());
        add(w, tile, codes, table.data(), x + tile.first_vector * w.dim, sums.data());
      }
      const Tile tile(w, row_group, 0);
      for (int64_t row = 0; row < tile.num_rows; ++row) {
        float sum = 0;
        for (int64_t lane = 0; lane < LANES; ++lane) sum += sums.data()[row * LANES + lane];
        y[tile.first_row + row] = sum;
      }
    }
  }
}

// Write a tile; `centroids` are [centroids, dim] and have the type of what is written.
template <typename T, int DIM>
void write_tile(const Codebooks& w, const Tile& tile, const T* centroids, T* out) {
  const int dim = DIM ? DIM : w.dim;
  int64_t bit = tile.bit;
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    T* to = out + row * w.columns;
    for (int64_t v = 0; v < tile.num_vectors; ++v, bit += w.bits, to += dim) {
      const T* from = centroids + code_at(w.codes, bit, w.bits) * dim;
      if constexpr (DIM != 0) {
        std::memcpy(to, from, DIM * sizeof(T));
      } else {
        for (int d = 0; d < dim; ++d) to[d] = from[d];
      }
    }
  }
}

// Writes tiles one code after the other.
template <typename T>
struct TileWriter {
  const Codebooks& w;
  Lines table;
  std::vector<T> centroids;

  explicit TileWriter(const Codebooks& w)
      : w(w), table(w.centroids() * w.dim), centroids(w.centroids() * w.dim) {}

  void write(const Tile& tile, int64_t number, T* to) {
    fill_table(w, number, table.data());
    for (int64_t c = 0; c < w.centroids(); ++c)
      for (int d = 0; d < w.dim; ++d)
        centroids[c * w.dim + d] = T(table.data()[d * w.centroids() + c]);
    if (w.dim == 1) write_tile<T, 1>(w, tile, centroids.data(), to);
    else if (w.dim == 2) write_tile<T, 2>(w, tile, centroids.data(), to);
    else write_tile<T, 0>(w, tile, centroids.data(), to);
  }
};

// Call `each(tile, its number, where its first weight goes)` for all tiles of a row group.
template <typename T, typename Each>
void for_tiles(const Codebooks& w, int64_t row_group, T* out, Each each) {
  for (int64_t column_group = 0; column_group < w.column_groups; ++column_group) {
    const Tile tile(w, row_group, column_group);
    each(tile, row_group * w.column_groups + column_group, out + tile.first_vector * w.dim);
  }
}

// Write whole row groups of the weight, [rows, columns].
template <typename T>
void decode(const Codebooks& w, int64_t begin, int64_t end, T* out, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    TileWriter<T> writer(w);
#pragma omp for schedule(static)
    for (int64_t group = begin; group < end; ++group)
      for_tiles(w, group, out + (group - begin) * w.group_rows * w.columns,
                [&](const Tile& tile, int64_t number, T* to) { writer.write(tile, number, to); });
  }
}
