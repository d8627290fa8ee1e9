// Counts of English words that the published filter rules need; the twin of plain_counts in
// counts.py. Most stretches of text between white space are letters with punctuation around them
// and are split here; all others come from a table that Python fills (english.py).

#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

constexpr uint64_t kBase = 0x9E3779B97F4A7C15ull;  // of the polynomial hash; odd
enum Flag : uint8_t { kAlphabetic = 1, kSymbol = 2, kEnd = 4, kPunctuation = 8 };

struct Word {
    uint64_t hash;
    uint32_t bytes, characters;
    uint8_t flags;
};

uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

// The hash of bytes; hash(ab) = hash(a) * kBase^|b| + hash(b).
uint64_t hash_bytes(const uint8_t* text, size_t size) {
    uint64_t hash = 0;
    for (size_t i = 0; i < size; ++i) hash = hash * kBase + text[i] + 1;
    return hash;
}

// Length of the white space (Python's str.isspace) at `at`, 0 if there is none.
size_t space(const uint8_t* at, const uint8_t* end) {
    const uint8_t c = *at;
    if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13) || (c >= 0x1C && c <= 0x1F);
    if (c == 0xC2) return end - at >= 2 && (at[1] == 0x85 || at[1] == 0xA0) ? 2 : 0;
    if (end - at < 3) return 0;
    if (c == 0xE1) return at[1] == 0x9A && at[2] == 0x80 ? 3 : 0;
    if (c == 0xE3) return at[1] == 0x80 && at[2] == 0x80 ? 3 : 0;
    if (c != 0xE2) return 0;
    if (at[1] == 0x81) return at[2] == 0x9F ? 3 : 0;
    if (at[1] != 0x80) return 0;
    return at[2] <= 0x8A || at[2] == 0xA8 || at[2] == 0xA9 || at[2] == 0xAF ? 3 : 0;
}

bool lower(uint8_t c) { return c >= 'a' && c <= 'z'; }
bool upper(uint8_t c) { return c >= 'A' && c <= 'Z'; }
bool letter(uint8_t c) { return lower(c) || upper(c); }
bool opening(uint8_t c) { return c == '"' || c == '('; }
bool closing(uint8_t c) {
    return c == ',' || c == ';' || c == ':' || c == '!' || c == '?' || c == '"' || c == ')';
}

// A set or counter of 64-bit keys with open addressing. Clearing it costs nothing.
class Table {
  public:
    struct Slot {
        uint64_t key;
        uint32_t epoch, count, first;
    };

    void clear(size_t entries) {
        size_t size = 64;
        while (size < 2 * entries) size *= 2;
        if (size > slots_.size()) {
            slots_.assign(size, Slot{});
            epoch_ = 0;
        }
        if (++epoch_ == 0) {  // the counter has gone round
            slots_.assign(slots_.size(), Slot{});
            epoch_ = 1;
        }
        mask_ = size - 1;
    }

    // The slot of a key; its count is 0 if the key is new.
    Slot& at(uint64_t key) {
        for (size_t i = mix(key) & mask_;; i = (i + 1) & mask_) {
            Slot& slot = slots_[i];
            if (slot.epoch != epoch_) {
                slot = {key, epoch_, 0, 0};
                return slot;
            }
            if (slot.key == key) return slot;
        }
    }

  private:
    std::vector<Slot> slots_;
    uint32_t epoch_ = 0;
    size_t mask_ = 0;
};

class Counter {
  public:
    void add(std::string stretch, const Word* words, size_t count) {
        table_[std::move(stretch)] = {uint32_t(words_.size()), uint32_t(count)};
        words_.insert(words_.end(), words, words + count);
    }

    // Whether all stretches are known; `unknown` gets those that are not, as (start, size).
    int64_t read(const uint8_t* text, size_t size, int64_t* unknown, int64_t most) {
        text_.clear();
        sentences_ = 1;
        int64_t missing = 0;
        bool ended = false;  // a sentence has ended, and no next one has begun
        const uint8_t *at = text, *end = text + size, *run = text;
        bool behind_word = false;
        while (at < end) {
            if (const size_t width = space(at, end)) {
                if (*at == '\n') {
                    blank(run, at, behind_word, ended);
                    ++sentences_;
                    ended = behind_word = false;
                    run = at + 1;
                }
                at += width;
                continue;
            }
            blank(run, at, behind_word, ended);
            const uint8_t* start = at;
            while (at < end && !space(at, end)) ++at;
            const size_t first = text_.size();
            if (!split(start, at)) {
                if (missing < most) {
                    unknown[2 * missing] = start - text;
                    unknown[2 * missing + 1] = at - start;
                }
                ++missing;
            }
            for (size_t i = first; i < text_.size(); ++i) {
                const uint8_t flags = text_[i].flags;
                if (flags & kEnd) {
                    ended = true;
                } else if (ended && !(flags & kPunctuation)) {
                    ++sentences_;
                    ended = false;
                }
            }
            behind_word = true;
            run = at;
        }
        blank(run, end, behind_word, ended);
        return missing < most ? missing : most;
    }

