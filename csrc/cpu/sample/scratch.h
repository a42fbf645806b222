// How a thread's scratch memory is divided for one row of logits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dc {
namespace sampling {
namespace {                             // internal: each file compiles this for its own instructions

constexpr int LANES = 16, GROUP = 256, COARSE = 4;          // ids in a vector, in a group; groups of a coarse maximum

// Every array may be read and written one vector beyond its end.
struct Scratch {
    float* copy;                        // the row, where it must be changed
    float* maxima;                      // a vector for each group
    float* coarse;                      // a vector for each COARSE groups
    float* tail;                        // the last group, filled up with -inf
    uint32_t* list_ids;                 // the ids that may still survive, ascending
    float* list_logits;                 // their logits
    float* undecided;                   // the logits that top-p has still to decide on
    uint64_t* weights;                  // their weights

    Scratch(float* memory, int64_t vocab) {
        const int64_t groups = groups_of(vocab);
        const int64_t padded = groups * GROUP;
        copy = memory;
        maxima = copy + padded;
        coarse = maxima + groups * LANES;
        tail = coarse + (groups / COARSE + 1) * LANES;
        weights = reinterpret_cast<uint64_t*>(tail + GROUP);
        list_logits = reinterpret_cast<float*>(weights + padded + LANES);
        undecided = list_logits + padded + LANES;
        list_ids = reinterpret_cast<uint32_t*>(undecided + padded + LANES);
    }

    static int64_t groups_of(int64_t vocab) { return (vocab + GROUP - 1) / GROUP; }

    static size_t bytes(int64_t vocab) {
        const size_t padded = size_t(groups_of(vocab)) * GROUP;
        return 4 * (padded + 2 * (padded / LANES + LANES) + GROUP + 3 * (padded + LANES)) + 8 * (padded + LANES);
    }
};

}  // namespace
}  // namespace sampling
}  // namespace dc
