// Qwen2's split expression as a scanner over UTF-8, word by word. It stands in pretokenize.py:
//   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|
//    ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
// The classes of code points come from Python, so both paths have the same edition of Unicode. The
// text must be valid UTF-8.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace openqwen {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first byte read is the lowest");

using Byte = uint8_t;

enum Class : Byte { kOther = 0, kLetter = 1, kNumber = 2, kSpace = 3, kNewline = 4 };
constexpr uint32_t kClassified = 0x40000;  // code points from here on are all kOther

class Scanner {
 public:
  // classes: one byte for each of the first kClassified code points; it must outlive the scanner.
  explicit Scanner(const Byte* classes) : classes_(classes) {}

  // The end of the word that begins at p < end.
  const Byte* next(const Byte* p, const Byte* end) const {
    const Byte* after = p;
    switch (take(after)) {
      case kLetter:
        return letters(after, end);
      case kNumber:
        return after;
      case kOther:
        if (*p == '\'') {
          if (const Byte* contraction = contracted(after, end)) return contraction;
        }
        if (const Byte* word = led_letters(after, end)) return word;
        return symbols(after, end);
      case kSpace:
        if (const Byte* word = led_letters(after, end)) return word;
        if (*p == ' ' && after < end && peek(after) == kOther) return symbols(after, end);
        return spaces(p, end);
      default:
        return spaces(p, end);
    }
  }

 private:
  // The class of the character at p, which moves behind it.
  Class take(const Byte*& p) const {
    uint32_t c = *p;
    if (c < 0x80) {
      p += 1;
    } else if (c < 0xE0) {
      c = (c & 0x1F) << 6 | (p[1] & 0x3F);
      p += 2;
    } else if (c < 0xF0) {
      c = (c & 0x0F) << 12 | (p[1] & 0x3F) << 6 | (p[2] & 0x3F);
      p += 3;
    } else {
      c = (c & 0x07) << 18 | (p[1] & 0x3F) << 12 | (p[2] & 0x3F) << 6 | (p[3] & 0x3F);
      p += 4;
    }
    return c < kClassified ? static_cast<Class>(classes_[c]) : kOther;
  }

  Class peek(const Byte* p) const { return take(p); }

  // \p{L}*
  const Byte* letters(const Byte* p, const Byte* end) const {
    for (;;) {
      // Eight bytes at a time. Bit 7 of each byte of `letter` says whether it is an ASCII letter:
      // the two sums carry into it for bytes from 'a' on and for bytes behind 'z'.
      while (end - p >= 8) {
        constexpr uint64_t kOnes = 0x0101010101010101, kHigh = 0x80 * kOnes;
        uint64_t bytes;
        std::memcpy(&bytes, p, 8);
        uint64_t lower = (bytes & ~kHigh) | 0x20 * kOnes;
        uint64_t letter = (lower + (0x80 - 'a') * kOnes) & ~(lower + (0x80 - 'z' - 1) * kOnes);
        uint64_t stop = (~letter | bytes) & kHigh;
        if (stop) {
          p += __builtin_ctzll(stop) / 8;
          break;
        }
        p += 8;
      }
      for (;;) {
        if (p == end) return p;
        const Byte* after = p;
        if (take(after) != kLetter) return p;
        bool ascii = after == p + 1;
        p = after;
        if (ascii) break;  // back to eight at a time
      }
    }
  }

  // \p{L}+, or null.
  const Byte* led_letters(const Byte* p, const Byte* end) const {
    if (p == end || take(p) != kLetter) return nullptr;
    return letters(p, end);
  }

  // [^\s\p{L}\p{N}]*[\r\n]*
  const Byte* symbols(const Byte* p, const Byte* end) const {
    for (const Byte* after = p; p < end && take(after) == kOther;) p = after;
    while (p < end && (*p == '\r' || *p == '\n')) ++p;
    return p;
  }

  // \s*[\r\n]+|\s+(?!\S)|\s+ : up to the last line end; without one, all of the white space, except
  // the last character of several where text follows.
  const Byte* spaces(const Byte* start, const Byte* end) const {
    const Byte *p = start, *last = start, *line_end = nullptr;
    while (p < end) {
      const Byte* after = p;
      Class c = take(after);
      if (c != kSpace && c != kNewline) break;
      last = p;
      p = after;
      if (c == kNewline) line_end = p;
    }
    if (line_end) return line_end;
    return p == end || last == start ? p : last;
  }

  // What follows an apostrophe in (?i:'s|'t|'re|'ve|'m|'ll|'d), or null. U+017F is a small s too.
  static const Byte* contracted(const Byte* p, const Byte* end) {
    if (p == end) return nullptr;
    Byte first = *p | 0x20;
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return p + 1;
    if (end - p < 2) return nullptr;
    if (p[0] == 0xC5 && p[1] == 0xBF) return p + 2;
    Byte second = p[1] | 0x20;
    bool re_or_ve = (first == 'r' || first == 'v') && second == 'e';
    return re_or_ve || (first == 'l' && second == 'l') ? p + 2 : nullptr;
  }

  const Byte* classes_;
};

}  // namespace openqwen
