// Products with codebook weights of up to 6 bits on AVX2: 32 codes at once, each byte of a bfloat looked
// up by itself, 16 entries at a time. Activations are floats.

#pragma once

#include "codebooks_fast.h"

#ifdef MEDIUM

constexpr int64_t SHUFFLED_CODES = 32;
constexpr int MAX_SHUFFLED = 6;  // bits of a code: 4 times 16 entries

inline bool is_shuffled(const Codebooks& w) {
  return w.bits <= MAX_SHUFFLED && fits(w, SHUFFLED_CODES);
}

// Takes 32 codes out of the bytes at a pointer, of which it reads up to 16 too many.
struct ShuffledCodes {
  __m256i bytes, shift, left[4], mask[4];  // four codes share a word before they are apart
  int bits;

  explicit ShuffledCodes(int bits) : bits(bits) {
    alignas(32) uint8_t from[32];
    alignas(32) int32_t by[8];
    for (int word = 0; word < 4; ++word) {
      for (int half = 0; half < 2; ++half) {
        by[4 * half + word] = 4 * bits * word % 8;
        for (int part = 0; part < 4; ++part)
          from[16 * half + 4 * word + part] = 4 * bits * word / 8 + part;
      }
      left[word] = _mm256_set1_epi32((8 - bits) * word);
      mask[word] = _mm256_set1_epi32(((1 << bits) - 1) << (8 * word));
    }
    bytes = _mm256_load_si256((const __m256i*)from);
    shift = _mm256_load_si256((const __m256i*)by);
  }

  __m256i at(const uint8_t* p) const {
    const __m128i first = _mm_loadu_si128((const __m128i*)p);
    const __m128i second = _mm_loadu_si128((const __m128i*)(p + 2 * bits));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
    const __m256i four = _mm256_srlv_epi32(_mm256_shuffle_epi8(both, bytes), shift);
    __m256i apart = _mm256_and_si256(four, mask[0]);
    for (int i = 1; i < 4; ++i)
      apart = _mm256_or_si256(apart,
                              _mm256_and_si256(_mm256_sllv_epi32(four, left[i]), mask[i]));
    return apart;
  }
};

// Up to 64 bfloats, both bytes apart.
struct ShuffledEntries {
  __m256i low[4], high[4];  // each 16 entries twice

  // Round as everywhere.
  void set(const int8_t* book, int64_t entries, float scale) {
    alignas(16) uint8_t bytes[2][64] = {};
    for (int64_t i = 0; i < entries; ++i) {
      const float value = book[i] * scale;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      bits += 0x7fff + ((bits >> 16) & 1);
      bytes[0][i] = bits >> 16;
      bytes[1][i] = bits >> 24;
    }
    for (int part = 0; part < 4; ++part) {
      low[part] = twice(bytes[0] + 16 * part);
      high[part] = twice(bytes[1] + 16 * part);
    }
  }

 private:
  static __m256i twice(const uint8_t* from) {
    return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)from));
  }
};

// The way of AVX2: see times_streams.
template <int DIM>
struct ShuffledWay {
  struct Input {
    std::vector<const float*> vectors;
  };
  struct alignas(32) Eight {
    float lane[8];
  };
  static constexpr int64_t CODES = SHUFFLED_CODES, LANES = 8;
  ShuffledCodes codes;

  explicit ShuffledWay(const Codebooks& w) : codes(w.bits) {}

  // Return activations in the order in which centroids are found: [chunk, dim, 4, stream].
  template <int S>
  static std::vector<Eight> ordered(const Codebooks& w, const Strip& strip, const Input& x,
                                    int64_t first) {
    std::vector<Eight> result(w.column_groups * strip.chunks * DIM * 4 * S);
    Eight* to = result.data();
    for (int64_t chunk = 0; chunk < w.column_groups * strip.chunks; ++chunk)
      for (int d = 0; d < DIM; ++d)
        for (int four = 0; four < 4; ++four)
          for (int s = 0; s < S; ++s, ++to)
            for (int lane = 0; lane < 8; ++lane) {
              const int64_t vector = strip.vector(w, chunk, lane / 4 * 16 + four * 4 + lane % 4);
              if (vector < w.vectors) to->lane[lane] = x.vectors[first + s][vector * DIM + d];
            }
    return result;
  }

