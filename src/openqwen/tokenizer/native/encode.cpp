// Text to ids: the scanner cuts words, a cache holds the ids of frequent ones, and in the others
// byte pairs are merged. bpe.py is the definition; the ids are the same. C ABI, loaded by fast.py.
// Texts must be valid UTF-8.

#include <algorithm>
#include <new>
#include <queue>
#include <unordered_map>
#include <utility>
#include <vector>

#include "scan.h"

namespace openqwen {
namespace {

constexpr uint32_t kIdBits = 21, kRankBits = 22;     // a pair and its rank fill 64 bits
constexpr uint32_t kNoRank = 0xFFFFFF;               // fits beside a position of 8 bits
constexpr uint64_t kEmpty = ~uint64_t{0};
constexpr size_t kShort = 64;                        // symbols that one 64-bit mask covers
constexpr size_t kCachedBytes = 30, kCachedIds = 8;  // most of a word in the cache
constexpr size_t kCacheLines = size_t{1} << 16;      // 4 MiB a context

struct Merge {
  uint32_t left, right, merged;
};

// The bytes of each token, one after the other: token i is bytes[offsets[i]:offsets[i + 1]].
struct Vocabulary {
  const Byte* bytes;
  const int64_t* offsets;
  const Byte* begin(uint32_t id) const { return bytes + offsets[id]; }
  const Byte* end(uint32_t id) const { return bytes + offsets[id + 1]; }
  size_t size(uint32_t id) const { return offsets[id + 1] - offsets[id]; }
};

bool continues(Byte byte) { return (byte & 0xC0) == 0x80; }  // not the first byte of a character

size_t character_size(Byte first) {
  return first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
}

// Merges that join a part of one character to a neighbour of that character: a space and the first
// byte of an ideograph, say.
//
// Without them, a word could start from whole characters instead of bytes, which saves most of the
// work in scripts outside ASCII: every merge would stay inside one character or join whole ones, so
// merging inside the characters first would give the same ids. A few merges do cross a border. In a
// word where the two sides of no such merge meet at a border of characters, none of them can
// happen, and the short cut is right for that word.
class Straddlers {
 public:
  void add(const Byte* left, const Byte* middle, const Byte* right) {
    bool left_whole = !continues(*left) && complete(left, middle);
    bool right_whole = complete(middle, right);
    if (continues(*middle) || (left_whole && right_whole)) return;
    seen_[slot(middle)] = true;
    list_[slot(middle)].push_back({{left, middle}, {middle, right}});
  }

  // Whether the two sides of a straddling merge meet at `border`, inside the word begin to end.
  bool meet(const Byte* begin, const Byte* border, const Byte* end) const {
    if (!seen_[slot(border)]) return false;
    for (const auto& [left, right] : list_.at(slot(border))) {
      bool room = size_t(border - begin) >= left.size() && size_t(end - border) >= right.size();
      if (room && std::equal(left.begin(), left.end(), border - left.size()) &&
          std::equal(right.begin(), right.end(), border)) {
        return true;
      }
    }
    return false;
  }

 private:
  using Bytes = std::vector<Byte>;
  static size_t slot(const Byte* border) { return size_t{border[-1]} << 8 | border[0]; }

  // Whether the characters from begin on, which is a first byte, end at `end`.
  static bool complete(const Byte* begin, const Byte* end) {
    while (begin < end) begin += character_size(*begin);
    return begin == end;
  }