    void count(const uint64_t* stop, size_t stops, double* out) const {
        double plain = 0, characters = 0, alphabetic = 0;
        uint64_t seen = 0;
        for (const Word& word : text_) {
            if (!(word.flags & kSymbol)) {
                ++plain;
                characters += word.characters;
            }
            if (!(word.flags & kAlphabetic)) continue;
            ++alphabetic;
            for (size_t i = 0; i < stops; ++i) seen |= uint64_t(word.hash == stop[i]) << i;
        }
        const double counts[] = {double(text_.size()), plain, characters, alphabetic,
                                 double(__builtin_popcountll(seen)), double(sentences_)};
        std::memcpy(out, counts, sizeof counts);
    }

    // Characters of all occurrences of the most frequent n-gram, with the spaces inside.
    double top(size_t n) {
        sums(1);
        const size_t words = text_.size();
        if (words < n) return 0;
        grams_.clear(words);
        uint32_t most = 0, first = 0;
        for (size_t i = 0; i + n <= words; ++i) {
            Table::Slot& slot = grams_.at(gram(i, n));
            if (!slot.count) slot.first = uint32_t(i);
            ++slot.count;
            if (slot.count > most || (slot.count == most && slot.first < first)) {
                most = slot.count;
                first = slot.first;
            }
        }
        return double(most) * (characters_[first + n] - characters_[first] + n - 1);
    }

    // Characters of n-grams that occurred before; none overlaps another one that is counted.
    double repeated(size_t n) {
        sums(0);
        const size_t words = text_.size();
        double characters = 0;
        grams_.clear(words);
        for (size_t i = 0; i + n <= words;) {
            Table::Slot& slot = grams_.at(gram(i, n));
            if (slot.count++) {
                characters += characters_[i + n] - characters_[i];
                i += n;
            } else {
                ++i;
            }
        }
        return characters;
    }

  private:
    struct Entry {
        uint32_t first, count;
    };

    std::unordered_map<std::string, Entry> table_;
    std::vector<Word> words_, text_;
    std::vector<uint64_t> hashes_, lengths_, powers_, characters_;
    Table grams_;
    int64_t sentences_ = 0;
    std::string key_;

    // White space that is more than the one space behind a word is a token: it begins a sentence.
    void blank(const uint8_t* run, const uint8_t* end, bool behind_word, bool& ended) {
        if (behind_word && run < end && *run == ' ') ++run;
        if (run < end && ended) {
            ++sentences_;
            ended = false;
        }
    }

    const Entry* find(const uint8_t* start, const uint8_t* end) {
        key_.assign(reinterpret_cast<const char*>(start), size_t(end - start));
        const auto found = table_.find(key_);
        return found == table_.end() ? nullptr : &found->second;
    }

    void push(const Entry& entry) {
        const Word* first = words_.data() + entry.first;
        text_.insert(text_.end(), first, first + entry.count);
    }

    void push_mark(uint8_t c) {
        uint8_t flags = kSymbol | kPunctuation;
        if (c == '.' || c == '!' || c == '?') flags |= kEnd;
        text_.push_back({uint64_t(c) + 1, 1, 1, flags});
    }

    // Appends the words of a stretch; false if Python has to split it.
    bool split(const uint8_t* start, const uint8_t* end) {
        if (const Entry* entry = find(start, end)) {
            push(*entry);
            return true;
        }
        const uint8_t *from = start, *to = end;
        while (from < end && opening(*from)) ++from;
        while (to > from && (closing(to[-1]) || to[-1] == '.')) --to;
        if (from == to || from - start > 2 || end - to > 3) return false;
        for (const uint8_t* at = from; at < to; ++at) {
            if (!letter(*at)) return false;
        }
        if (from == start && to == end) {
            text_.push_back(whole(from, to));
            return true;
        }
        return split_affixes(start, end, from, to);
    }

    static Word whole(const uint8_t* from, const uint8_t* to) {
        const uint32_t size = uint32_t(to - from);
        return {hash_bytes(from, size), size, size, kAlphabetic};
    }

