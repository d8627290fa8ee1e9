// Training merges: several threads count words, then the most frequent pair is merged, again and
// again. train.py is the definition; the merges are the same. C ABI, loaded by fast_train.py. Texts
// must be valid UTF-8.

#include <memory>
#include <new>
#include <queue>
#include <utility>
#include <vector>

#include "scan.h"

namespace openqwen {
namespace {

uint64_t mixed(uint64_t x) {
  x *= 0x9E3779B97F4A7C15u;
  return x ^ x >> 32;
}

// How often each word occurs: a hash table with open addressing; all words' bytes lie in one array.
class WordCounts {
 public:
  explicit WordCounts(const Byte* classes) : scanner_(classes), table_(1 << 12) {}

  void add_text(const Byte* text, size_t size) {
    for (const Byte *p = text, *end = text + size, *next; p < end; p = next) {
      next = scanner_.next(p, end);
      add(p, next - p, 1);
    }
  }

  void add(const Byte* word, size_t size, uint64_t times) {
    if (2 * words_.size() >= table_.size()) grow();
    uint64_t hash = hash_of(word, size);
    size_t i = hash & (table_.size() - 1);
    for (; table_[i]; i = (i + 1) & (table_.size() - 1)) {
      Word& known = words_[table_[i] - 1];
      if (known.hash == hash && known.size == size &&
          std::memcmp(bytes_.data() + known.start, word, size) == 0) {
        known.count += times;
        return;
      }
    }
    words_.push_back({hash, bytes_.size(), size, times});
    table_[i] = words_.size();
    bytes_.insert(bytes_.end(), word, word + size);
  }

  void add_all(const WordCounts& other) {
    other.each([this](const Byte* word, size_t size, uint64_t count) { add(word, size, count); });
  }

  template <typename Visit>
  void each(Visit visit) const {
    for (const Word& word : words_) visit(bytes_.data() + word.start, word.size, word.count);
  }

  size_t words() const { return words_.size(); }
  size_t bytes() const { return bytes_.size(); }

 private:
  struct Word {
    uint64_t hash, start, size, count;
  };

  static uint64_t hash_of(const Byte* word, size_t size) {
    uint64_t hash = size;
    for (; size >= 8; word += 8, size -= 8) {
      uint64_t eight;
      std::memcpy(&eight, word, 8);
      hash = mixed(hash ^ eight);
    }
    uint64_t rest = 0;
    std::memcpy(&rest, word, size);
    return mixed(hash ^ rest);
  }

  void grow() {
    std::vector<uint32_t> larger(2 * table_.size());
    for (size_t word = 0; word < words_.size(); ++word) {
      size_t i = words_[word].hash & (larger.size() - 1);
      while (larger[i]) i = (i + 1) & (larger.size() - 1);
      larger[i] = word + 1;
    }
    table_.swap(larger);
  }

  Scanner scanner_;
  std::vector<uint32_t> table_;  // 1 + the number of a word, or 0
  std::vector<Word> words_;
  std::vector<Byte> bytes_;
};

using Pair = uint64_t;  // left id << 32 | right id: the order of numbers is the order of pairs

// How often each pair of neighbours occurs, and in which words.
class PairCounts {
 public:
  struct Entry {
    Pair pair;
    int64_t count;
    std::vector<uint32_t> words;  // may be listed twice, or no longer hold the pair
  };

  PairCounts() : table_(1 << 16) {}

  Entry& operator[](Pair pair) {
    if (2 * entries_.size() >= table_.size()) grow();
    size_t i = mixed(pair) & (table_.size() - 1);
    for (; table_[i]; i = (i + 1) & (table_.size() - 1)) {
      if (entries_[table_[i] - 1].pair == pair) return entries_[table_[i] - 1];
    }
    entries_.push_back({pair, 0, {}});
    table_[i] = entries_.size();
    return entries_.back();
  }

  const std::vector<Entry>& entries() const { return entries_; }

 private:
  void grow() {
    std::vector<uint32_t> larger(2 * table_.size());
    for (size_t entry = 0; entry < entries_.size(); ++entry) {
      size_t i = mixed(entries_[entry].pair) & (larger.size() - 1);
      while (larger[i]) i = (i + 1) & (larger.size() - 1);
      larger[i] = entry + 1;
    }
    table_.swap(larger);
  }

  std::vector<uint32_t> table_;  // 1 + the number of an entry, or 0
  std::vector<Entry> entries_;
};

// Candidates: the highest count first, the smaller pair among equals.
struct Candidate {
  int64_t count;
  Pair pair;
  bool operator<(const Candidate& other) const {
    return count != other.count ? count < other.count : pair > other.pair;
  }
};

class BpeTrainer {
 public:
  BpeTrainer(const WordCounts& counts, const uint32_t* byte_ids, int64_t min_frequency)
      : min_frequency_(min_frequency) {
    symbols_.reserve(counts.bytes());
    words_.reserve(counts.words());
    counts.each([&](const Byte* bytes, size_t size, uint64_t count) {
      words_.push_back({symbols_.size(), static_cast<uint32_t>(size), static_cast<int64_t>(count)});
      for (size_t i = 0; i < size; ++i) symbols_.push_back(byte_ids[bytes[i]]);
      const uint32_t* word = symbols_.data() + words_.back().start;
      for (size_t i = 0; i + 1 < size; ++i) change(word[i], word[i + 1], count, words_.size() - 1);
    });
    for (const PairCounts::Entry& entry : pairs_.entries()) queue_.push({entry.count, entry.pair});
  }

