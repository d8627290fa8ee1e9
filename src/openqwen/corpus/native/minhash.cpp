// MinHash signatures; the twin of plain_signatures in deduplicate.py, to the bit.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15ull;
constexpr size_t kLanes = 16;  // hash functions at a time: their minima stay in registers

uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

struct Bytes {
    uint64_t hash[256];
    bool word[256];

    Bytes() {
        for (int c = 0; c < 256; ++c) {
            hash[c] = mix((uint64_t(c) + 1) * kGamma);
            word[c] = c >= 128 || c == '_' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
                      (c >= 'A' && c <= 'Z');
        }
    }
};

// The hash of each word: the sum of hash(byte) * gamma^position.
void hash_words(const uint8_t* text, const uint8_t* end, std::vector<uint64_t>& words) {
    static const Bytes bytes;
    words.clear();
    while (text < end) {
        if (!bytes.word[*text]) {
            ++text;
            continue;
        }
        uint64_t sum = 0, power = 1;
        for (; text < end && bytes.word[*text]; ++text, power *= kGamma) {
            sum += bytes.hash[*text] * power;
        }
        words.push_back(mix(sum));
    }
}

void minima(const std::vector<uint64_t>& shingles, const uint64_t* flips, const uint64_t* factors,
            size_t count, uint64_t* out) {
    for (size_t first = 0; first < count; first += kLanes) {
        uint64_t flip[kLanes], factor[kLanes], least[kLanes];
        for (size_t i = 0; i < kLanes; ++i) {
            const size_t column = std::min(first + i, count - 1);
            flip[i] = flips[column];
            factor[i] = factors[column];
            least[i] = ~uint64_t(0);
        }
        for (const uint64_t shingle : shingles) {
            for (size_t i = 0; i < kLanes; ++i) {
                const uint64_t value = (shingle ^ flip[i]) * factor[i];
                least[i] = value < least[i] ? value : least[i];
            }
        }
        std::copy(least, least + std::min(kLanes, count - first), out + first);
    }
}

}  // namespace

// Texts in lower case: text i is bytes starts[i] to starts[i + 1]. out: [texts, count].
extern "C" void openqwen_minhash(const uint8_t* text, const int64_t* starts, size_t texts,
                                 size_t shingle_words, const uint64_t* flips,
                                 const uint64_t* factors, size_t count, uint64_t* out) {
    std::vector<uint64_t> words, shingles;
    for (size_t i = 0; i < texts; ++i) {
        hash_words(text + starts[i], text + starts[i + 1], words);
        const size_t missing = std::max(shingle_words, words.size()) - words.size();
        words.insert(words.end(), missing, 0);  // a text of fewer words has one shingle
        shingles.clear();
        for (size_t first = 0; first + shingle_words <= words.size(); ++first) {
            uint64_t shingle = 0;
            for (size_t j = 0; j < shingle_words; ++j) {
                shingle = shingle * kGamma + words[first + j];
            }
            shingles.push_back(mix(shingle));
        }
        minima(shingles, flips, factors, count, out + i * count);
    }
}
