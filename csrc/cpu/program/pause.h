// Between the layers of a model that embeds texts: waiting while other processes of the server write answers.
// One word of shared memory says until when answers are written, in nanoseconds of the steady clock, which all processes of a
// machine read alike. Whoever writes an answer moves it on before each step, so that it lies in the past as soon as nobody does,
// or the writer has died.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace dc {

struct Pause {
    std::atomic<const int64_t*> until{nullptr};     // null: this process never waits
    std::atomic<int64_t> most_ns{0};                // that one pause lasts, so that texts go on while answers never end:
    std::atomic<int64_t> slice_ns{0};               // for so long, and to the end of a layer
    std::atomic<int64_t> sliced{0};                 // when the slice under way ends
    std::atomic<int64_t> waited_ns{0};              // in all

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
