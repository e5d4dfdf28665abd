// Products with codebook weights that look many codes up at once and multiply several vectors, in a way
// that a set of instructions gives (codebooks_wide.h, codebooks_avx2.h).

#pragma once

#include "codebooks.h"

// Where codes that are looked up at once lie in tiles: in several rows, one row, or a part of one.
struct Strip {
  int64_t codes, rows, chunks;  // at once, rows that they cover, how many of them a row takes
  Strip(const Codebooks& w, int64_t codes)
      : codes(codes), rows(std::max<int64_t>(1, codes / w.group_vectors)),
        chunks(std::max<int64_t>(1, w.group_vectors / codes)) {}
  // Return the vector, from the row's first one on, that a code of a chunk belongs to.
  int64_t vector(const Codebooks& w, int64_t chunk, int64_t code) const {
    const int64_t within = std::min(w.group_vectors, codes);
    return chunk * within + code % within;
  }
};

// Only tiles are fast whose rows are whole chunks or parts of one, and begin with a byte.
inline bool fits(const Codebooks& w, int64_t codes) {
  const bool whole = (w.group_vectors % 16 == 0 && codes % w.group_vectors == 0) ||
                     w.group_vectors % codes == 0;
  return whole && w.dim <= 2 && w.vectors % 8 == 0 && w.rounded != 16;
}
inline bool is_whole(const Codebooks& w, const Tile& tile) {
  return tile.num_vectors == w.group_vectors;
}

// Add a tile at the edge, one code after the other; `sums` are those of one stream.
template <typename Value>
void add_edge(const Codebooks& w, const Tile& tile, const float* table, const Strip& strip,
              const Value* x, float* sums, int64_t lanes, int streams) {
  const int64_t own = lanes / strip.rows;
  int64_t bit = tile.bit;
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    float* to = sums + row / strip.rows * lanes * streams + row % strip.rows * own;
    for (int64_t v = 0; v < tile.num_vectors; ++v, bit += w.bits) {
      const uint32_t code = code_at(w.codes, bit, w.bits);
      for (int d = 0; d < w.dim; ++d)
        *to += table[d * w.centroids() + code] * float(x[v * w.dim + d]);
    }
  }
}

// Multiply S streams from `first` on; y is [stream, rows].
//
// A way's reader adds tiles to sums, [as many rows as codes at once cover, stream, lane].
template <typename Way, int S>
void times_streams(const Codebooks& w, const typename Way::Input& x, int64_t first, float* y,
                   int threads) {
  constexpr int64_t LANES = Way::LANES;
  const Strip strip(w, Way::CODES);
  const auto all = Way::template ordered<S>(w, strip, x, first);
  const int64_t own = LANES / strip.rows, units = (w.group_rows + strip.rows - 1) / strip.rows;
  const int64_t parts = all.size() / w.column_groups;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Way reader(w);  // of each thread's own, so that it stays in registers
    Lines sums(units * LANES * S), table(w.centroids() * w.dim);
#pragma omp for schedule(static)
    for (int64_t row_group = 0; row_group < w.row_groups; ++row_group) {
      std::fill_n(sums.data(), units * LANES * S, 0.0f);
      for (int64_t column_group = 0; column_group < w.column_groups; ++column_group) {
        const Tile tile(w, row_group, column_group);
        const int64_t number = row_group * w.column_groups + column_group;
        if (is_whole(w, tile)) {
          reader.template add<S>(w, tile, number, strip, &all[column_group * parts], sums.data());
          continue;
        }
        fill_table(w, number, table.data());
        for (int s = 0; s < S; ++s)
          add_edge(w, tile, table.data(), strip, x.vectors[first + s] + tile.first_vector * w.dim,
                   sums.data() + LANES * s, LANES, S);
      }
      const Tile tile(w, row_group, 0);
      for (int64_t row = 0; row < tile.num_rows; ++row)
        for (int s = 0; s < S; ++s) {
          const float* from =
              sums.data() + (row / strip.rows * S + s) * LANES + row % strip.rows * own;
          float sum = 0;
          for (int64_t lane = 0; lane < own; ++lane) sum += from[lane];
          y[s * w.rows + tile.first_row + row] = sum;
        }
    }
  }
}
