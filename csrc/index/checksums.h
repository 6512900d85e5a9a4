// CRC-32 as zlib computes it, and pages of files that are compared with theirs before they are used.
// megatron_mm/shards/checksums.py holds the reference and says what a page is.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace megatron_mm {

// Table k of the polynomial takes a byte that k bytes follow ("slicing by 8"): eight bytes are taken in one step.
inline const std::array<std::array<uint32_t, 256>, 8>& crc32_tables() {
  static const auto tables = [] {
    std::array<std::array<uint32_t, 256>, 8> made{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t crc = byte;
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xEDB88320u : 0u);
      made[0][byte] = crc;
    }
    for (int k = 1; k < 8; ++k) {
      for (int byte = 0; byte < 256; ++byte) {
        const uint32_t before = made[k - 1][byte];
        made[k][byte] = (before >> 8) ^ made[0][before & 255];
      }
    }
    return made;
  }();
  return tables;
}

#if defined(__x86_64__) && defined(__GNUC__)
// The state after at least 64 bytes, a multiple of 16: carry-less products fold 64 at a time (Gopal et al. 2009, "Fast
// CRC computation for generic polynomials using PCLMULQDQ"; the constants are the paper's for this polynomial).
__attribute__((target("pclmul,sse4.1"))) inline uint32_t fold_crc32(uint32_t crc, const uint8_t* data,
                                                                   int64_t num_bytes) {
  const auto load = [](const uint8_t* from) __attribute__((target("pclmul,sse4.1"))) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  };
  const auto fold = [](__m128i value, __m128i by, __m128i next) __attribute__((target("pclmul,sse4.1"))) {
    const __m128i low = _mm_clmulepi64_si128(value, by, 0x00), high = _mm_clmulepi64_si128(value, by, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
  };
  const __m128i by_64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
  const __m128i by_16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  const __m128i barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641), low_words = _mm_setr_epi32(~0, 0, ~0, 0);
  __m128i lanes[4] = {load(data), load(data + 16), load(data + 32), load(data + 48)};
  lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(crc)));
  for (data += 64, num_bytes -= 64; num_bytes >= 64; data += 64, num_bytes -= 64) {
    for (int lane = 0; lane < 4; ++lane) lanes[lane] = fold(lanes[lane], by_64, load(data + 16 * lane));
  }
  __m128i value = lanes[0];
  for (int lane = 1; lane < 4; ++lane) value = fold(value, by_16, lanes[lane]);
  for (; num_bytes >= 16; data += 16, num_bytes -= 16) value = fold(value, by_16, load(data));
  value = _mm_xor_si128(_mm_srli_si128(value, 8), _mm_clmulepi64_si128(value, by_16, 0x10));  // 64 bits are left
  const __m128i upper = _mm_srli_si128(value, 4);
  value = _mm_clmulepi64_si128(_mm_and_si128(value, low_words), _mm_set_epi64x(0, 0x0163cd6124), 0x00);
  value = _mm_xor_si128(value, upper);
  __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(value, low_words), barrett, 0x10);
  quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low_words), barrett, 0x00);
  return static_cast<uint32_t>(_mm_extract_epi32(_mm_xor_si128(value, quotient), 1));
}
#endif

inline uint32_t crc32(const uint8_t* data, int64_t num_bytes) {
  const auto& table = crc32_tables();
  uint32_t crc = ~0u;
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool folds = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (folds && num_bytes >= 64) {
    const int64_t taken = num_bytes / 16 * 16;
    crc = fold_crc32(crc, data, taken);
    data += taken, num_bytes -= taken;
  }
#endif
  for (; num_bytes >= 8; data += 8, num_bytes -= 8) {
    uint32_t low, high;
    std::memcpy(&low, data, 4);
    std::memcpy(&high, data + 4, 4);
    low ^= crc;
    crc = table[7][low & 255] ^ table[6][(low >> 8) & 255] ^ table[5][(low >> 16) & 255] ^ table[4][low >> 24] ^
          table[3][high & 255] ^ table[2][(high >> 8) & 255] ^ table[1][(high >> 16) & 255] ^ table[0][high >> 24];
  }
  for (; num_bytes; ++data, --num_bytes) crc = (crc >> 8) ^ table[0][(crc ^ *data) & 255];
  return ~crc;
}

// The checksums of a file's pages.
struct PageSums {
  const uint32_t* sums;
  int64_t num_pages, page_bytes;

  // Returns whether bytes that begin with a page, and end with one or with the file, are those that were written.
  bool match(const uint8_t* data, int64_t num_bytes, int64_t page) const {
    for (; num_bytes > 0; ++page, data += page_bytes, num_bytes -= page_bytes) {
      if (page >= num_pages || crc32(data, std::min(num_bytes, page_bytes)) != sums[page]) return false;
    }
    return true;
  }
};

// A mapped file of which each page is compared once: `passed` says which were. Threads may do one twice.
struct CheckedFile {
  const uint8_t* bytes;
  int64_t num_bytes;
  PageSums pages;
  uint8_t* passed;

  // Returns whether bytes [offset, offset + count) are there, and those that were written.
  bool match(int64_t offset, int64_t count) const {
    if (offset < 0 || offset + count > num_bytes) return false;
    for (int64_t page = offset / pages.page_bytes; page * pages.page_bytes < offset + count; ++page) {
      if (page >= pages.num_pages) return false;
      if (passed[page]) continue;
      const int64_t start = page * pages.page_bytes;
      if (!pages.match(bytes + start, std::min(pages.page_bytes, num_bytes - start), page)) return false;
      passed[page] = 1;
    }
    return true;
  }

  // Copies bytes [offset, offset + count) unless they are not there, or not those that were written.
  bool read(void* target, int64_t offset, int64_t count) const {
    if (!match(offset, count)) return false;
    std::memcpy(target, bytes + offset, count);
    return true;
  }
};

}  // namespace megatron_mm