  // By the byte before the border and the one behind it: most borders need no look at the list.
  std::vector<bool> seen_ = std::vector<bool>(1 << 16);
  std::unordered_map<size_t, std::vector<std::pair<Bytes, Bytes>>> list_;
};

// The merges; read-only once built, shared by all threads.
class Merges {
 public:
  Merges(const Vocabulary& vocabulary, size_t tokens, const Merge* merges, size_t count)
      : byte_ids_(256) {
    for (size_t id = 0; id < tokens; ++id) {
      if (vocabulary.size(id) == 1) byte_ids_[*vocabulary.begin(id)] = id;
    }
    size_t size = 1024;
    while (size < 3 * count) size *= 2;
    shift_ = 64 - __builtin_ctzll(size);
    table_.assign(size, kEmpty);
    merged_.reserve(count);
    std::vector<Byte> both;
    for (size_t rank = 0; rank < count; ++rank) {
      auto [left, right, merged] = merges[rank];
      merged_.push_back(merged);
      insert(left, right, rank);
      both.assign(vocabulary.begin(left), vocabulary.end(left));
      both.insert(both.end(), vocabulary.begin(right), vocabulary.end(right));
      straddlers_.add(both.data(), both.data() + vocabulary.size(left), both.data() + both.size());
    }
    byte_ranks_.resize(256 * 256);
    for (size_t pair = 0; pair < byte_ranks_.size(); ++pair) {
      byte_ranks_[pair] = rank(byte_ids_[pair >> 8], byte_ids_[pair & 0xFF]);
    }
    characters_.assign(kCharacters, kPieces);
    for (uint32_t c = 0; c < kCharacters; ++c) {
      Byte bytes[3] = {Byte(c)};
      if (c >= 0x800) {
        bytes[0] = 0xE0 | c >> 12, bytes[1] = 0x80 | (c >> 6 & 0x3F), bytes[2] = 0x80 | (c & 0x3F);
      } else if (c >= 0x80) {
        bytes[0] = 0xC0 | c >> 6, bytes[1] = 0x80 | (c & 0x3F);
      }
      uint32_t ids[3];
      if (merge_bytes(bytes, character_size(bytes[0]), ids) == 1) characters_[c] = ids[0];
    }
  }

  // Ids of one word of `size` bytes at `out`, which has room for as many; returns how many.
  size_t merge(const Byte* word, size_t size, uint32_t* out) const {
    bool ascii = std::all_of(word, word + size, [](Byte byte) { return byte < 0x80; });
    if (ascii) return merge_bytes(word, size, out);
    // Start from characters; one that is not a token starts from what its bytes merge into.
    const Byte *p = word, *end = word + size;
    size_t count = 0;
    while (p < end) {
      if (p > word && straddlers_.meet(word, p, end)) return merge_bytes(word, size, out);
      size_t bytes = character_size(*p);
      uint32_t id = kPieces;
      if (bytes == 1) id = byte_ids_[*p];
      if (bytes == 2) id = characters_[(p[0] & 0x1F) << 6 | (p[1] & 0x3F)];
      if (bytes == 3) id = characters_[(p[0] & 0x0F) << 12 | (p[1] & 0x3F) << 6 | (p[2] & 0x3F)];
      if (id != kPieces) {
        out[count++] = id;
      } else {
        count += merge_bytes(p, bytes, out + count);
      }
      p += bytes;
    }
    return count <= kShort ? merge_short(out, count) : merge_long(out, count);
  }

 private:
  static constexpr uint32_t kCharacters = 0x10000, kPieces = ~0u;

  static uint64_t key(uint64_t left, uint64_t right) { return left << kIdBits | right; }
  size_t slot(uint64_t key) const { return key * 0x9E3779B97F4A7C15u >> shift_; }

  void insert(uint32_t left, uint32_t right, uint64_t rank) {
    uint64_t wanted = key(left, right);
    size_t i = slot(wanted);
    // Of a pair that is listed twice the later rank counts, as in the Python encoder.
    while (table_[i] != kEmpty && table_[i] >> kRankBits != wanted) {
      i = (i + 1) & (table_.size() - 1);
    }
    table_[i] = wanted << kRankBits | rank;
  }

  uint32_t rank(uint32_t left, uint32_t right) const {
    uint64_t wanted = key(left, right);
    for (size_t i = slot(wanted);; i = (i + 1) & (table_.size() - 1)) {
      uint64_t entry = table_[i];
      if (entry >> kRankBits == wanted) return entry & ((1u << kRankBits) - 1);
      if (entry == kEmpty) return kNoRank;
    }
  }

  size_t merge_bytes(const Byte* word, size_t size, uint32_t* out) const {
    for (size_t i = 0; i < size; ++i) out[i] = byte_ids_[word[i]];
    if (size > kShort) return merge_long(out, size);
    uint32_t order[kShort];
    for (size_t i = 0; i + 1 < size; ++i) {
      order[i] = byte_ranks_[word[i] << 8 | word[i + 1]] << 8 | i;
    }
    return merge_ordered(out, size, order);
  }

