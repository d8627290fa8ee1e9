// Grouped-query attention that reads the pages of a cache in place, for any number of sequences
// with any number of new tokens each. It rotates queries and keys, writes the new keys and values
// to their pages, and computes one exact softmax in blocks (Dao et al. 2022), with Dual Chunk
// Attention too.
//
// Shapes: H query heads, K key/value heads, G = H / K, d head width, S slots of a page. A page
// holds keys transposed, [K, d, S], so that sixteen keys are one vector and a score needs no sum
// across lanes. Values lie [K, S, d].
//
// A row is one query head of one token. Its result depends on its own query and keys alone, to the
// bit: a score is a chain of fused multiply-adds over d; keys are taken in blocks of 256 by
// absolute position; each block has its own maximum, sum and output; blocks are merged in ascending
// order. So it does not matter which rows share a tile, a call or a thread.
#include <algorithm>
#include <limits>
#include <vector>

#include "lanes.h"
#include "layers.h"
#include "pool.h"

namespace openqwen {
namespace {

constexpr int kBlock = 256;  // keys of one softmax block
constexpr int kTiles = kBlock / kLanes;
constexpr int kTileRows = 64;  // rows that share a pass over the keys; one token may have more
constexpr float kNone = -std::numeric_limits<float>::infinity();

// ---- writing -----------------------------------------------------------------------------------

int8_t round_to_int8(float x) { return static_cast<int8_t>(std::lrintf(x)); }

// The scale that maps a row onto −127 … 127. It is NaN where a number of the row is NaN or
// infinite, which int8 could not store.
float scale_of(const float* x, int64_t n) {
  float most = 0, broken = 0;
  for (int64_t i = 0; i < n; ++i) {
    most = std::max(most, std::fabs(x[i]));
    broken += x[i] - x[i];  // 0, or NaN
  }
  return most / 127 + broken;
}

// Rotates x [d] by cos and sin [d/2], multiplies by `scale` and writes element i to out[i ·
// stride].
void rotate(const float* x, const float* cos, const float* sin, int64_t d, float scale, float* out,
            int64_t stride) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i * stride] = fma(a, cos[i], -(b * sin[i])) * scale;
    out[(i + half) * stride] = fma(b, cos[i], a * sin[i]) * scale;
  }
}

// Writes the key and the value of one head of one new token to its page.
void write(const PagedCall& c, int64_t layer, int64_t row, int64_t page, int64_t slot, int64_t head,
           const float* k, const float* v, float* scratch) {
  const int64_t d = c.width, S = c.slots, half = d / 2;
  const int64_t place =
      (layer * c.pages + page) * c.kv_heads + head;  // the head's part of the page
  const float *cos = c.key_cos + row * half, *sin = c.key_sin + row * half;
  if (!c.key_scales) {
    rotate(k, cos, sin, d, 1, static_cast<float*>(c.keys) + place * d * S + slot, S);
    std::memcpy(static_cast<float*>(c.values) + (place * S + slot) * d, v, d * sizeof(float));
    return;
  }
  if (c.key_bias) {  // the bias may be a hundred times the rest; it is never rounded, see read_keys
    const float* bias = c.key_bias + (layer * c.kv_heads + head) * d;
    for (int64_t i = 0; i < d; ++i) scratch[d + i] = k[i] - bias[i];
    k = scratch + d;
  }
  rotate(k, cos, sin, d, 1, scratch, 1);
  const float scale = scale_of(scratch, d), inverse = scale > 0 ? 1 / scale : 0;
  int8_t* key = static_cast<int8_t*>(c.keys) + place * d * S + slot;
  for (int64_t i = 0; i < d; ++i) key[i * S] = round_to_int8(scratch[i] * inverse);
  c.key_scales[place * S + slot] = scale;
  const float value_scale = scale_of(v, d), value_inverse = value_scale > 0 ? 1 / value_scale : 0;
  int8_t* value = static_cast<int8_t*>(c.values) + (place * S + slot) * d;
  for (int64_t i = 0; i < d; ++i) value[i] = round_to_int8(v[i] * value_inverse);
  c.value_scales[place * S + slot] = value_scale;
}

// ---- micro-kernels -----------------------------------------------------------------------------

