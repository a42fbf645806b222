// The grids of grids.def with each digit as a magnitude; of IQ1_* 8 times the digit.
#define DC_ISA portable
#include "cpu/tiles/formats.h"

namespace dc {
namespace {

#define GRID(name, count, ...) constexpr uint16_t packed_##name[count] = {__VA_ARGS__};
#include "cpu/tiles/grids.def"

struct Magnitudes { uint8_t of[8]; };

template <int EACH, int COUNT>
constexpr Grid<EACH, COUNT> unpacked(const uint16_t (&packed)[COUNT], Magnitudes magnitudes) {
    Grid<EACH, COUNT> grid = {};
    constexpr int BITS = EACH == 8 ? 2 : 3;
    for (int i = 0; i < COUNT; i++)
        for (int k = 0; k < EACH; k++) {
            const uint64_t magnitude = magnitudes.of[packed[i] >> BITS * k & ((1 << BITS) - 1)];
            grid.of[i] |= magnitude << 8 * k;
        }
    return grid;
}

template <int EACH, int COUNT>
constexpr Digits<COUNT> digits_of(const uint16_t (&packed)[COUNT], Magnitudes magnitudes) {
    Digits<COUNT> digits = {};
    for (int i = 0; i < COUNT; i++) digits.low[i] = uint8_t(packed[i]), digits.high[i] = uint8_t(packed[i] >> 8);
    for (int i = 0; i < 64; i++) digits.magnitudes[i] = magnitudes.of[i % (EACH == 8 ? 4 : 8)];
    return digits;
}

constexpr Magnitudes plus(Magnitudes magnitudes, int offset) {
    for (uint8_t& each : magnitudes.of) each = uint8_t(each + offset);
    return magnitudes;
}

constexpr Magnitudes IQ2 = {{8, 25, 43}}, IQ3_XXS = {{4, 12, 20, 28, 36, 44, 52, 62}}, IQ3_S = {{1, 3, 5, 7, 9, 11, 13, 15}}, IQ1 = {{9, 17, 25}};

}  // namespace

constexpr Grid<8, 256> GRID_IQ2_XXS = unpacked<8>(packed_iq2_xxs, IQ2);
constexpr Grid<8, 512> GRID_IQ2_XS = unpacked<8>(packed_iq2_xs, IQ2);
constexpr Grid<8, 1024> GRID_IQ2_S = unpacked<8>(packed_iq2_s, IQ2);
constexpr Grid<4, 256> GRID_IQ3_XXS = unpacked<4>(packed_iq3_xxs, IQ3_XXS);
constexpr Grid<4, 512> GRID_IQ3_S = unpacked<4>(packed_iq3_s, IQ3_S);
constexpr Grid<8, 2048> GRID_IQ1 = unpacked<8>(packed_iq1, IQ1);

constexpr Digits<256> DIGITS_IQ2_XXS = digits_of<8>(packed_iq2_xxs, plus(IQ2, 64));
constexpr Digits<512> DIGITS_IQ2_XS = digits_of<8>(packed_iq2_xs, plus(IQ2, 64));
constexpr Digits<1024> DIGITS_IQ2_S = digits_of<8>(packed_iq2_s, plus(IQ2, 64));
constexpr Digits<256> DIGITS_IQ3_XXS = digits_of<4>(packed_iq3_xxs, plus(IQ3_XXS, 64));
constexpr Digits<512> DIGITS_IQ3_S = digits_of<4>(packed_iq3_s, plus(IQ3_S, 16));
constexpr Digits<2048> DIGITS_IQ1 = digits_of<8>(packed_iq1, IQ1);

}  // namespace dc