  size_t merge_short(uint32_t* ids, size_t size) const {
    uint32_t order[kShort];
    for (size_t i = 0; i + 1 < size; ++i) order[i] = rank(ids[i], ids[i + 1]) << 8 | i;
    return merge_ordered(ids, size, order);
  }

  // Merges ids in place; size is at most kShort. order[i] holds the rank of the pair that begins at
  // i, with i as the lowest byte: the smallest number is the lowest rank and, among equals, the
  // leftmost. Finding it by a scan over all positions is faster than a heap for words this short.
  size_t merge_ordered(uint32_t* ids, size_t size, uint32_t* order) const {
    uint64_t alive = ~uint64_t{0} >> (64 - size);  // a bit for each symbol that is still there
    size_t padded = (size + 7) & ~size_t{7};
    for (size_t i = size - 1; i < padded; ++i) order[i] = ~0u;
    for (;;) {
      uint32_t best = ~0u;
      for (size_t i = 0; i < padded; ++i) best = std::min(best, order[i]);
      if (best >= kNoRank << 8) break;
      size_t i = best & 0xFF;
      ids[i] = merged_[best >> 8];
      uint64_t behind = alive & ~uint64_t{1} << i;
      size_t gone = __builtin_ctzll(behind);
      alive &= ~(uint64_t{1} << gone);
      order[gone] = ~0u;
      behind &= behind - 1;
      order[i] = behind ? rank(ids[i], ids[__builtin_ctzll(behind)]) << 8 | i : ~0u;
      if (uint64_t before = alive & ((uint64_t{1} << i) - 1)) {
        size_t j = 63 - __builtin_clzll(before);
        order[j] = rank(ids[j], ids[i]) << 8 | j;
      }
    }
    size_t count = 0;
    for (; alive; alive &= alive - 1) ids[count++] = ids[__builtin_ctzll(alive)];
    return count;
  }

  // The same with a heap: O(n log n).
  size_t merge_long(uint32_t* ids, size_t size) const {
    constexpr uint32_t kGone = ~0u;
    std::vector<uint32_t> next(size), previous(size);
    std::vector<uint64_t> pairs;
    for (size_t i = 0; i < size; ++i) {
      next[i] = i + 1;
      previous[i] = i - 1;
      if (i + 1 == size) break;
      if (uint64_t r = rank(ids[i], ids[i + 1]); r != kNoRank) pairs.push_back(r << 32 | i);
    }
    std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> heap({}, std::move(pairs));
    auto push = [&](uint32_t left, uint32_t right) {
      if (uint64_t r = rank(ids[left], ids[right]); r != kNoRank) heap.push(r << 32 | left);
    };
    while (!heap.empty()) {
      uint64_t top = heap.top();
      heap.pop();
      uint32_t left = static_cast<uint32_t>(top), right = next[left];
      // An entry is stale when one of its two symbols has merged with another neighbour since.
      if (ids[left] == kGone || right == size || rank(ids[left], ids[right]) != top >> 32) continue;
      ids[left] = merged_[top >> 32];
      ids[right] = kGone;
      uint32_t after = next[left] = next[right];
      if (after != size) {
        previous[after] = left;
        push(left, after);
      }
      if (left != 0) push(previous[left], left);
    }
    return std::remove(ids, ids + size, kGone) - ids;
  }

  std::vector<uint32_t> byte_ids_, merged_, byte_ranks_;
  std::vector<uint32_t> characters_;  // the token of a character by itself, or kPieces
  std::vector<uint64_t> table_;       // pair << kRankBits | rank, open addressing
  int shift_;
  Straddlers straddlers_;
};

// A word and its ids in one cache line. key: the word's bytes, zeros, the number of ids in the
// second to last byte, the number of bytes in the last.
struct alignas(64) Line {
  uint64_t key[4];
  uint32_t ids[kCachedIds];
};
constexpr uint64_t kCount = uint64_t{0xFF} << 48;  // the number of ids in key[3]

// What one thread needs to encode. A line is overwritten by the next word that falls on it.
class Context {
 public:
  Context(const Merges& merges, const Byte* classes)
      : merges_(merges), scanner_(classes), lines_(kCacheLines) {
    for (size_t size = 0; size <= kCachedBytes; ++size) {
      Byte* mask = reinterpret_cast<Byte*>(masks_[size]);
      for (size_t i = 0; i < 32; ++i) mask[i] = i < size ? 0xFF : 0;
    }
  }

