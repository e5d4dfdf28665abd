// Products of packed weights with activations, on CPUs: y = x W^T, W never whole in memory.
//
// Two formats. A *codebook* weight (moeq_plugin/core/codebook_layout.py) is cut into tiles of rows
// times columns; each tile has its own codebook, and its indices lie together, row by row. A *grid*
// weight is compressed-tensors' `pack-quantized`: every row a stream of codes, with a scale and
// perhaps a zero point for each group of columns.
//
// A vector of activations is multiplied while codes are looked up, in float32. For many of them the
// caller decodes a strip of the weight into the cache and takes a matrix product.
//
// There is no header of torch in here, so that it compiles in seconds; python hands over pointers.
//
// Codes are read in chunks of LANES. There are three ways: AVX-512, which looks up in registers, AVX2,
// which loads centroid by centroid, and plain loops for all others. Machines are little endian.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define MEDIUM 1
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "codes are read as little endian words");

namespace {

constexpr int64_t MAX_LOOKED_UP = 8;  // bits of a code that are read many at a time

// Loads and stores of whole lanes that cross a cache line take twice as long.
struct alignas(64) Line {
  float lane[16];
};
struct Lines {
  std::vector<Line> lines;
  explicit Lines(int64_t count) : lines(count / 16 + 1) {}
  float* data() { return lines.data()->lane; }
};

// ---- Codes --------------------------------------------------------------------------------------

uint32_t code_at(const uint8_t* codes, int64_t bit, int bits) {
  uint32_t word;
  std::memcpy(&word, codes + (bit >> 3), 4);
  return (word >> (bit & 7)) & ((1u << bits) - 1);
}

#ifdef WIDE
constexpr int64_t LANES = 16;

// Takes 16 codes of up to 8 bits out of the 16 bytes at a pointer.
struct Codes {
  __m512i bytes, shift, mask;
  explicit Codes(int bits) {
    alignas(64) uint8_t from[64];
    alignas(64) int32_t by[16];
    for (int lane = 0; lane < 16; ++lane) {
      const int first = lane * bits / 8;
      for (int part = 0; part < 4; ++part)
        from[4 * lane + part] = first + part < 16 ? first + part : 0x80;
      by[lane] = lane * bits % 8;
    }
    bytes = _mm512_load_si512(from);
    shift = _mm512_load_si512(by);
    mask = _mm512_set1_epi32((1 << bits) - 1);
  }
  __m512i at(const uint8_t* p) const {
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
    return _mm512_and_si512(_mm512_srlv_epi32(_mm512_shuffle_epi8(all, bytes), shift), mask);
  }
};

// A table of up to 16 * PARTS words in registers.
template <int PARTS>
struct Table {
  __m512i part[PARTS];

  __m512i at(__m512i code) const {
    if constexpr (PARTS == 1) return _mm512_permutexvar_epi32(code, part[0]);
    if constexpr (PARTS == 2) return _mm512_permutex2var_epi32(part[0], code, part[1]);
    if constexpr (PARTS == 4) return of_four(code, 0);
    if constexpr (PARTS == 8) {
      const __mmask16 upper = _mm512_test_epi32_mask(code, _mm512_set1_epi32(64));
      return _mm512_mask_blend_epi32(upper, of_four(code, 0), of_four(code, 4));
    }
  }

