// Which items a step's attention consists of: worked out once per step and window, used by every layer.
#pragma once

#include <atomic>
#include <map>
#include <tuple>
#include <vector>

#include "cpu/attention/attention.h"

namespace dc {

// The sequences of a step: rows starts[i] .. starts[i + 1] are the newest of lengths[i] positions, whose pages are
// pages[offsets[i]] ... A sequence of length 0 is padding: its rows get zeros. `ahead`: none, or for each row the position before which
// it sees all others where work is two-sided, even after itself; 0: it sees those up to itself. What is wrong throws std::invalid_argument.
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
    // guarded by the GIL; stays valid as long as the plan. `of_texts`: rows see both sides, and a sequence must be whole
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

// A step's attention over one window: chunks of items that threads may run in any order, layer after layer. `memory`
// (memory_bytes, aligned to 64) holds the states of divided sequences; a layer leaves it ready for the next. A chunk either
// writes what it has found at once (staged == nullptr), or all its items' states to `staged`, which put() then takes.
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
    float* state_of(const AttentionJob& job, const AttentionItem& item) const { return states + item.state * state_floats(1, job.head_size); }
    void count_state(const AttentionJob& job, const AttentionItem& item) const;
    const AttentionPlan::Work& work;
    std::atomic<int>* unfinished;
    float* states;
    int64_t count, per_chunk;
};

}  // namespace dc
