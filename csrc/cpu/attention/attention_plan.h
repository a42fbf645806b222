// The items of a step's attention. They are computed once for each step and window, and every layer uses them.
#pragma once

#include <atomic>
#include <map>
#include <tuple>
#include <vector>

#include "cpu/attention/attention.h"

namespace dc {

// The sequences of a step. Rows starts[i] .. starts[i + 1] are the newest of lengths[i] positions, whose pages are
// pages[offsets[i]] ... A sequence of length 0 is padding, and its rows get zeros. `ahead` is empty, or has a position for each row:
// in two-sided work the row sees all positions below it, even those after itself; 0: it sees those up to itself. Wrong input throws
// std::invalid_argument.
class AttentionPlan {
public:
    AttentionPlan(std::vector<int32_t> pages, std::vector<int64_t> offsets, std::vector<int64_t> lengths,
                  std::vector<int64_t> starts, int heads, int kv_heads, int64_t num_pages, std::vector<int64_t> ahead = {});

    struct Work {
        std::vector<AttentionItem> items;
        int64_t states = 0;             // of one query, summed over the items that are merged
        int merges = 0;
        int64_t positions = 0;          // of all items and rows, in whole chunks: a measure of the work
    };
    // Guarded by the GIL. The result is valid as long as the plan. `of_texts`: rows see both sides, and a sequence must be whole
    const Work& work(int window, int head_size, bool of_texts = false, bool two_sided = false);

    int64_t rows() const { return starts.back(); }
    const int heads, kv_heads;
    const int64_t num_pages;

private:
    Work divide(int window, int head_size, bool of_texts, bool two_sided) const;
    std::vector<int32_t> pages;
    std::vector<int64_t> offsets, lengths, starts, ahead;
    std::map<std::tuple<int, int, bool, bool>, Work> made;      // by window, head size, whether of texts, and whether two-sided
};

// The attention of a step over one window: chunks of items, which threads may run in any order, layer after layer. `memory`
// (memory_bytes, aligned to 64) holds the states of divided sequences, and a layer leaves it ready for the next. A chunk writes its
// results at once (staged == nullptr), or writes the states of all its items to `staged`, from where put() takes them.
class AttentionRun {
public:
    static size_t memory_bytes(const AttentionPlan::Work& work, int head_size);
    AttentionRun(const AttentionPlan::Work& work, void* memory, int threads);
    int64_t chunks() const { return (count + per_chunk - 1) / per_chunk; }
    size_t staged_bytes(const AttentionJob& job) const;     // of any chunk
    void run(const AttentionJob& job, int64_t chunk, float* staged) const;
    void put(const AttentionJob& job, int64_t chunk, const float* staged) const;

private:
    static size_t counter_bytes(const AttentionPlan::Work& work);
    static int64_t floats_of(const AttentionJob& job, const AttentionItem& item);
    float* state_of(const AttentionJob& job, const AttentionItem& item) const { return states + item.state * state_floats(1, job.values()); }
    void count_state(const AttentionJob& job, const AttentionItem& item) const;
    const AttentionPlan::Work& work;
    std::atomic<int>* unfinished;
    float* states;
    int64_t count, per_chunk;
};

}  // namespace dc