 private:
  __m512i of_four(__m512i code, int from) const {
    const __mmask16 upper = _mm512_test_epi32_mask(code, _mm512_set1_epi32(32));
    const __m512i low = _mm512_permutex2var_epi32(part[from], code, part[from + 1]);
    const __m512i high = _mm512_permutex2var_epi32(part[from + 2], code, part[from + 3]);
    return _mm512_mask_blend_epi32(upper, low, high);
  }
};

// The centroids of a codebook, looked up for 16 vectors at a time.
template <int DIM, int PARTS>
struct Floats {
  Table<PARTS> of[DIM];
  Floats(const float* table, int64_t centroids) {
    for (int d = 0; d < DIM; ++d)
      for (int i = 0; i < PARTS; ++i)
        of[d].part[i] = _mm512_loadu_si512(table + d * centroids + 16 * i);
  }
  void at(__m512i code, __m512 (&values)[DIM]) const {
    for (int d = 0; d < DIM; ++d) values[d] = _mm512_castsi512_ps(of[d].at(code));
  }
};

// Likewise where both coordinates are bfloats, which share a word: half the lookups.
template <int PARTS>
struct Pairs {
  Table<PARTS> of;
  Pairs(const float* table, int64_t centroids) {
    for (int i = 0; i < PARTS; ++i) {
      const __m512i first = _mm512_loadu_si512(table + 16 * i);
      const __m512i second = _mm512_loadu_si512(table + centroids + 16 * i);
      of.part[i] = _mm512_or_si512(_mm512_srli_epi32(first, 16), second);
    }
  }
  void at(__m512i code, __m512 (&values)[2]) const {
    const __m512i both = of.at(code);
    values[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    values[1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
  }
};
#elif defined(MEDIUM)
constexpr int64_t LANES = 8;

// Takes 8 codes of up to 8 bits out of the 8 bytes at a pointer.
struct Codes {
  __m256i bytes, shift, mask;
  explicit Codes(int bits) {
    alignas(32) uint8_t from[32];
    alignas(32) int32_t by[8];
    for (int lane = 0; lane < 8; ++lane) {
      const int first = lane * bits / 8;
      for (int part = 0; part < 4; ++part)
        from[4 * lane + part] = first + part < 8 ? first + part : 0x80;
      by[lane] = lane * bits % 8;
    }
    bytes = _mm256_load_si256((const __m256i*)from);
    shift = _mm256_load_si256((const __m256i*)by);
    mask = _mm256_set1_epi32((1 << bits) - 1);
  }
  __m256i at(const uint8_t* p) const {
    const __m256i all = _mm256_broadcastsi128_si256(_mm_loadl_epi64((const __m128i*)p));
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_shuffle_epi8(all, bytes), shift), mask);
  }
};
#else
constexpr int64_t LANES = 8;

struct Codes {
  uint64_t mask;
  explicit Codes(int bits) : mask((uint64_t(1) << bits) - 1) {}
};
#endif

// ---- Codebooks ----------------------------------------------------------------------------------

struct Codebooks {
  int64_t rows, columns;               // of the weight
  int64_t vectors;                     // of a row: columns / dim
  int64_t row_groups, column_groups;   // tiles
  int64_t group_rows, group_vectors;   // of a tile; the last ones may have fewer
  int bits, dim;                       // of an index; columns that share one
  int rounded;                         // centroids are rounded to: 32 float, 16 half, 8 bfloat
  const uint8_t* codes;                // and behind them 16 bytes that may be read
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

// Round to the nearest float with as many bits of mantissa as a half or a bfloat has, ties to even.
float rounded_to(int kind, float value) {
  if (kind == 32) return value;
  if (kind == 16 && std::fabs(value) < 0x1p-14f) return std::nearbyint(value * 0x1p24f) * 0x1p-24f;
  const int dropped = kind == 16 ? 13 : 16;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits += (1u << (dropped - 1)) - 1 + ((bits >> dropped) & 1);
  bits &= ~0u << dropped;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Write the centroids of a tile, [dim, centroids]; both are what decoding gives, bit for bit.
void fill_table(const Codebooks& w, int64_t tile, float* table) {
  const int64_t entries = w.centroids() * w.dim;
  const int8_t* book = w.books + tile * entries;
  const float scale = w.scales[tile];
  int64_t done = 0;
#ifdef WIDE
  for (; w.rounded != 16 && done + 16 <= entries; done += 16) {
    const __m128i raw = _mm_loadu_si128((const __m128i*)(book + done));
    __m512 value = _mm512_mul_ps(
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw)), _mm512_set1_ps(scale));
    if (w.rounded == 8) {
      __m512i bits = _mm512_castps_si512(value);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      value = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)));
    }
    _mm512_storeu_ps(table + done, value);
  }
#endif
  for (; done < entries; ++done) table[done] = rounded_to(w.rounded, book[done] * scale);
}

