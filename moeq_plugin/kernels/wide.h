// What products on AVX-512 with its byte permutations (VBMI) and bfloat products (BF16) share.
//
// 64 codes are looked up at once, each byte of a bfloat by itself, as there is an instruction that
// looks 64 bytes up in 64 others. What was found is multiplied with several vectors of bfloats at
// once. A bfloat is one vector; a float is the exact sum of three bfloats, so three.

#pragma once

#include "codes.h"

#ifdef WIDE

constexpr int64_t WIDE_CODES = 64;  // that are looked up at once

// A vector in registers, which may be an element of a container.
struct alignas(64) Wide {
  __m512i all;
};

// Takes 64 codes out of the bytes at a pointer. The bits above a code are those of the next.
struct WideCodes {
  __m512i bytes, shifts;
  int64_t step;        // bytes of 64 codes
  const uint8_t* end;  // of what may be read
  WideCodes(int bits, const uint8_t* end) : step(8 * bits), end(end) {
    alignas(64) uint8_t from[64], by[64];
    for (int i = 0; i < 64; ++i) {
      from[i] = i / 8 * bits + i % 8;
      by[i] = i % 8 * bits;
    }
    bytes = _mm512_load_si512(from);
    shifts = _mm512_load_si512(by);
  }
  // Behind the end there are zeros.
  __m512i at(const uint8_t* p) const {
    const int64_t left = end - p;
    // a masked load of bytes takes several times as long
    const __m512i all = left < 64 ? _mm512_maskz_loadu_epi8((uint64_t(1) << left) - 1, p)
                                  : _mm512_loadu_si512(p);
    return _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(bytes, all));
  }
};

// Up to 64 * PARTS bytes in registers: 1 for up to 6 bits, 2 for 7, 4 for 8.
template <int PARTS>
struct Bytes {
  __m512i part[PARTS];
  __m512i at(__m512i code) const {
    if constexpr (PARTS == 1) return _mm512_permutexvar_epi8(code, part[0]);
    if constexpr (PARTS == 2) return _mm512_permutex2var_epi8(part[0], code, part[1]);
    if constexpr (PARTS == 4) {
      const __m512i low = _mm512_permutex2var_epi8(part[0], code, part[1]);
      const __m512i high = _mm512_permutex2var_epi8(part[2], code, part[3]);
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high);
    }
  }
};

inline constexpr int parts_for(int bits) { return bits < 7 ? 1 : bits == 7 ? 2 : 4; }

// Bfloats that are looked up, both bytes apart.
template <int PARTS>
struct Entries {
  Bytes<PARTS> low, high;

  // 64 floats of a part, by 16, rounded to bfloats as everywhere
  void set(int part, __m512 a, __m512 b, __m512 c, __m512 d) {
    alignas(64) static constexpr Every<0> even{};
    alignas(64) static constexpr Every<1> odd{};
    const __m512i first = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    const __m512i second = (__m512i)_mm512_cvtne2ps_pbh(d, c);
    low.part[part] = _mm512_permutex2var_epi8(first, _mm512_load_si512(&even), second);
    high.part[part] = _mm512_permutex2var_epi8(first, _mm512_load_si512(&odd), second);
  }
  // In each quarter, `first` has its codes 0 to 7 and `second` 8 to 15.
  void at(__m512i code, __m512i& first, __m512i& second) const {
    const __m512i lower = low.at(code), upper = high.at(code);
    first = _mm512_unpacklo_epi8(lower, upper);
    second = _mm512_unpackhi_epi8(lower, upper);
  }

 private:
  template <int FIRST>
  struct Every {
    uint8_t second[64];
    constexpr Every() : second() {
      for (int i = 0; i < 64; ++i) second[i] = 2 * i + FIRST;
    }
  };
};

inline __m512 floats_of(__m128i bytes, __m512 scale) {
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale);
}

// Vectors of bfloats, [count, columns].
struct Streams {
  int64_t columns;
  std::vector<Bfloat> own;
  std::vector<const Bfloat*> vectors;

  // Of bfloats as they are.
  Streams(const Bfloat* x, int64_t rows, int64_t columns) : columns(columns) {
    for (int64_t row = 0; row < rows; ++row)
      vectors.push_back(x + row * columns);
  }
  // Of floats: three for each row, which sum up to it.
  Streams(const float* x, int64_t rows, int64_t columns) : columns(columns) {
    own.resize(3 * rows * columns);
    for (int64_t row = 0; row < rows; ++row, x += columns) {
      Bfloat* to = own.data() + 3 * row * columns;
      for (int part = 0; part < 3; ++part) vectors.push_back(to + part * columns);
      for (int64_t i = 0; i < columns; ++i) {
        float left = x[i];
        for (int part = 0; part < 3; ++part) {
          const Bfloat taken = part ? Bfloat(left) : truncated(left);
          to[part * columns + i] = taken;
          left = std::isfinite(left) ? left - float(taken) : 0;
        }
      }
    }
  }

 private:
  static Bfloat truncated(float value) {  // rounding up could make the largest floats infinite
    if (!std::isfinite(value)) return Bfloat(value);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    Bfloat result;
    result.upper = bits >> 16;
    return result;
  }
};

// Write rows of results: each the sum of as many streams as it was cut into.
inline void write_results(const std::vector<float>& sums, int64_t rows, int64_t count, float* y) {
  for (int64_t i = 0; i < rows * count; ++i) {
    const float* of = sums.data() + i / count * 3 * count + i % count;
    y[i] = (of[2 * count] + of[count]) + of[0];
  }
}
inline void write_results(const std::vector<float>& sums, int64_t rows, int64_t count, Bfloat* y) {
  for (int64_t i = 0; i < rows * count; ++i) y[i] = Bfloat(sums[i]);
}
#endif