// Scores of R rows with sixteen keys. q: [d, kRows], of which R rows are used; keys: d vectors of
// sixteen, `stride` apart.
template <int R>
void score(const float* q, const float* keys, int64_t stride, int64_t d, float* out) {
  Lanes sums[R];
  for (int r = 0; r < R; ++r) sums[r] = all(0);
  for (int64_t i = 0; i < d; ++i) {
    const Lanes key = load(keys + i * stride);
    for (int r = 0; r < R; ++r) sums[r] = fma(all(q[i * kRows + r]), key, sums[r]);
  }
  for (int r = 0; r < R; ++r) store(out + r * kBlock, sums[r]);
}

inline Lanes read(const float* p) { return load(p); }
inline Lanes read(const int8_t* p) { return from_int8(p); }

// out[R, d] = weights[R, count] · values[count, d], with the values in tiles of sixteen. The R × V
// sums stay in registers while all values pass by; V vectors of d are done at a time.
template <int R, int V, class Value>
void weigh(const float* weights, const Value* const* tiles, int count, int64_t d, float* out) {
  for (int64_t at = 0; at < d; at += V * kLanes) {
    Lanes sums[R][V];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < V; ++n) sums[r][n] = all(0);
    for (int j = 0; j < count; ++j) {
      const Value* value = tiles[j / kLanes] + (j % kLanes) * d + at;
      Lanes x[V];
      for (int n = 0; n < V; ++n) x[n] = read(value + n * kLanes);
      for (int r = 0; r < R; ++r) {
        const Lanes w = all(weights[r * kBlock + j]);
        for (int n = 0; n < V; ++n) sums[r][n] = fma(w, x[n], sums[r][n]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < V; ++n) store(out + r * d + at + n * kLanes, sums[r][n]);
  }
}

template <int R>
void score_rows(int rows, const float* q, const float* keys, int64_t stride, int64_t d,
                float* out) {
  if (rows == R) return score<R>(q, keys, stride, d, out);
  if constexpr (R > 1) score_rows<R - 1>(rows, q, keys, stride, d, out);
}

template <int R, class Value>
void weigh_rows(int rows, const float* weights, const Value* const* tiles, int count, int64_t d,
                float* out) {
  if (rows == R)
    return d % (2 * kLanes) ? weigh<R, 1>(weights, tiles, count, d, out)
                            : weigh<R, 2>(weights, tiles, count, d, out);
  if constexpr (R > 1) weigh_rows<R - 1>(rows, weights, tiles, count, d, out);
}

// ---- one task ----------------------------------------------------------------------------------

// Some query tokens of one sequence, all in one chunk, with the query heads that share one key
// head, and some blocks of their keys.
struct Task {
  int64_t sequence, row, at, tokens, head;  // row: of the first token in the call; at: its position
  int64_t first_block, last_block;          // the last is excluded
  float* parts;                             // where to write each block's result unmerged, or null
};

struct Scratch {
  std::vector<float> queries[kRotations], scores, block, total, keys, values, bias;
  // For each row the largest score and Σ exp(score − largest): so far, and of the current block.
  std::vector<float> most, sums, block_most, block_sums;

  void fit(int64_t rows, int64_t d) {
    const size_t padded = (rows + kRows - 1) / kRows * kRows;
    for (auto& q : queries) q.resize(padded * d);
    scores.resize(padded * kBlock);
    block.resize(padded * d);
    total.resize(padded * d);
    keys.resize(kLanes * d);
    values.resize(kBlock * d);
    bias.resize(2 * d);
    for (auto* x : {&most, &sums, &block_most, &block_sums}) x->resize(padded);
  }
};

class PagedAttention {
 public:
  PagedAttention(const PagedCall& call, int64_t layer, const Task& task, Scratch& scratch)
      : c(call),
        t(task),
        s(scratch),
        layer(layer),
        group(c.heads / c.kv_heads),
        rows(t.tokens * group) {
    s.fit(rows, c.width);
    chunk_len = c.chunk_lens ? c.chunk_lens[t.sequence] : 0;
    chunk = chunk_len ? t.at / chunk_len : 0;
  }

  // q: [rows of the call, H, d], rows `stride` apart; out: [rows of the call, H, d].
  void run(const float* q, int64_t stride, float* out) {
    rotate_queries(q, stride);
    begin();
    const int64_t d = c.width;
    float *most = s.block_most.data(), *sums = s.block_sums.data(), *block = s.block.data();
    for (int64_t n = t.first_block; n < t.last_block; ++n) {
      attend(n, most, sums);
      if (t.parts) {
        float* part = t.parts + (n - t.first_block) * rows * (d + 2);
        std::copy_n(most, rows, part);
        std::copy_n(sums, rows, part + rows);
        std::copy_n(block, rows * d, part + 2 * rows);
      } else {
        merge(most, sums, block);
      }
    }
    if (!t.parts) finish(out);
  }

  // Merges what `run` wrote to `parts`: all blocks of the rows, in ascending order.
  void collect(const float* parts, int64_t blocks, float* out) {
    begin();
    for (int64_t b = 0; b < blocks; ++b, parts += rows * (c.width + 2))
      merge(parts, parts + rows, parts + 2 * rows);
    finish(out);
  }

 private:
  // Rotates the queries in each way that their chunk needs, times 1/√d, packed [rows / kRows, d,
  // kRows].
  void rotate_queries(const float* q, int64_t stride) {
    const int64_t d = c.width, half = d / 2;
    const float scale = 1 / std::sqrt(static_cast<float>(d));
    for (int way = 0; way <= std::min<int64_t>(chunk, kRotations - 1); ++way)
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t token = t.row + i / group, head = t.head * group + i % group;
        const float *cos = c.query_cos[way] + token * half, *sin = c.query_sin[way] + token * half;
        float* packed = s.queries[way].data() + i / kRows * kRows * d + i % kRows;
        rotate(q + token * stride + head * d, cos, sin, d, scale, packed, kRows);
      }
  }

  // Attends to one block of keys: the maximum and the sum of each row, and its output in s.block. A
  // row that sees none of the block has the maximum −∞.
  void attend(int64_t block, float* most, float* sums) {
    const int64_t d = c.width, S = c.slots, start = block * kBlock;
    // Keys that at least one row sees.
    const int count = static_cast<int>(std::min<int64_t>(kBlock, t.at + t.tokens - start));
    const int tiles = (count + kLanes - 1) / kLanes;
    const float* values[kTiles];
    const int8_t* bytes[kTiles];  // values of int8, as they lie in the page
    const float* value_scales[kTiles];
    // Few rows read int8 values once, so they convert them on the way. More rows would convert them
    // again for each kRows, so they are converted once, to s.values.
    const bool few = c.key_scales && rows <= kRows;
    for (int n = 0; n < tiles; ++n) {
      const int64_t at = start + n * kLanes;
      const int64_t page = c.tables[t.sequence * c.table_width + at / S];
      const int64_t place = (layer * c.pages + page) * c.kv_heads + t.head, slot = at % S;
      const float* keys = static_cast<const float*>(c.keys) + place * d * S + slot;
      values[n] = static_cast<const float*>(c.values) + (place * S + slot) * d;
      value_scales[n] = nullptr;
      int64_t stride = S;
      if (c.key_scales) {
        read_keys(place, slot, at);
        keys = s.keys.data();
        stride = kLanes;
        bytes[n] = static_cast<const int8_t*>(c.values) + (place * S + slot) * d;
        if (!few) values[n] = read_values(bytes[n], std::min(count - n * kLanes, kLanes), n);
        value_scales[n] = c.value_scales + place * S + slot;
      }
      // By how many chunks the keys are behind the query chooses its rotation. A tile of sixteen
      // lies in one chunk, since chunk_len is a multiple of 16.
      const int64_t ahead = chunk_len ? chunk - at / chunk_len : 0;
      const float* queries = s.queries[std::min<int64_t>(ahead, kRotations - 1)].data();
      for (int64_t r = 0; r < rows; r += kRows)
        score_rows<kRows>(static_cast<int>(std::min<int64_t>(kRows, rows - r)), queries + r * d,
                          keys, stride, d, s.scores.data() + r * kBlock + n * kLanes);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t limit = std::min<int64_t>(count, t.at + r / group + 1 - start);
      most[r] = weights(s.scores.data() + r * kBlock, static_cast<int>(std::max<int64_t>(limit, 0)),
                        tiles, value_scales, &sums[r]);
    }
    if (few)
      return weigh_rows<kRows>(static_cast<int>(rows), s.scores.data(), bytes, count, d,
                               s.block.data());
    for (int64_t r = 0; r < rows; r += kRows)
      weigh_rows<kRows>(static_cast<int>(std::min<int64_t>(kRows, rows - r)),
                        s.scores.data() + r * kBlock, values, count, d, s.block.data() + r * d);
  }

  // Replaces scores by exp(score − maximum), of which the first `limit` are seen and the others are
  // 0; returns the maximum and puts the sum into `total`. The scales of int8 values are multiplied
  // in here, after the sum, so that the values need only be converted.
  float weights(float* scores, int limit, int tiles, const float* const* value_scales,
                float* total) {
    const int full = limit / kLanes;
    Lanes top = all(kNone);
    for (int n = 0; n < full; ++n) top = larger(top, load(scores + n * kLanes));
    if (limit % kLanes)
      top = larger(top, first(load(scores + full * kLanes), limit % kLanes, kNone));
    const float most = limit ? largest(top) : 0;
    const Lanes shift = all(most);
    Lanes sums = all(0);
    for (int n = 0; n < tiles; ++n) {
      const int seen = std::min(std::max(limit - n * kLanes, 0), kLanes);
      Lanes x = all(0);
      if (seen) x = exp(load(scores + n * kLanes) - shift);
      if (seen < kLanes) x = first(x, seen, 0);
      sums = sums + x;
      if (value_scales[n]) x = first(x * load(value_scales[n]), seen, 0);
      store(scores + n * kLanes, x);
    }
    *total = sum(sums);
    return limit ? most : kNone;
  }

  // Converts sixteen keys of int8 to s.keys, [d, 16], and adds the key bias, rotated to their
  // positions.
  //
  // A rotated key is R(p)(W x + b) = R(p) W x + R(p) b. Only the first term was rounded to int8.
  void read_keys(int64_t place, int64_t slot, int64_t at) {
    const int64_t d = c.width, S = c.slots, half = d / 2;
    const int8_t* keys = static_cast<const int8_t*>(c.keys) + place * d * S + slot;
    const Lanes scale = load(c.key_scales + place * S + slot);
    if (!c.key_bias) {
      for (int64_t i = 0; i < d; ++i)
        store(s.keys.data() + i * kLanes, scale * from_int8(keys + i * S));
      return;
    }
    // R(p) b for p = base + 0 … 15: b is rotated to the base once, then by 0 … 15 steps. Rotations
    // add up, so two small tables serve all positions and no cos or sin is computed here.
    const float* base = c.bias_bases[t.sequence] + (chunk_len ? at % chunk_len : at) / kLanes * d;
    const float* steps = c.bias_steps[t.sequence];
    float* bias = s.bias.data();
    rotate(c.key_bias + (layer * c.kv_heads + t.head) * d, base, base + half, d, 1, bias, 1);
    for (int64_t i = 0; i < half; ++i) {
      const Lanes cos = load(steps + i * kLanes), sin = load(steps + (half + i) * kLanes);
      const Lanes a = all(bias[i]), b = all(bias[i + half]);
      store(s.keys.data() + i * kLanes, fma(scale, from_int8(keys + i * S), a * cos - b * sin));
      store(s.keys.data() + (i + half) * kLanes,
            fma(scale, from_int8(keys + (i + half) * S), fma(b, cos, a * sin)));
    }
  }

  // Converts the first `seen` values of the block's n-th tile to floats, [16, d], without their
  // scales.
  const float* read_values(const int8_t* values, int seen, int n) {
    float* out = s.values.data() + n * kLanes * c.width;
    for (int64_t i = 0; i < seen * c.width; i += kLanes) store(out + i, from_int8(values + i));
    return out;
  }

  void begin() {
    std::fill_n(s.most.begin(), rows, kNone);
    std::fill_n(s.sums.begin(), rows, 0.0f);
    std::fill_n(s.total.begin(), rows * c.width, 0.0f);
  }

  // Extends the softmax by one block: sums and outputs of both sides are scaled to their common
  // maximum. Always called in ascending order of the blocks, so the rounding is always the same.
  void merge(const float* most, const float* sums, const float* block) {
    const int64_t d = c.width;
    for (int64_t r = 0; r < rows; ++r) {
      if (most[r] == kNone) continue;  // the row sees none of the block
      const float top = std::max(s.most[r], most[r]);
      const float old = std::exp(s.most[r] - top), now = std::exp(most[r] - top);
      s.most[r] = top;
      s.sums[r] = fma(s.sums[r], old, sums[r] * now);
      float* total = s.total.data() + r * d;
      for (int64_t i = 0; i < d; i += kLanes)
        store(total + i, fma(load(total + i), all(old), load(block + r * d + i) * all(now)));
    }
  }

  // Divides by the sums and writes the rows to `out`.
  void finish(float* out) {
    const int64_t d = c.width;
    for (int64_t r = 0; r < rows; ++r) {
      float* row = out + ((t.row + r / group) * c.heads + t.head * group + r % group) * d;
      const Lanes share = all(1 / s.sums[r]);
      for (int64_t i = 0; i < d; i += kLanes)
        store(row + i, load(s.total.data() + r * d + i) * share);
    }
  }

  const PagedCall& c;
  const Task& t;
  Scratch& s;
  int64_t layer, group, rows, chunk_len, chunk;
};

