// A layer's experts in a step: which rows go where, and the products by expert.
//
//     route        (row by row) ids and shares of each row's experts
//     group        (one thread) the pairs (row, expert) in the order of experts, then of rows
//     gather       x of each pair, made ready: the pairs of an expert are rows of panels of its own
//     gate_up      hidden of each pair: activation(x W^T + bias) with its expert's W
//     gather, down the same for hidden -> added
//     combine      (row by row) x (or nothing) + the sum of share * added, in the order of the row's experts
//
// So each expert that any row chose is read once in a step, whether one row chose it or hundreds did. Chunks are laid out before the
// routing is known: a product has a fixed number of chunks, and each takes its part of the tiles of the experts that were chosen. The
// bits of a row do not depend on its place among the rows of its expert (tiles.h).
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/tiles/tiles.h"

namespace dc {

// The routing of one layer. Only `group` writes what the chunks of the products index by, and each layer has a routing of its own. So
// a chunk that a thread does again, or late, finds it unchanged (pool.cpp).
struct Routing {
    Routing(int64_t experts, int64_t chosen, bool sum_to_one, bool sigmoids, int64_t max_tokens);

    const int64_t experts, chosen;
    const bool sum_to_one, sigmoids;    // shares are made of sigmoids, with op.bias in the choice, or of a softmax
    std::vector<int32_t> ids;           // [T][chosen], by route
    std::vector<float> shares;          // [T][chosen], by route

    void group(int64_t rows);

    struct Expert { int32_t id, first, count, panel; };     // its pairs [first, first + count), from panel `panel` on
    std::vector<Expert> active;         // those with pairs, by id
    std::vector<int32_t> row_of;        // of pair i
    std::vector<int32_t> pair_of;       // [T][chosen]: which pair this is

    int64_t pairs() const { return int64_t(row_of.size()); }
    static int64_t most_panels(int64_t experts, int64_t pairs);     // that this many pairs can take

private:
    std::vector<int32_t> place;         // [experts + 1]
};

}  // namespace dc