#ifdef WIDE
int64_t x_at(const Codebooks& w, int64_t v, int d) { return d * w.vectors + v; }
#else
int64_t x_at(const Codebooks& w, int64_t v, int d) { return v * w.dim + d; }
#endif

// Add a row's part of a tile, times activations, to `sums`; x begins with the tile's first vector.
void add_row(const Codebooks& w, const Tile& tile, int64_t bit, const float* table,
             const float* x, int64_t done, float* sums) {
  for (int64_t v = done; v < tile.num_vectors; ++v) {
    const uint32_t code = code_at(w.codes, bit + v * w.bits, w.bits);
    for (int d = 0; d < w.dim; ++d)
      sums[v % LANES] += table[d * w.centroids() + code] * x[x_at(w, v, d)];
  }
}

#ifdef WIDE
template <int DIM, typename Lookup>
void add_tile(const Codebooks& w, const Tile& tile, const Codes& codes, const float* table,
              const float* x, float* sums) {
  const Lookup lookup(table, w.centroids());
  const int64_t row_bits = tile.num_vectors * w.bits, vectors = w.vectors;
  const int64_t whole = tile.num_vectors / LANES * LANES;
  for (int64_t row = 0; row < tile.num_rows; ++row, sums += LANES) {
    const int64_t bit = tile.bit + row * row_bits;
    // a row that begins within a byte is left to the plain loop below
    const int64_t fast = bit % 8 ? 0 : whole;
    const uint8_t* p = w.codes + bit / 8;
    __m512 sum = _mm512_loadu_ps(sums);
    for (int64_t v = 0; v < fast; v += LANES, p += 2 * w.bits) {
      __m512 values[DIM];
      lookup.at(codes.at(p), values);
      for (int d = 0; d < DIM; ++d)
        sum = _mm512_fmadd_ps(values[d], _mm512_loadu_ps(x + d * vectors + v), sum);
    }
    _mm512_storeu_ps(sums, sum);
    if (fast < tile.num_vectors) add_row(w, tile, bit, table, x, fast, sums);
  }
}
#else
// Return the sum over a chunk of 8 vectors whose centroids are loaded one by one, in 8 lanes.
#ifdef MEDIUM
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
#endif

using AddTile = void (*)(const Codebooks&, const Tile&, const Codes&, const float*, const float*,
                         float*);

void add_plainly(const Codebooks& w, const Tile& tile, const Codes&, const float* table,
                 const float* x, float* sums) {
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    const int64_t bit = tile.bit + row * tile.num_vectors * w.bits;
    add_row(w, tile, bit, table, x, 0, sums + row * LANES);
  }
}

#ifdef WIDE
template <int PARTS>
AddTile way_for_parts(const Codebooks& w) {
  if (w.dim == 1) return add_tile<1, Floats<1, PARTS>>;
  return w.rounded == 8 ? add_tile<2, Pairs<PARTS>> : add_tile<2, Floats<2, PARTS>>;
}
#else
template <int DIM>
AddTile way_for_bits(int bits) {
  constexpr AddTile ways[] = {add_tile<DIM, 1>, add_tile<DIM, 2>, add_tile<DIM, 3>, add_tile<DIM, 4>,
                              add_tile<DIM, 5>, add_tile<DIM, 6>, add_tile<DIM, 7>, add_tile<DIM, 8>};
  return ways[bits - 1];
}
#endif

AddTile way_for(const Codebooks& w) {
  if (w.dim > 2 || w.bits > MAX_LOOKED_UP) return add_plainly;
#ifdef WIDE
  if (w.bits > 7) return add_plainly;
  if (w.bits > 6) return way_for_parts<8>(w);
  if (w.bits > 5) return way_for_parts<4>(w);
  return w.bits > 4 ? way_for_parts<2>(w) : way_for_parts<1>(w);
#else
  return w.dim == 2 ? way_for_bits<2>(w.bits) : way_for_bits<1>(w.bits);
#endif
}

