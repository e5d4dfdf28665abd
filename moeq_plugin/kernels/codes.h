// Codes of a few bits, and the types of what goes in and out.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__) && \
    defined(__AVX512BF16__)
#define WIDE 1
#endif
#if defined(__AVX2__) && defined(__FMA__)
#define MEDIUM 1
#include <immintrin.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "codes are read as little endian words");

constexpr int64_t MAX_LOOKED_UP = 8;  // bits of a code that are read many at a time
constexpr int64_t LANES = 8;          // codes of a chunk, which begins and ends with a byte

// Loads and stores of whole lanes that cross a cache line take twice as long.
struct alignas(64) Line {
  float lane[16];
};
struct Lines {
  std::vector<Line> lines;
  explicit Lines(int64_t count) : lines(count / 16 + 1) {}
  float* data() { return lines.data()->lane; }
};

inline uint32_t code_at(const uint8_t* codes, int64_t bit, int bits) {
  uint32_t word;
  std::memcpy(&word, codes + (bit >> 3), 4);
  return (word >> (bit & 7)) & ((1u << bits) - 1);
}

// Round to the nearest float with as many bits of mantissa as a half or a bfloat has, ties to even.
// Below the normal halves there are fewer, but a half times a whole number is a multiple of the least
// one, and is not rounded there at all.
inline float rounded_to(int kind, float value) {
  if (kind == 32) return value;
  const int dropped = kind == 16 ? 13 : 16;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits += (1u << (dropped - 1)) - 1 + ((bits >> dropped) & 1);
  bits &= ~0u << dropped;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The upper half of a float.
struct Bfloat {
  uint16_t upper;
  Bfloat() = default;
  explicit Bfloat(float value) {
    uint32_t bits;
    // a NaN may not become an infinity
    value = value == value ? rounded_to(8, value) : NAN;
    std::memcpy(&bits, &value, 4);
    upper = bits >> 16;
  }
  explicit operator float() const {
    const uint32_t bits = uint32_t(upper) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

// Call `by(constant, first)` for all streams, `constant` of them at a time.
template <int MOST, typename By>
void in_batches(int64_t count, By by) {
  int64_t first = 0;
  for (; first + MOST <= count; first += MOST) by(std::integral_constant<int, MOST>(), first);
  if constexpr (MOST > 4)
    for (; first + 4 <= count; first += 4) by(std::integral_constant<int, 4>(), first);
  if (count - first == 3) by(std::integral_constant<int, 3>(), first);
  if (count - first == 2) by(std::integral_constant<int, 2>(), first);
  if (count - first == 1) by(std::integral_constant<int, 1>(), first);
}

#ifdef MEDIUM
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
struct Codes {
  uint64_t mask;
  explicit Codes(int bits) : mask((uint64_t(1) << bits) - 1) {}
};
#endif
