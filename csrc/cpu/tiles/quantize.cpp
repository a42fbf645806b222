// op       quantize_block: floats -> one GGUF block of a quantized type
// cost     one thread, a value: 1 to 4 ns; where the scale is searched 50 (q4_k, q5_k), 90 (iq4_nl, iq4_xs) and 160 (q6_k)
// numerics q8_0, q4_0, q4_1, q5_0, q5_1, mxfp4 follow ggml's reference operation for operation, so they equal gguf.quants.quantize.
//          The others have no reference that is fast. Here some scales (and minimums) are tried: each is fitted by least squares to
//          the codes that it gives, larger values weighing more, and the one with the least error is taken. A value that is not
//          finite gives some integer
#include <algorithm>
#include <cstring>

#include "cpu/tiles/tiles.h"
#define DC_ISA portable
#include "cpu/tiles/formats.h"

namespace dc {
namespace {

using namespace portable;

void put_half(float x, uint8_t* to) {
    Half half;
    narrow(x, &half);
    std::memcpy(to, &half, 2);
}

// What a float16 keeps of x.
float rounded_to_half(float x) {
    Half half;
    narrow(x, &half);
    return widen(half);
}

uint8_t clipped(float x, float high) {
    const float positive = x > 0 ? x : 0;
    return uint8_t(int(positive < high ? positive : high));
}

int nearest(float x, int low, int high) {
    const float within = x > float(low) ? x < float(high) ? x : float(high) : float(low);      // a NaN becomes low
    return int(within + (within < 0 ? -0.5f : 0.5f));
}

void put_nibbles(const uint8_t* codes, uint8_t* to) {           // of 32 columns
    for (int k = 0; k < 16; k++) to[k] = uint8_t((codes[k] & 15) | codes[k + 16] << 4);
}

void put_fifth_bits(const uint8_t* codes, uint8_t* to) {
    for (int k = 0; k < 32; k += 8) {
        int bits = 0;
        for (int i = 0; i < 8; i++) bits |= (codes[k + i] >> 4 & 1) << i;
        to[k / 8] = uint8_t(bits);
    }
}

void put_nibble_pairs(const uint8_t* codes, uint8_t* to) {      // of 256 columns
    for (int k = 0; k < 128; k++) {
        const int first = k / 32 * 64 + k % 32;
        to[k] = uint8_t((codes[first] & 15) | codes[first + 32] << 4);
    }
}

// ---- as ggml's reference

// The largest of 32 values by size. Positive floats are ordered as their bits are, and compilers vectorize the maximum of integers.
float largest_of(const float* x) {
    int32_t most = 0;
    for (int i = 0; i < 32; i++) {
        const int32_t bits = bits_of<int32_t>(x[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return bits_of<float>(most);
}

void quantize_q8_0(const float* x, uint8_t* to) {
    const float d = largest_of(x) / 127, inverse = d == 0 ? 0 : 1 / d, high = d == 0 ? 0 : 127;
    int8_t codes[32];
    for (int i = 0; i < 32; i++) {          // nearest, halves away from zero; without branches, so that compilers vectorize it
        const float scaled = x[i] * inverse, size = __builtin_fabsf(scaled), within = size < high ? size : high;
        const int whole = int(within), rounded = whole + int(2 * (within - float(whole))), sign = bits_of<int32_t>(scaled) >> 31;
        codes[i] = int8_t((rounded ^ sign) - sign);
    }
    std::memcpy(to + 2, codes, 32);
    put_half(d, to);
}

// Codes of 4 or 5 bits with the largest value (by size) at code 0.
float codes_around_zero(const float* x, int middle, uint8_t* codes) {
    const float amax = largest_of(x);
    int first = 0;                          // of both signs the first counts
    while (first < 31 && !(__builtin_fabsf(x[first]) >= amax)) first++;
    const float d = x[first] / float(-middle), inverse = d == 0 ? 0 : 1 / d;
    for (int i = 0; i < 32; i++) codes[i] = clipped(x[i] * inverse + (float(middle) + 0.5f), float(2 * middle - 1));
    return d;
}

struct Line { float scale, minimum; };

Line codes_from_minimum(const float* x, int most, uint8_t* codes) {
    float low = x[0], high = x[0];
    for (int i = 1; i < 32; i++) low = std::min(low, x[i]), high = std::max(high, x[i]);
    const float d = (high - low) / float(most), inverse = d == 0 ? 0 : 1 / d;
    for (int i = 0; i < 32; i++) codes[i] = clipped((x[i] - low) * inverse + 0.5f, float(most));
    return {d, low};
}

void quantize_mxfp4(const float* x, uint8_t* to) {
    const float amax = largest_of(x);
    const int exponent = amax > 0 ? int(bits_of<uint32_t>(amax) >> 23) - 2 : 0;     // of a normal float: floor(log2) - 2 + 127
    to[0] = uint8_t(std::clamp(exponent, 0, 254));
    const float d = bits_of<float>(uint32_t(to[0]) << 23) * 0.5f;
    uint8_t codes[32];
    for (int i = 0; i < 32; i++) {
        float least = __builtin_huge_valf();
        codes[i] = 0;
        for (int c = 0; c < 16; c++) {
            const float error = __builtin_fabsf(d * float(MXFP4_VALUES[c]) - x[i]);
            if (error < least) least = error, codes[i] = uint8_t(c);
        }
    }
    put_nibbles(codes, to + 1);
}

// Codes with a zero point: 0 is one of the `count` values' levels, as their quantizers have it.
void quantize_u4(const float* x, int count, uint8_t* to) {
    float low = 0, high = 0;
    for (int i = 0; i < count; i++) low = std::min(low, x[i]), high = std::max(high, x[i]);
    put_half((high - low) / 15, to);
    const float d = rounded_to_half((high - low) / 15), inverse = d == 0 ? 0 : 1 / d;
    to[2] = uint8_t(nearest(-low * inverse, 0, 15));
    for (int i = 0; i < count; i += 32) {
        uint8_t codes[32];
        for (int k = 0; k < 32; k++) codes[k] = clipped(x[i + k] * inverse + (float(to[2]) + 0.5f), 15);
        put_nibbles(codes, to + 3 + i / 2);
    }
}

// ---- by search: some scales (and minimums) are tried, and the one with the least weighted squared error is taken

float weight_of(float x, float mean_square) { return __builtin_sqrtf(mean_square) + __builtin_fabsf(x); }

float mean_square_of(const float* x, int count) {
    float sum = 0;
    for (int i = 0; i < count; i++) sum += x[i] * x[i];
    return sum / float(count);
}

constexpr int CANDIDATES = 9;           // scales from 0.9 to 1.1 times the one that the largest value asks for

// x = scale * code + minimum with codes 0 .. most and minimum <= 0.
Line fit_line(const float* x, int count, int most, uint8_t* codes) {
    float low = 0, high = x[0];
    for (int i = 0; i < count; i++) low = std::min(low, x[i]), high = std::max(high, x[i]);
    if (!(high > low)) return std::memset(codes, 0, size_t(count)), Line{0, low};
    const float mean_square = mean_square_of(x, count);
    Line best{};
    float least = __builtin_huge_valf();
    for (int n = 0; n < CANDIDATES; n++) {
        const float inverse = float(most) * (0.9f + 0.025f * float(n)) / (high - low);
        float w = 0, wq = 0, wqq = 0, wx = 0, wqx = 0;
        for (int i = 0; i < count; i++) {
            const float q = float(clipped((x[i] - low) * inverse + 0.5f, float(most))), weight = weight_of(x[i], mean_square);
            w += weight, wq += weight * q, wqq += weight * q * q, wx += weight * x[i], wqx += weight * q * x[i];
        }
        const float determinant = w * wqq - wq * wq;
        if (!(determinant > 0)) continue;
        Line line{(w * wqx - wq * wx) / determinant, (wqq * wx - wq * wqx) / determinant};
        if (line.minimum > 0) line = {wqx / wqq, 0};
        float error = 0;
        for (int i = 0; i < count; i++) {
            const float q = float(clipped((x[i] - low) * inverse + 0.5f, float(most))), off = line.scale * q + line.minimum - x[i];
            error += weight_of(x[i], mean_square) * off * off;
        }
        if (error < least) least = error, best = line;
    }
    return best;
}

// x = scale * level, where both may have either sign. level(y) is the level next to y; the largest value's level is near `reach`.
template <class Level>
float fit_scale(const float* x, int count, float reach, Level level) {
    float largest = 0;
    for (int i = 0; i < count; i++)
        if (__builtin_fabsf(x[i]) > __builtin_fabsf(largest)) largest = x[i];
    if (largest == 0) return 0;
    const float mean_square = mean_square_of(x, count);
    float best = 0, most = -1;
    for (int sign = -1; sign <= 1; sign += 2)
        for (int n = 0; n < CANDIDATES; n++) {
            const float inverse = float(sign) * reach * (0.9f + 0.025f * float(n)) / largest;
            float xl = 0, ll = 0;
            for (int i = 0; i < count; i++) {
                const float l = level(x[i] * inverse), weight = weight_of(x[i], mean_square);
                xl += weight * x[i] * l, ll += weight * l * l;
            }
            if (ll > 0 && xl * xl > most * ll) most = xl * xl / ll, best = xl / ll;
        }
    return best;
}

int nearest_iq4(float x) {                      // without a branch, which nothing could foresee
    int code = 0;
    for (int i = 0; i < 15; i++) code += x > 0.5f * float(IQ4_VALUES[i] + IQ4_VALUES[i + 1]);
    return code;
}

float iq4_level(float x) { return float(IQ4_VALUES[nearest_iq4(x)]); }

void quantize_k(const float* x, bool fifth, uint8_t* to) {          // q4_k, q5_k
    const int most = fifth ? 31 : 15;
    uint8_t codes[256] = {};
    Line lines[8];
    float scale = 0, minimum = 0;
    for (int i = 0; i < 8; i++) {
        lines[i] = fit_line(x + 32 * i, 32, most, codes + 32 * i);
        scale = std::max(scale, lines[i].scale), minimum = std::max(minimum, -lines[i].minimum);
    }
    put_half(scale / 63, to), put_half(minimum / 63, to + 2);
    const float d = rounded_to_half(scale / 63), dmin = rounded_to_half(minimum / 63);
    uint8_t* packed = to + 4;
    std::memset(packed, 0, 12);
    for (int i = 0; i < 8; i++) {
        const int s = d > 0 ? nearest(lines[i].scale / d, 0, 63) : 0, m = dmin > 0 ? nearest(-lines[i].minimum / dmin, 0, 63) : 0;
        if (i < 4) {
            packed[i] = uint8_t(packed[i] | s), packed[i + 4] = uint8_t(packed[i + 4] | m);
        } else {
            packed[i + 4] = uint8_t((s & 15) | (m & 15) << 4);
            packed[i - 4] = uint8_t(packed[i - 4] | s >> 4 << 6), packed[i] = uint8_t(packed[i] | m >> 4 << 6);
        }
        const float step = d * float(s), base = dmin * float(m), inverse = step > 0 ? 1 / step : 0;
        for (int k = 32 * i; k < 32 * i + 32; k++) codes[k] = clipped((x[k] + base) * inverse + 0.5f, float(most));
    }
    if (fifth)
        for (int k = 0; k < 32; k++) {
            int bits = 0;
            for (int i = 0; i < 8; i++) bits |= (codes[32 * i + k] >> 4) << i;
            to[16 + k] = uint8_t(bits);
        }
    put_nibble_pairs(codes, to + (fifth ? 48 : 16));
}

// Pairs of bits of 256 codes, 128 of them in 32 bytes.
void put_pairs(const uint8_t* codes, uint8_t* to) {
    std::memset(to, 0, 64);
    for (int k = 0; k < 256; k++) {
        uint8_t& byte = to[k / 128 * 32 + k % 32];
        byte = uint8_t(byte | (codes[k] & 3) << k % 128 / 32 * 2);
    }
}

void quantize_q2_k(const float* x, uint8_t* to) {
    uint8_t codes[256] = {};
    Line lines[16];
    float scale = 0, minimum = 0;
    for (int i = 0; i < 16; i++) {
        lines[i] = fit_line(x + 16 * i, 16, 3, codes + 16 * i);
        scale = std::max(scale, lines[i].scale), minimum = std::max(minimum, -lines[i].minimum);
    }
    put_half(scale / 15, to + 80), put_half(minimum / 15, to + 82);
    const float d = rounded_to_half(scale / 15), dmin = rounded_to_half(minimum / 15);
    for (int i = 0; i < 16; i++) {
        const int s = d > 0 ? nearest(lines[i].scale / d, 0, 15) : 0, m = dmin > 0 ? nearest(-lines[i].minimum / dmin, 0, 15) : 0;
        to[i] = uint8_t(s | m << 4);
        const float step = d * float(s), base = dmin * float(m), inverse = step > 0 ? 1 / step : 0;
        for (int k = 16 * i; k < 16 * i + 16; k++) codes[k] = clipped((x[k] + base) * inverse + 0.5f, 3);
    }
    put_pairs(codes, to + 16);
}

void quantize_q3_k(const float* x, uint8_t* to) {
    float scales[16], largest = 0;
    for (int i = 0; i < 16; i++) {
        scales[i] = fit_scale(x + 16 * i, 16, 4, [](float y) { return float(nearest(y, -4, 3)); });
        if (__builtin_fabsf(scales[i]) > __builtin_fabsf(largest)) largest = scales[i];
    }
    put_half(largest / -32, to + 108);
    const float d = rounded_to_half(largest / -32);
    uint8_t codes[256];
    std::memset(to, 0, 108);
    for (int i = 0; i < 16; i++) {
        const int s = d == 0 ? 0 : nearest(scales[i] / d, -32, 31), stored = s + 32;
        uint8_t &low = to[96 + i % 8], &high = to[104 + i % 4];
        low = uint8_t(low | (stored & 15) << i / 8 * 4), high = uint8_t(high | stored >> 4 << i / 4 * 2);
        const float step = d * float(s), inverse = step == 0 ? 0 : 1 / step;
        for (int k = 16 * i; k < 16 * i + 16; k++) {
            codes[k] = uint8_t(nearest(x[k] * inverse, -4, 3) + 4);
            to[k % 32] = uint8_t(to[k % 32] | codes[k] >> 2 << k / 32);
        }
    }
    put_pairs(codes, to + 32);
}

void quantize_q6_k(const float* x, uint8_t* to) {
    float scales[16], largest = 0;
    for (int i = 0; i < 16; i++) {
        scales[i] = fit_scale(x + 16 * i, 16, 32, [](float y) { return float(nearest(y, -32, 31)); });
        if (__builtin_fabsf(scales[i]) > __builtin_fabsf(largest)) largest = scales[i];
    }
    put_half(largest / -128, to + 208);
    const float d = rounded_to_half(largest / -128);
    std::memset(to, 0, 192);
    for (int i = 0; i < 16; i++) {
        const int s = d == 0 ? 0 : nearest(scales[i] / d, -128, 127);
        to[192 + i] = uint8_t(s);
        const float step = d * float(s), inverse = step == 0 ? 0 : 1 / step;
        for (int k = 16 * i; k < 16 * i + 16; k++) {
            const int code = nearest(x[k] * inverse, -32, 31) + 32, half = k / 128, within = k % 128;
            uint8_t &low = to[64 * half + within % 64], &high = to[128 + 32 * half + within % 32];
            low = uint8_t(low | (code & 15) << within / 64 * 4);
            high = uint8_t(high | code >> 4 << within / 32 * 2);
        }
    }
}

void quantize_iq4_nl(const float* x, uint8_t* to) {
    const float scale = fit_scale(x, 32, 127, iq4_level), d = rounded_to_half(scale), inverse = d == 0 ? 0 : 1 / d;
    uint8_t codes[32];
    for (int k = 0; k < 32; k++) codes[k] = uint8_t(nearest_iq4(x[k] * inverse));
    put_half(scale, to);
    put_nibbles(codes, to + 2);
}

void quantize_iq4_xs(const float* x, uint8_t* to) {
    float scales[8], largest = 0;
    for (int i = 0; i < 8; i++) {
        scales[i] = fit_scale(x + 32 * i, 32, 127, iq4_level);
        if (__builtin_fabsf(scales[i]) > __builtin_fabsf(largest)) largest = scales[i];
    }
    put_half(largest / -32, to);
    const float d = rounded_to_half(largest / -32);
    std::memset(to + 2, 0, 6);
    for (int i = 0; i < 8; i++) {
        const int s = (d == 0 ? 0 : nearest(scales[i] / d, -32, 31)) + 32;
        to[4 + i / 2] = uint8_t(to[4 + i / 2] | (s & 15) << i % 2 * 4);
        to[2 + i / 4] = uint8_t(to[2 + i / 4] | s >> 4 << i % 4 * 2);
        const float step = d * float(s - 32), inverse = step == 0 ? 0 : 1 / step;
        uint8_t codes[32];
        for (int k = 0; k < 32; k++) codes[k] = uint8_t(nearest_iq4(x[32 * i + k] * inverse));
        put_nibbles(codes, to + 8 + 16 * i);
    }
}

}  // namespace

void quantize_block(Weight type, const float* x, uint8_t* to) {
    uint8_t codes[32];
    switch (type) {
        case Weight::q4_0: put_half(codes_around_zero(x, 8, codes), to), put_nibbles(codes, to + 2); break;
        case Weight::q5_0: put_half(codes_around_zero(x, 16, codes), to), put_fifth_bits(codes, to + 2), put_nibbles(codes, to + 6); break;
        case Weight::q4_1:
        case Weight::q5_1: {
            const bool fifth = type == Weight::q5_1;
            const Line line = codes_from_minimum(x, fifth ? 31 : 15, codes);
            put_half(line.scale, to), put_half(line.minimum, to + 2);
            if (fifth) put_fifth_bits(codes, to + 4);
            put_nibbles(codes, to + (fifth ? 8 : 4));
            break;
        }
        case Weight::q2_k: quantize_q2_k(x, to); break;
        case Weight::q3_k: quantize_q3_k(x, to); break;
        case Weight::q4_k: quantize_k(x, false, to); break;
        case Weight::q5_k: quantize_k(x, true, to); break;
        case Weight::q6_k: quantize_q6_k(x, to); break;
        case Weight::iq4_nl: quantize_iq4_nl(x, to); break;
        case Weight::iq4_xs: quantize_iq4_xs(x, to); break;
        case Weight::mxfp4: quantize_mxfp4(x, to); break;
        case Weight::u4_g32: quantize_u4(x, 32, to); break;
        case Weight::u4_g128: quantize_u4(x, 128, to); break;
        default: quantize_q8_0(x, to);
    }
}

}  // namespace dc
