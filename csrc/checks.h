// Checks at the boundary: a wrong argument is a ValueError that names it, before a pointer is followed.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dc {

inline void require(bool holds, const char* complaint) {        // "name: what it must be"; pybind11 makes it a ValueError
    if (!holds) throw std::invalid_argument(complaint);
}

// `offsets` (rows + 1) of a CSR list: from 0, never falling, at most `length`.
inline void check_offsets(const int64_t* offsets, int64_t rows, int64_t length, const char* complaint) {
    bool good = offsets[0] == 0 && offsets[rows] <= length;
    for (int64_t i = 0; i < rows; i++) good &= offsets[i] <= offsets[i + 1];
    require(good, complaint);
}

inline void check_range(const int32_t* values, int64_t count, int32_t low, int32_t below, const char* complaint) {
    bool good = true;
    for (int64_t i = 0; i < count; i++) good &= values[i] >= low && values[i] < below;
    require(good, complaint);
}

}  // namespace dc