Scratch& scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// One task for each key head and each run of new tokens, which stay within one chunk.
std::vector<Task> tasks_of(const PagedCall& c) {
  const int64_t group = c.heads / c.kv_heads, most = std::max<int64_t>(1, kTileRows / group);
  std::vector<Task> tasks;
  int64_t row = 0;
  for (int64_t b = 0; b < c.sequences; ++b) {
    const int64_t chunk_len = c.chunk_lens ? c.chunk_lens[b] : 0;
    int64_t at = c.totals[b] - c.counts[b];
    while (at < c.totals[b]) {
      int64_t tokens = std::min(most, c.totals[b] - at);
      if (chunk_len) tokens = std::min(tokens, chunk_len - at % chunk_len);
      const int64_t blocks = (at + tokens + kBlock - 1) / kBlock;
      for (int64_t head = 0; head < c.kv_heads; ++head)
        tasks.push_back({b, row, at, tokens, head, 0, blocks, nullptr});
      at += tokens;
      row += tokens;
    }
  }
  return tasks;
}

// A task whose blocks are done as several tasks, because there are too few tasks for all threads:
// long sequences with few new tokens. Each block leaves its result in `parts`, and they are merged
// in order at the end, so that the bits are those of one task.
struct Split {
  Task task;
  std::vector<float> parts;
};

