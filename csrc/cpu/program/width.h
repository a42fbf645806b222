// How many threads a decoding step gets: all, or one.
//
// Why: the weights stream through one thread at 80 % of the speed of two on two cores of one cache, at all of it on two
// hardware threads of one core, at half of it on two chips; and a second thread whose CPU another program takes costs more
// than it gives: 172 tok/s with two threads next to a busy loop, 435 with one (measured). Which of these holds changes
// within seconds, and nothing reports it; so measured times of steps of the same shape decide, stalls included:
//   - now and then a few steps run with the other width, and the faster one stays. A probe that changes nothing doubles the
//     time to the next: at first 64 steps, at most 2,048, so that by this estimate probes cost 0.1 to 0.3 % in the long run;
//   - a stall (a thread waited 100 us for another's chunk) brings the probe forward if steps have become slower since the
//     last one. The step that stalled keeps its width: going on alone lost 10 % at 16 rows, where Python and the front stop
//     a helper now and then, and gained nothing next to a busy loop.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dc {

class Width {
public:
    static constexpr int FIRST_INTERVAL = 64, LONGEST_INTERVAL = 2048, LEAST_INTERVAL = 32;
    static constexpr double GAIN = 0.97;            // the other width must take less than this part of the time;
    static constexpr double HOPELESS = 1.25;        // and its trial ends early where it takes this much more

    explicit Width(int probe_steps) : probe_steps(probe_steps) {}

    int choose(int threads) const { return wide != probing ? threads : 1; }

    // The step took `cost` (us) with the width chosen; `shape` tells which steps compare.
    void learn(int64_t shape, double cost, bool stalled) {
        if (shape != last_shape) {                  // nothing to compare with yet
            last_shape = shape;
            usual = Mean(), probe = Mean(), probing = false, settled = 0;
        }
        since_probe++;
        if (probing) {
            probe.add(cost);
            const bool hopeless = probe.count > 1 && probe.value > HOPELESS * usual.value;
            if (probe.count >= probe_steps || hopeless) decide();
            return;
        }
        usual.add(cost);
        const bool slower = usual.value * GAIN * GAIN > settled, sooner = stalled && wide && slower && since_probe >= LEAST_INTERVAL;
        const bool due = since_probe >= interval;
        if (usual.count >= probe_steps && (due || sooner)) probing = true, probe = Mean();
    }

private:
    struct Mean {                                   // of the last few
        double value = 0;
        int count = 0;
        void add(double x) { count++, value += (x - value) / std::min(count, 16); }
    };

    void decide() {
        const bool better = probe.value < GAIN * usual.value;
        if (better) wide = !wide, usual = probe;
        interval = better ? FIRST_INTERVAL : std::min(2 * interval, LONGEST_INTERVAL);
        probing = false, since_probe = 0, settled = usual.value;
    }

    int probe_steps, interval = FIRST_INTERVAL, since_probe = 0;
    bool wide = true, probing = false;
    int64_t last_shape = -1;
    Mean usual, probe;
    double settled = 0;                             // `usual` when last decided
};

}  // namespace dc
