// The op of tests/support/toy_mixer.py: h_t = d * h_{t-1} + (1 - d) * x_t, for each channel.
//
// x, out  rows of C numbers, `wide` and `narrow` apart; decay (C): d
// state   (slots, C): h after a sequence's last row, and wherever `writes` says
// One sequence after the other, one row after the other: a row's bits do not depend on how steps are cut.
#include <cstdint>
#include <vector>

extern "C" void leak(const float* x, int64_t wide, const float* decay, float* state, float* out,
                     int64_t narrow, int64_t C, const int64_t* starts, const int64_t* firsts,
                     const int64_t* reads, int64_t sequences, const int64_t* rows, const int64_t* slots,
                     int64_t writes) {
    for (int64_t number = 0; number < sequences; ++number) {
        std::vector<float> h(C, 0.0f);
        if (firsts[number])
            h.assign(state + reads[number] * C, state + (reads[number] + 1) * C);
        for (int64_t row = starts[number]; row < starts[number + 1]; ++row) {
            for (int64_t c = 0; c < C; ++c)
                out[row * narrow + c] = h[c] = decay[c] * h[c] + (1 - decay[c]) * x[row * wide + c];
            for (int64_t write = 0; write < writes; ++write)
                if (rows[write] == row)
                    for (int64_t c = 0; c < C; ++c)
                        state[slots[write] * C + c] = h[c];
        }
    }
}
