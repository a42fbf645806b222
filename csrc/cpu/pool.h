// A persistent pool of threads that shares out the items of one loop at a time.
//
//     parallel_for(count, [&](int64_t item) { ... });         // returns when every item is done
//
// Items are claimed one by one and the caller works too; it waits for *items done*, not for threads to arrive, so a thread
// that the operating system does not run costs speed and never a stall. Idle threads spin for SPIN_US and then sleep.
// The pool starts with the first loop that needs it (per process: a forked child starts its own). A loop inside a loop, or
// one that finds the pool busy with another Python thread's loop, runs on its caller alone. Items must not throw.
// Every item runs with the default floating-point mode: round to nearest, denormals kept (torch can switch them off).
#pragma once

#include <cstddef>
#include <cstdint>

namespace dc {

constexpr int MAX_THREADS = 256;
constexpr int SPIN_US = 50;             // entering a futex costs 40-50 us here, so a shorter spin would cost more than it saves

void set_threads(int threads);          // 1 (the start) = every loop runs on its caller; std::invalid_argument outside 1..MAX_THREADS
int get_threads();
int sleeping_threads();                 // of the pool's helpers, how many are parked; for tests

using ItemFunction = void (*)(void* context, int64_t item);
void run_items(int64_t count, ItemFunction function, void* context);

template <class Body>
void parallel_for(int64_t count, const Body& body) {
    run_items(count, [](void* context, int64_t item) { (*static_cast<const Body*>(context))(item); }, const_cast<Body*>(&body));
}

// This thread's scratch memory of at least `bytes`, aligned to 64, contents undefined; valid until the next call on the thread.
void* scratch(size_t bytes);

}  // namespace dc