  template <int S>
  void add(const Codebooks& w, const Tile& tile, int64_t number, const Strip& strip, const Eight* x,
           float* sums) const {
    // bfloats are what decoding gives; other weights get their scale at the end
    const bool scales = w.rounded == 8;
    const __m256 scale = _mm256_set1_ps(scales ? 1 : w.scales[number]);
    ShuffledEntries book[DIM];
    for (int d = 0; d < DIM; ++d)
      book[d].set(w.books + (number * DIM + d) * w.centroids(), w.centroids(),
                  scales ? w.scales[number] : 1);
    const uint8_t* p = w.codes + tile.bit / 8;
    for (int64_t row = 0; row < tile.num_rows; row += strip.rows, sums += LANES * S) {
      __m256 sum[S];
      for (int s = 0; s < S; ++s) sum[s] = _mm256_setzero_ps();
      const Eight* at = x;
      for (int64_t chunk = 0; chunk < strip.chunks; ++chunk, p += 4 * codes.bits, at += DIM * 4 * S)
        add_chunk<S>(codes.at(p), book, at, sum);
      for (int s = 0; s < S; ++s) {
        const __m256 before = _mm256_loadu_ps(sums + LANES * s);
        _mm256_storeu_ps(sums + LANES * s, _mm256_fmadd_ps(scale, sum[s], before));
      }
    }
  }

 private:
  template <int S>
  static void add_chunk(__m256i code, const ShuffledEntries* book, const Eight* x,
                        __m256 (&sum)[S]) {
    __m256i index[4];  // a shuffle gives zero where bit 7 is set: but for the 16 codes of its part
    for (int part = 0; part < 4; ++part)
      index[part] = _mm256_adds_epu8(_mm256_xor_si256(code, _mm256_set1_epi8(16 * part)),
                                     _mm256_set1_epi8(0x70));
    for (int d = 0; d < DIM; ++d) {
      const __m256i low = found(book[d].low, index), high = found(book[d].high, index);
      for (int half = 0; half < 2; ++half) {
        const __m256i eight = half ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
        const __m256i zero = _mm256_setzero_si256();
        const __m256 value[2] = {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, eight)),
                                 _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, eight))};
        for (int i = 0; i < 2; ++i)
          for (int s = 0; s < S; ++s, ++x)
            sum[s] = _mm256_fmadd_ps(value[i], _mm256_load_ps(x->lane), sum[s]);
      }
    }
  }

  static __m256i found(const __m256i (&entries)[4], const __m256i (&index)[4]) {
    const __m256i a = _mm256_shuffle_epi8(entries[0], index[0]);
    const __m256i b = _mm256_shuffle_epi8(entries[1], index[1]);
    const __m256i c = _mm256_shuffle_epi8(entries[2], index[2]);
    const __m256i d = _mm256_shuffle_epi8(entries[3], index[3]);
    return _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
  }
};

template <int DIM>
void times_shuffled(const Codebooks& w, const float* x, int64_t rows, float* y, int threads) {
  typename ShuffledWay<DIM>::Input input;
  for (int64_t row = 0; row < rows; ++row) input.vectors.push_back(x + row * w.columns);
  in_batches<4>(rows, [&](auto s, int64_t first) {
    times_streams<ShuffledWay<DIM>, s.value>(w, input, first, y + first * w.rows, threads);
  });
}

// Multiply rows of floats.
inline void times_shuffled(const Codebooks& w, const float* x, int64_t rows, float* y, int threads) {
  if (w.dim == 1) times_shuffled<1>(w, x, rows, y, threads);
  else times_shuffled<2>(w, x, rows, y, threads);
}
#endif
