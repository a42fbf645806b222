#include "cpu/program/adapters.h"

#include <algorithm>
#include <cstring>

#include "checks.h"

namespace dc {

const void* Adapter::keep(const void* from, int64_t bytes) {
    void* const to = memory.allocate(size_t(bytes));
    if (bytes) std::memcpy(to, from, size_t(bytes));
    return to;
}

void Adapter::add(int64_t number, const AdapterMatrix& matrix, int64_t b_bytes) {
    require(number >= 0 && number < count(), "number: must be of one of the adapter's matrices");
    AdapterMatrix& to = all[size_t(number)];
    require(!to.ranks, "number: the adapter has this matrix already");
    to = matrix;
    to.a = keep(matrix.a, matrix.ranks * matrix.columns * row_bytes(matrix.type, 1));
    to.b = keep(matrix.b, b_bytes);
    to.scales = static_cast<const float*>(keep(matrix.scales, matrix.ranks * int64_t(sizeof(float))));
    to.tiles = static_cast<const AdapterTile*>(keep(matrix.tiles, matrix.tile_count * int64_t(sizeof(AdapterTile))));
}

int64_t Adapter::most_ranks() const {
    int64_t most = 0;
    for (const AdapterMatrix& matrix : all) most = std::max(most, matrix.ranks);
    return most;
}

}  // namespace dc
