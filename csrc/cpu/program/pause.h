// A model that embeds texts waits between its layers while other processes of the server write answers.
//
// One word of shared memory is the time until which answers are being written, in nanoseconds of the steady clock, which is the
// same for all processes of a machine. Whoever writes an answer moves the time forward before each step. So it lies in the past
// as soon as nobody writes, also after a writer has died.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace dc {

struct Pause {
    std::atomic<const int64_t*> until{nullptr};     // null: this process never waits
    std::atomic<int64_t> most_ns{0};                // a pause lasts no longer, so that texts go on while answers never end
    std::atomic<int64_t> slice_ns{0};               // after a pause that long, layers go on without pauses for this time
    std::atomic<int64_t> sliced{0};                 // when that time ends
    std::atomic<int64_t> waited_ns{0};              // how long all pauses lasted together

    void wait() {
        const int64_t* const word = until.load();
        const int64_t begin = now(), end = begin + most_ns.load();
        if (!word || begin < sliced.load()) return;
        int64_t at = begin;
        while (at < end && at < __atomic_load_n(word, __ATOMIC_RELAXED)) {
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
            at = now();
        }
        if (at >= end) sliced.store(at + slice_ns.load());
        waited_ns.fetch_add(at - begin);
    }

private:
    static int64_t now() { return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
};

inline Pause pausing;                               // of this process, as its threads are

}  // namespace dc