  // Writes the next `most` merges to `out` as pairs of ids and returns how many there are: fewer
  // when no pair is left that is frequent enough.
  size_t merge(size_t most, uint32_t* out) {
    size_t done = 0;
    while (done < most && !queue_.empty()) {
      Candidate best = queue_.top();
      queue_.pop();
      int64_t count = pairs_[best.pair].count;
      if (count != best.count) {
        // The count has fallen since the pair was pushed (it never rises): push it again.
        queue_.push({count, best.pair});
        continue;
      }
      if (count < min_frequency_) break;
      out[2 * done] = best.pair >> 32;
      out[2 * done + 1] = static_cast<uint32_t>(best.pair);
      ++done;
      apply(best.pair, next_id_++);
    }
    return done;
  }

 private:
  struct Word {
    uint64_t start;
    uint32_t size;  // in symbols
    int64_t count;
  };

  void change(uint32_t left, uint32_t right, int64_t by, uint32_t word) {
    PairCounts::Entry& entry = pairs_[Pair{left} << 32 | right];
    entry.count += by;
    if (by > 0 && (entry.words.empty() || entry.words.back() != word)) entry.words.push_back(word);
  }

  // Replaces each `pair`, from the left, by `merged` in all words that hold it.
  void apply(Pair pair, uint32_t merged) {
    new_pairs_.clear();
    uint32_t left = pair >> 32, right = static_cast<uint32_t>(pair);
    std::vector<uint32_t> places = std::move(pairs_[pair].words);
    for (uint32_t index : places) {
      Word& word = words_[index];
      uint32_t *symbols = symbols_.data() + word.start, kept = 0;
      for (uint32_t i = 0; i < word.size;) {
        if (symbols[i] != left || i + 1 == word.size || symbols[i + 1] != right) {
          symbols[kept++] = symbols[i++];
          continue;
        }
        if (kept) {
          uint32_t before = symbols[kept - 1];
          change(before, left, -word.count, index);
          count_pair(before, merged, word.count, index);
        }
        if (i + 2 < word.size) {
          uint32_t after = symbols[i + 2];
          change(right, after, -word.count, index);
          count_pair(merged, after, word.count, index);
        }
        symbols[kept++] = merged;
        i += 2;
      }
      word.size = kept;
    }
    for (Pair child : new_pairs_) queue_.push({pairs_[child].count, child});
  }

  // Count a pair with the new symbol; the first time it becomes a candidate.
  void count_pair(uint32_t left, uint32_t right, int64_t by, uint32_t word) {
    PairCounts::Entry& entry = pairs_[Pair{left} << 32 | right];
    if (entry.words.empty()) new_pairs_.push_back(entry.pair);
    entry.count += by;
    if (entry.words.empty() || entry.words.back() != word) entry.words.push_back(word);
  }

  int64_t min_frequency_;
  uint32_t next_id_ = 256;
  std::vector<uint32_t> symbols_;
  std::vector<Word> words_;
  PairCounts pairs_;
  std::priority_queue<Candidate> queue_;
  std::vector<Pair> new_pairs_;
};

}  // namespace
}  // namespace openqwen

using openqwen::Byte;
using openqwen::BpeTrainer;
using openqwen::WordCounts;

// Functions that allocate return null, or -1, when there is no memory.
extern "C" {

void* openqwen_counts_new(const Byte* classes) try {
  return new WordCounts(classes);
} catch (const std::bad_alloc&) {
  return nullptr;
}

void openqwen_counts_free(void* counts) { delete static_cast<WordCounts*>(counts); }

// Counts the words of texts one after the other: text i is texts[offsets[i]:offsets[i + 1]].
// Returns how many different words there are now.
int64_t openqwen_counts_add(void* counts, const Byte* texts, const int64_t* offsets,
                            size_t count) try {
  for (size_t i = 0; i < count; ++i) {
    static_cast<WordCounts*>(counts)->add_text(texts + offsets[i], offsets[i + 1] - offsets[i]);
  }
  return static_cast<WordCounts*>(counts)->words();
} catch (const std::bad_alloc&) {
  return -1;
}

// Adds the counts of another; returns how many different words there are now.
int64_t openqwen_counts_add_all(void* counts, const void* other) try {
  static_cast<WordCounts*>(counts)->add_all(*static_cast<const WordCounts*>(other));
  return static_cast<WordCounts*>(counts)->words();
} catch (const std::bad_alloc&) {
  return -1;
}

// byte_ids: the id of each byte; merge k makes id 256 + k. The counts may be freed afterwards.
void* openqwen_trainer_new(const void* counts, const uint32_t* byte_ids,
                           int64_t min_frequency) try {
  return new BpeTrainer(*static_cast<const WordCounts*>(counts), byte_ids, min_frequency);
} catch (const std::bad_alloc&) {
  return nullptr;
}

void openqwen_trainer_free(void* trainer) { delete static_cast<BpeTrainer*>(trainer); }

// See BpeTrainer::merge; out has room for 2 * most ids.
int64_t openqwen_trainer_merge(void* trainer, size_t most, uint32_t* out) try {
  return static_cast<BpeTrainer*>(trainer)->merge(most, out);
} catch (const std::bad_alloc&) {
  return -1;
}
}
