// How many threads a decoding step gets: all, or one.
//
// Why: how fast weights stream through one thread, compared with two, depends on the machine. It is 80 % on two cores with one
// cache, all of it on two hardware threads of a core, and half of it on two chips. And a second thread costs more than it gives if
// another program takes its CPU: beside a busy loop two threads made 172 tok/s and one made 435 (measured). Which of these holds
// changes within seconds, and nothing reports it. So measured times of steps of one shape decide, stalls included:
//   - Now and then a few steps run with the other width, and the faster width stays. If a probe changes nothing, the time to the
//     next one doubles, from 64 steps up to 2,048. By this estimate probes cost 0.1 to 0.3 % in the long run.
//   - A stall (a thread waited 100 us for another's chunk) brings the next probe forward, if steps have become slower since the
//     last probe. The step that stalled keeps its width. To go on alone lost 10 % at 16 rows, where Python and the front stop a
//     helper now and then, and gained nothing beside a busy loop.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dc {

class Width {
public:
    static constexpr int FIRST_INTERVAL = 64, LONGEST_INTERVAL = 2048, LEAST_INTERVAL = 32;
    static constexpr double GAIN = 0.97;            // the other width is better if it takes less than this share of the time
    static constexpr double HOPELESS = 1.25;        // its trial ends early if it takes more than this

    explicit Width(int probe_steps) : probe_steps(probe_steps) {}

    int choose(int threads) const { return wide != probing ? threads : 1; }

    // The step took `cost` (us) with the width that was chosen. Only steps of one `shape` are compared.
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
    double settled = 0;                             // what `usual` was at the last decision
};

}  // namespace dc