void times_vector(const Codebooks& w, const float* x, float* y, int threads) {
#ifdef WIDE
  Lines by_coordinate(w.columns);
  for (int64_t v = 0; v < w.vectors; ++v)
    for (int d = 0; d < w.dim; ++d) by_coordinate.data()[x_at(w, v, d)] = x[v * w.dim + d];
  x = by_coordinate.data();
#endif
  const AddTile add = way_for(w);
  const Codes codes(std::min<int>(w.bits, MAX_LOOKED_UP));
#pragma omp parallel num_threads(threads)
  {
    Lines table(w.centroids() * w.dim + LANES), sums(w.group_rows * LANES);
#pragma omp for schedule(static)
    for (int64_t row_group = 0; row_group < w.row_groups; ++row_group) {
      std::fill_n(sums.data(), w.group_rows * LANES, 0.0f);
      for (int64_t column_group = 0; column_group < w.column_groups; ++column_group) {
        const Tile tile(w, row_group, column_group);
        fill_table(w, row_group * w.column_groups + column_group, table.data());
        add(w, tile, codes, table.data(), x + x_at(w, tile.first_vector, 0), sums.data());
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

// A decoded weight is written as float or, where the activations are that, as bfloat.
struct Bfloat {
  uint16_t upper;
  Bfloat() = default;
  explicit Bfloat(float value) {
    value = rounded_to(8, value);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    upper = bits >> 16;
  }
};

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

#ifdef WIDE
// Whole chunks of pairs of bfloats: what is looked up is what is written.
template <int PARTS>
bool write_pairs(const Codebooks& w, const Tile& tile, const Codes& codes, const float* table,
                 Bfloat* out) {
  const int64_t row_bits = tile.num_vectors * w.bits;
  if (tile.bit % 8 || row_bits % 8 || tile.num_vectors % LANES) return false;
  const Pairs<PARTS> pairs(table, w.centroids());
  const uint8_t* p = w.codes + tile.bit / 8;
  for (int64_t row = 0; row < tile.num_rows; ++row)
    for (int64_t v = 0; v < tile.num_vectors; v += LANES, p += 2 * w.bits)
      _mm512_storeu_si512(out + row * w.columns + 2 * v, pairs.of.at(codes.at(p)));
  return true;
}

bool write_fast(const Codebooks& w, const Tile& tile, const Codes& codes, const float* table,
                Bfloat* out) {
  if (w.dim != 2 || w.rounded != 8 || w.bits > 7) return false;
  if (w.bits > 6) return write_pairs<8>(w, tile, codes, table, out);
  if (w.bits > 5) return write_pairs<4>(w, tile, codes, table, out);
  return w.bits > 4 ? write_pairs<2>(w, tile, codes, table, out)
                    : write_pairs<1>(w, tile, codes, table, out);
}
#endif

template <typename... Any>
bool write_fast(const Any&...) {
  return false;
}

// Write whole row groups of the weight, [rows, columns].
template <typename T>
void decode(const Codebooks& w, int64_t begin, int64_t end, T* out, int threads) {
  const Codes codes(std::min<int>(w.bits, MAX_LOOKED_UP));
#pragma omp parallel num_threads(threads)
  {
    Lines table(w.centroids() * w.dim + LANES);
    std::vector<T> centroids(w.centroids() * w.dim);
#pragma omp for schedule(static)
    for (int64_t group = begin; group < end; ++group)
      for (int64_t column_group = 0; column_group < w.column_groups; ++column_group) {
        const Tile tile(w, group, column_group);
        fill_table(w, group * w.column_groups + column_group, table.data());
        T* to = out + (group - begin) * w.group_rows * w.columns + tile.first_vector * w.dim;
        if (write_fast(w, tile, codes, table.data(), to)) continue;
        for (int64_t c = 0; c < w.centroids(); ++c)
          for (int d = 0; d < w.dim; ++d)
            centroids[c * w.dim + d] = T(table.data()[d * w.centroids() + c]);
        if (w.dim == 1) write_tile<T, 1>(w, tile, centroids.data(), to);
        else if (w.dim == 2) write_tile<T, 2>(w, tile, centroids.data(), to);
        else write_tile<T, 0>(w, tile, centroids.data(), to);
      }
  }
}

// ---- Grids --------------------------------------------------------------------------------------

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
float row_product(const Grid& w, int64_t row, const uint8_t* row_codes, const Codes& codes,
                  const float* x, const float* sum_of_x) {
  const float* scales = w.scales + row * w.groups();
  const uint8_t* zeros = w.zeros ? w.zeros + row * w.groups() : nullptr;
  const float middle = 1 << (w.bits - 1);
  float rest = 0;  // what lanes do not hold
#ifdef WIDE
  __m512 total = _mm512_setzero_ps();
#elif defined(MEDIUM)
  __m256 total = _mm256_setzero_ps();
#else
  float total[LANES] = {};
#endif
  for (int64_t group = 0; group < w.groups(); ++group) {
    const uint8_t* p = row_codes + group * w.group_size * w.bits / 8;
    const float* part = x + group * w.group_size;
    int64_t column = 0;
#ifdef WIDE
    __m512 sums = _mm512_setzero_ps();
    for (; column + LANES <= w.group_size; column += LANES, p += 2 * w.bits)
      sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes.at(p)), _mm512_loadu_ps(part + column), sums);
    total = _mm512_fmadd_ps(_mm512_set1_ps(scales[group]), sums, total);
#elif defined(MEDIUM)
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
#ifdef WIDE
  return rest + _mm512_reduce_add_ps(total);
#elif defined(MEDIUM)
  alignas(32) float lanes[LANES];
  _mm256_store_ps(lanes, total);
  for (int i = 0; i < LANES; ++i) rest += lanes[i];
  return rest;
#else
  for (int i = 0; i < LANES; ++i) rest += total[i];
  return rest;
#endif
}

// Chunks are read 16 bytes at a time, and the last ones of the last row would reach behind the tensor.
std::vector<uint8_t> last_row(const Grid& w) {
  std::vector<uint8_t> copy(w.row_bytes + 16);
  std::memcpy(copy.data(), w.codes + (w.rows - 1) * w.row_bytes, w.row_bytes);
  return copy;
}

void times_vector(const Grid& w, const float* x, float* y, int threads) {
  std::vector<float> sum_of_x(w.groups());
  for (int64_t column = 0; column < w.columns; ++column) sum_of_x[column / w.group_size] += x[column];
  const std::vector<uint8_t> last = last_row(w);
  const Codes codes(w.bits);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < w.rows; ++row) {
    const uint8_t* row_codes = row + 1 < w.rows ? w.codes + row * w.row_bytes : last.data();
    y[row] = row_product(w, row, row_codes, codes, x, sum_of_x.data());
  }
}

// Write rows of the weight, [rows, columns].
template <typename T>
void decode(const Grid& w, int64_t begin, int64_t end, T* out, int threads) {
  const std::vector<uint8_t> last = last_row(w);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* codes = row + 1 < w.rows ? w.codes + row * w.row_bytes : last.data();
    for (int64_t group = 0; group < w.groups(); ++group) {
      const int64_t scale = row * w.groups() + group;
      const int zero = w.zeros ? w.zeros[scale] : 1 << (w.bits - 1);
      T values[256];  // what each code of the group stands for
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

}  // namespace

extern "C" {
void moeq_codebook_times(const Codebooks* w, const float* x, float* y, int threads) {
  times_vector(*w, x, y, threads);
}
void moeq_codebook_decode(const Codebooks* w, int64_t begin_group, int64_t end_group, void* out,
                          int is_bfloat, int threads) {
  if (is_bfloat) decode(*w, begin_group, end_group, static_cast<Bfloat*>(out), threads);
  else decode(*w, begin_group, end_group, static_cast<float*>(out), threads);
}
void moeq_grid_times(const Grid* w, const float* x, float* y, int threads) {
  times_vector(*w, x, y, threads);
}
void moeq_grid_decode(const Grid* w, int64_t begin_row, int64_t end_row, void* out, int is_bfloat,
                      int threads) {
  if (is_bfloat) decode(*w, begin_row, end_row, static_cast<Bfloat*>(out), threads);
  else decode(*w, begin_row, end_row, static_cast<float*>(out), threads);
}
}
