// The adapters that rows of a step may have: see AdapterMatrix in tiles.h.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/tiles/tiles.h"

namespace dc {

// All matrices of an adapter, by their numbers in the program. It owns what they point to, in huge pages, because otherwise many
// adapters would miss the TLB at each tile.
class Adapter {
public:
    explicit Adapter(int64_t count) : all(size_t(count)) {}
    // Copies everything, of B b_bytes. std::invalid_argument for a number that was added before or that the program does not have.
    void add(int64_t number, const AdapterMatrix& matrix, int64_t b_bytes);
    const AdapterMatrix* matrices() const { return all.data(); }
    int64_t count() const { return int64_t(all.size()); }
    int64_t most_ranks() const;

private:
    std::vector<AdapterMatrix> all;
    Arena memory{1};
    const void* keep(const void* from, int64_t bytes);
};

}  // namespace dc
