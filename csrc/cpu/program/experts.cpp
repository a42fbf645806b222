// What of experts.h is made once, when a layer is recorded.
#include "cpu/program/experts.h"

#include <algorithm>

namespace dc {

Routing::Routing(int64_t experts, int64_t chosen, bool sum_to_one, bool sigmoids, int64_t max_tokens)
    : experts(experts), chosen(chosen), sum_to_one(sum_to_one), sigmoids(sigmoids), ids(size_t(max_tokens * chosen)), shares(ids.size()), pair_of(ids.size()) {
    active.reserve(size_t(experts)), row_of.reserve(ids.size()), place.reserve(size_t(experts) + 1);
}

int64_t Routing::most_panels(int64_t experts, int64_t pairs) {         // each expert's last panel may hold a single row
    const int64_t most = std::min(experts, pairs);
    return most + (pairs - most) / PANEL_ROWS;
}

}  // namespace dc
