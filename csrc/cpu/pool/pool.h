// A persistent team of threads that shares out the chunks of one phase at a time.
//
//     parallel_for(count, [&](int64_t item) { ... });     // one phase; the caller works too and returns when all is done
//     run_phases(run);                                    // a list of phases; each begins when the one before has ended
//
// Shares: each thread gets one contiguous share of a phase's chunks, so that it reads straight through the weights (and keeps its
// rows in a long prompt). A thread that has finished its share takes chunks from the ends of the others'.
//
// The end of a phase: a phase ends when its *chunks are done*, not when threads arrive. The operating system may stop a thread
// inside a chunk. If that chunk's output is staged, one other thread does the chunk again, and all go on without the stopped one
// until the run ends. On two CPUs that Python, the front and a client share, a thread is stopped several times in a step of 2 ms.
// pool.cpp says why this is safe. The thread that does the last chunk begins the next phase. It runs phases of one chunk itself,
// without waking anyone.
//
// Waiting threads fetch the weights that they will need, spin for a while and then sleep. What a chunk throws is thrown to the
// caller once the loop or the list of phases has ended.
//
// The pool starts with the first loop that needs it. A forked child starts a pool of its own. A loop inside a loop, and a loop that
// finds the pool busy, run on the caller alone. Every chunk runs in the default floating-point mode: round to nearest, denormals
// kept (torch can switch them off).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>

namespace dc {

constexpr int MAX_THREADS = 256;
// Entering a futex costs 40-50 us here, so a shorter spin would cost more than it saves. On a prototype, 100 us did as well as
// 20 us or better; it was not measured again in this pool.
constexpr int SPIN_US = 100;
// How long a thread waits for another thread's staged chunk before it does the chunk itself: twice the time that a chunk took in
// the slowest share of the phase so far, but at least REDO_US (a chunk should take 3 us). While no share is done: UNKNOWN_US.
constexpr int REDO_US = 8, UNKNOWN_US = 50;
constexpr int MEASURED = -1;
constexpr int64_t MAX_CHUNKS = 65535;

void set_threads(int threads);          // 1 (the start) = every loop runs on its caller; std::invalid_argument outside 1..MAX_THREADS
int get_threads();
int sleeping_threads();                 // of the pool's helpers, how many are parked; for tests
int fork_generation();                  // changes in a forked child: threads made before are not there

// For tests. Every run uses `width` threads (0: as many as it asks for). Threads take the others' chunks before their own, and do
// staged chunks again after `redo_us` (MEASURED: as said above).
void force_schedule(int width, bool steal_first, int redo_us);
int forced_width();
int64_t redone_chunks();                // how many staged chunks this process's pool has done again so far
int64_t patience_us();                  // how long a thread would wait now before it does a staged chunk again
void refuse_memory(size_t beyond);      // for tests: Memory does not grow beyond this many bytes; 0: as far as the system allows

struct Phase {
    void (*run)(const void* context, int64_t chunk, void* staged);
    const void* context;
    int64_t chunks;                     // 1..MAX_CHUNKS
    const uint8_t* weights = nullptr;   // what the chunks read, in their order; null: nothing worth fetching early
    int64_t weight_bytes = 0;
    const Phase* ahead = nullptr;       // the next phase that has weights
    // With put, a chunk writes only to `staged`, and put, which is short, moves that to where it belongs. (With `staged` null, and
    // without put, a chunk writes where the output belongs.) `run` may then be at work on two threads. It may even go on after
    // later phases have overwritten what it reads; such output is thrown away.
    void (*put)(const void* context, int64_t chunk, const void* staged) = nullptr;
    size_t staged_bytes = 0;
};

struct Run {
    const Phase* phases;
    int64_t count;
    int width;                          // most threads
    int spin_us;                        // how long a thread waits for the others before it sleeps
    uint64_t* stamps;                   // [count + 1] ticks() when each phase begins and when the last ends, or null
    std::function<void()> begun = nullptr;      // called once by the caller, when others can go on without it
    bool stalled = false;               // out: the caller waited longer than spin_us within a phase
};

void run_phases(Run& run);              // waits for the pool if it is busy; throws what a chunk threw, or std::bad_alloc

void relax();                           // what a spinning thread does between two looks
uint64_t ticks();                       // a clock that takes 10 ns to read and counts evenly, in a unit that must be measured

using ItemFunction = void (*)(void* context, int64_t item);
void run_items(int64_t count, ItemFunction function, void* context);

template <class Body>
void parallel_for(int64_t count, const Body& body) {
    run_items(count, [](void* context, int64_t item) { (*static_cast<const Body*>(context))(item); }, const_cast<Body*>(&body));
}

// Sets the default floating-point mode for as long as it lives.
class DefaultFloatMode {
public:
    DefaultFloatMode();
    ~DefaultFloatMode();
private:
    [[maybe_unused]] unsigned before = 0;
};

class Memory {                                  // aligned to 64, only ever grows
public:
    void* at_least(size_t bytes);       // contents undefined where it has grown; std::bad_alloc
private:
    std::unique_ptr<void, void (*)(void*)> memory{nullptr, std::free};
    size_t size = 0;
};

// This thread's scratch memory: at least `bytes`, aligned to 64, contents undefined. It is valid until the thread's next call.
void* scratch(size_t bytes);            // std::bad_alloc

}  // namespace dc