std::vector<Split> split(const PagedCall& c, std::vector<Task>& tasks) {
  const int64_t threads = WorkerPool::shared().threads();
  const int64_t wanted = 4 * threads, count = static_cast<int64_t>(tasks.size());
  std::vector<Split> splits;
  if (threads < 2 || count == 0 || count >= wanted) return splits;
  std::vector<Task> out;
  const int64_t each = (wanted + count - 1) / count;
  for (const Task& task : tasks) {
    if (task.last_block < 4) {
      out.push_back(task);
      continue;
    }
    const int64_t size = task.tokens * (c.heads / c.kv_heads) * (c.width + 2);
    splits.push_back({task, std::vector<float>(size * task.last_block)});
    const int64_t step = (task.last_block + each - 1) / each;
    for (int64_t first = 0; first < task.last_block; first += step) {
      Task part = task;
      part.first_block = first;
      part.last_block = std::min(first + step, task.last_block);
      part.parts = splits.back().parts.data() + first * size;
      out.push_back(part);
    }
  }
  tasks = std::move(out);
  return splits;
}

void write_all(const PagedCall& c, int64_t layer, const float* k, int64_t k_stride, const float* v,
               int64_t v_stride) {
  std::vector<std::pair<int64_t, int64_t>> places;  // page and slot of each row
  places.reserve(c.rows);
  for (int64_t b = 0; b < c.sequences; ++b)
    for (int64_t at = c.totals[b] - c.counts[b]; at < c.totals[b]; ++at)
      places.emplace_back(c.tables[b * c.table_width + at / c.slots], at % c.slots);
  constexpr int64_t kGrain = 32;  // rows that a thread takes at once
  parallel_for(c.rows, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * c.width);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t head = 0; head < c.kv_heads; ++head)
        write(c, layer, row, places[row].first, places[row].second, head,
              k + row * k_stride + head * c.width, v + row * v_stride + head * c.width,
              scratch.data());
  });
}

}  // namespace
}  // namespace openqwen

// Attention of the call's new tokens in one layer; their keys and values enter the cache first.
//
// q: [rows, H, d], k and v: [rows, K, d], not rotated; rows are `stride` floats apart. out: [rows,
// H, d].
extern "C" void openqwen_paged_attention(const openqwen::PagedCall* call, int64_t layer,
                                         const float* q, int64_t q_stride, const float* k,
                                         int64_t k_stride, const float* v, int64_t v_stride,
                                         float* out) {
  using namespace openqwen;
  const PagedCall& c = *call;
  write_all(c, layer, k, k_stride, v, v_stride);
  std::vector<Task> tasks = tasks_of(c);
  const std::vector<Split> splits = split(c, tasks);
  const int64_t count = static_cast<int64_t>(tasks.size());
  // The last tokens of a sequence see the most keys, so their tasks start first.
  WorkerPool::shared().run(count, [&](int64_t n) {
    const Task& task = tasks[count - 1 - n];
    PagedAttention(c, layer, task, scratch()).run(q, q_stride, out);
  });
  for (const Split& s : splits)
    PagedAttention(c, layer, s.task, scratch()).collect(s.parts.data(), s.task.last_block, out);
}