  // Ids of a text at `out`, which has room for size + kCachedIds; returns how many.
  size_t encode(const Byte* text, size_t size, uint32_t* out) {
    const Byte* end = text + size;
    uint32_t* start = out;
    for (const Byte *p = text, *next; p < end; p = next) {
      next = scanner_.next(p, end);
      size_t length = next - p;
      if (length > kCachedBytes) {
        out += merges_.merge(p, length, out);
        continue;
      }
      uint64_t key[4];
      if (end - p >= 32) {
        std::memcpy(key, p, 32);
      } else {
        std::memset(key, 0, 32);
        std::memcpy(key, p, length);
      }
      const uint64_t* mask = masks_[length];
      for (int i = 0; i < 4; ++i) key[i] &= mask[i];
      key[3] |= uint64_t{length} << 56;
      uint64_t hash = key[0] * 0x9E3779B97F4A7C15u + key[1] * 0xC2B2AE3D27D4EB4Fu +
                      key[2] * 0xD6E8FEB86659FD93u + key[3] * 0xA0761D6478BD642Fu;
      static_assert(kCacheLines == size_t{1} << 16, "the hash's upper 16 bits choose the line");
      Line& line = lines_[hash >> 48];
      uint64_t difference = (line.key[0] ^ key[0]) | (line.key[1] ^ key[1]) |
                            (line.key[2] ^ key[2]) | ((line.key[3] ^ key[3]) & ~kCount);
      if (difference == 0) {
        std::memcpy(out, line.ids, sizeof line.ids);  // all of them: cheaper than counting
        out += line.key[3] >> 48 & 0xFF;
        continue;
      }
      size_t count = merges_.merge(p, length, out);
      if (count <= kCachedIds) {
        std::memcpy(line.key, key, sizeof key);
        line.key[3] |= uint64_t{count} << 48;
        std::memcpy(line.ids, out, sizeof line.ids);
      }
      out += count;
    }
    return out - start;
  }

 private:
  const Merges& merges_;
  Scanner scanner_;
  std::vector<Line> lines_;
  uint64_t masks_[kCachedBytes + 1][4];
};

}  // namespace
}  // namespace openqwen

using openqwen::Byte;
using openqwen::Context;
using openqwen::Merge;
using openqwen::Merges;

// Functions that allocate return null, or -1, when there is no memory.
extern "C" {

// vocabulary, offsets: see Vocabulary. merges: left, right and merged id of each, best rank first.
void* openqwen_merges_new(const Byte* vocabulary, const int64_t* offsets, size_t tokens,
                          const uint32_t* merges, size_t count) try {
  return new Merges({vocabulary, offsets}, tokens, reinterpret_cast<const Merge*>(merges), count);
} catch (const std::bad_alloc&) {
  return nullptr;
}

void openqwen_merges_free(void* merges) { delete static_cast<Merges*>(merges); }

void* openqwen_context_new(const void* merges, const Byte* classes) try {
  return new Context(*static_cast<const Merges*>(merges), classes);
} catch (const std::bad_alloc&) {
  return nullptr;
}

void openqwen_context_free(void* context) { delete static_cast<Context*>(context); }

// Texts one after the other: text i is texts[offsets[i]:offsets[i + 1]], and its ids become
// out[out_offsets[i]:out_offsets[i + 1]]. out has room for all bytes + 8. Returns how many ids.
int64_t openqwen_encode(void* context, const Byte* texts, const int64_t* offsets, size_t count,
                        uint32_t* out, int64_t* out_offsets) try {
  int64_t total = 0;
  out_offsets[0] = 0;
  for (size_t i = 0; i < count; ++i) {
    size_t size = offsets[i + 1] - offsets[i];
    total += static_cast<Context*>(context)->encode(texts + offsets[i], size, out + total);
    out_offsets[i + 1] = total;
  }
  return total;
} catch (const std::bad_alloc&) {
  return -1;
}

// One text.
int64_t openqwen_encode_text(void* context, const Byte* text, size_t size, uint32_t* out) try {
  return static_cast<Context*>(context)->encode(text, size, out);
} catch (const std::bad_alloc&) {
  return -1;
}
}
