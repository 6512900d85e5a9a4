// CRC-32 as zlib computes it, and pages of files that are compared with theirs before they are used.
// megatron_mm/shards/checksums.py holds the reference and says what a page is.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

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

inline uint32_t crc32(const uint8_t* data, int64_t num_bytes) {
  const auto& table = crc32_tables();
  uint32_t crc = ~0u;
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

  // Copies bytes [offset, offset + count) unless they are not there, or not those that were written.
  bool read(void* target, int64_t offset, int64_t count) const {
    if (offset < 0 || offset + count > num_bytes) return false;
    for (int64_t page = offset / pages.page_bytes; page * pages.page_bytes < offset + count; ++page) {
      if (page >= pages.num_pages) return false;
      if (passed[page]) continue;
      const int64_t start = page * pages.page_bytes;
      if (!pages.match(bytes + start, std::min(pages.page_bytes, num_bytes - start), page)) return false;
      passed[page] = 1;
    }
    std::memcpy(target, bytes + offset, count);
    return true;
  }
};

}  // namespace megatron_mm