    // As _split of english.py, for letters from..to with marks around them.
    bool split_affixes(const uint8_t* start, const uint8_t* end, const uint8_t* from,
                       const uint8_t* to) {
        const size_t marks = size_t(from - start) + size_t(end - to);
        for (const uint8_t* at = to; at < end; ++at) {
            // Two full stops are one mark; a colon beside another mark may be a face.
            if (*at == '.' && at + 1 < end && at[1] == '.') return false;
            // Of `((Mr.` the full stop would be taken off first, and joined again at the end.
            if (*at == '.' && from - start > 1) return false;
            if ((*at == ':' || *at == ';') && marks > 1) return false;
        }
        uint8_t behind[3];
        size_t count = 0;
        const size_t first = text_.size();
        const Entry* special = nullptr;
        while (start < from || to < end) {
            const bool before = start < from;
            if (before && (special = find(start + 1, end))) {
                push_mark(*start++);
                break;
            }
            bool after = to < end;
            if (after && end[-1] == '.') {
                const uint8_t* rest = before ? start + 1 : start;
                const bool two = end - rest >= 3 && upper(end[-2]) && upper(end[-3]);
                after = end - rest >= 2 && (!upper(end[-2]) || two);
            }
            if (after && (special = find(start, end - 1))) {
                behind[count++] = *--end;
                break;
            }
            if (!before && !after) {
                text_.resize(first);
                return false;
            }
            if (before) push_mark(*start++);
            if (after) behind[count++] = *--end;
            if ((special = find(start, end))) break;
        }
        if (special) {
            push(*special);
        } else {
            text_.push_back(whole(from, to));
        }
        while (count) push_mark(behind[--count]);
        return true;
    }

    // Sums over the words before each one: of hashes, bytes and characters; with `gap` a space
    // behind each word.
    void sums(size_t gap) {
        const size_t words = text_.size();
        hashes_.resize(words + 1);
        lengths_.resize(words + 1);
        characters_.resize(words + 1);
        hashes_[0] = lengths_[0] = characters_[0] = 0;
        for (size_t i = 0; i < words; ++i) {
            const Word& word = text_[i];
            uint64_t hash = hashes_[i] * power(word.bytes) + word.hash;
            if (gap) hash = hash * kBase + ' ' + 1;
            hashes_[i + 1] = hash;
            lengths_[i + 1] = lengths_[i] + word.bytes + gap;
            characters_[i + 1] = characters_[i] + word.characters;
        }
    }

    uint64_t gram(size_t i, size_t n) {
        return hashes_[i + n] - hashes_[i] * power(lengths_[i + n] - lengths_[i]);
    }

    uint64_t power(uint64_t exponent) {
        if (powers_.empty()) powers_.push_back(1);
        if (exponent < 4096) {
            while (powers_.size() <= exponent) powers_.push_back(powers_.back() * kBase);
            return powers_[exponent];
        }
        uint64_t result = 1;
        for (uint64_t base = kBase; exponent; exponent >>= 1, base *= base) {
            if (exponent & 1) result *= base;
        }
        return result;
    }
};

}  // namespace

extern "C" {

void* openqwen_words_new() { return new Counter(); }

void openqwen_words_free(void* counter) { delete static_cast<Counter*>(counter); }

// Adds the split of a stretch: the bytes of each word end at `ends`.
void openqwen_words_add(void* counter, const uint8_t* stretch, size_t size, const int64_t* ends,
                        const int64_t* characters, const uint8_t* flags, size_t count) {
    std::vector<Word> words(count);
    int64_t start = 0;
    for (size_t i = 0; i < count; ++i) {
        const uint32_t bytes = uint32_t(ends[i] - start);
        words[i] = {hash_bytes(stretch + start, bytes), bytes, uint32_t(characters[i]), flags[i]};
        start = ends[i];
    }
    std::string key(reinterpret_cast<const char*>(stretch), size);
    static_cast<Counter*>(counter)->add(std::move(key), words.data(), count);
}

int64_t openqwen_words_read(void* counter, const uint8_t* text, size_t size, int64_t* unknown,
                            int64_t most) {
    return static_cast<Counter*>(counter)->read(text, size, unknown, most);
}

void openqwen_words_count(void* counter, const uint64_t* stop, size_t stops, double* out) {
    static_cast<Counter*>(counter)->count(stop, stops, out);
}

uint64_t openqwen_words_hash(const uint8_t* word, size_t size) { return hash_bytes(word, size); }

double openqwen_words_top(void* counter, size_t n) {
    return static_cast<Counter*>(counter)->top(n);
}

double openqwen_words_repeated(void* counter, size_t n) {
    return static_cast<Counter*>(counter)->repeated(n);
}

}  // extern "C"
