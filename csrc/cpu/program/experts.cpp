// The parts of experts.h that are no chunks of rows: what is made when a layer is recorded, and `group`.
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

void Routing::group(int64_t rows) {
    place.assign(size_t(experts) + 1, 0);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t j = 0; j < chosen; j++) place[size_t(ids[size_t(row * chosen + j)]) + 1]++;
    active.clear();
    int32_t panel = 0;
    for (int64_t e = 0; e < experts; e++) {
        const int32_t count = place[size_t(e) + 1];
        place[size_t(e) + 1] += place[size_t(e)];
        if (!count) continue;
        active.push_back({int32_t(e), place[size_t(e)], count, panel});
        panel += int32_t(panel_count(count));
    }
    row_of.resize(size_t(place[size_t(experts)]));
    for (int64_t row = 0; row < rows; row++)
        for (int64_t j = 0; j < chosen; j++) {
            const size_t i = size_t(row * chosen + j);
            pair_of[i] = place[size_t(ids[i])]++;
            row_of[size_t(pair_of[i])] = int32_t(row);
        }
}

}  // namespace dc
