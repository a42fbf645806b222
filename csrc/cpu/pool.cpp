// The pool's two words: `claim` = (loop number, items not yet claimed) changes by compare-and-swap, `done` counts up.
// A helper reads a loop's function only after it has claimed one of its items; the loop cannot end before that item is done,
// so what it reads is that loop's. Sleepers are woken only if `sleepers` says that there are any.
#include "cpu/pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dc {
namespace {

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until `ready()` or SPIN_US have passed; true if ready.
template <class Ready>
bool spin(const Ready& ready) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(SPIN_US);
    do {
        for (int i = 0; i < 32; i++, pause())
            if (ready()) return true;
    } while (std::chrono::steady_clock::now() < end);
    return ready();
}

class DefaultFloatMode {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();
public:
    DefaultFloatMode() { _mm_setcsr(0x1F80); }
    ~DefaultFloatMode() { _mm_setcsr(before); }
#else
public:
    DefaultFloatMode() {}
#endif
};

thread_local bool inside = false;               // this thread is running an item

class Pool {
    alignas(64) std::atomic<uint64_t> claim{0};
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<int> sleepers{0};
    std::atomic<bool> caller_sleeps{false}, stop{false};
    int64_t count = 0;
    ItemFunction function = nullptr;
    void* context = nullptr;
    std::mutex mutex;
    std::condition_variable work, finished;
    std::vector<std::thread> helpers;

    bool something_to_do() const { return uint32_t(claim.load()) != 0 || stop.load(); }

    bool do_one_item() {
        uint64_t seen = claim.load();
        do {
            if (uint32_t(seen) == 0) return false;
        } while (!claim.compare_exchange_weak(seen, seen - 1));
        const int64_t all = count;
        function(context, all - int64_t(uint32_t(seen)));
        if (done.fetch_add(1) + 1 == all && caller_sleeps.load()) {
            std::lock_guard<std::mutex> lock(mutex);
            finished.notify_all();
        }
        return true;
    }

    void help() {
        DefaultFloatMode mode;
        inside = true;
        while (!stop.load()) {
            while (do_one_item()) {}
            if (spin([&] { return something_to_do(); })) continue;
            std::unique_lock<std::mutex> lock(mutex);
            sleepers.fetch_add(1);              // before the last look at `claim`; run() looks at it after setting `claim`
            work.wait(lock, [&] { return something_to_do(); });
            sleepers.fetch_sub(1);
        }
    }

public:
    std::mutex busy;                            // held by the thread whose loop this is

    explicit Pool(int threads) {
        for (int i = 1; i < threads; i++) helpers.emplace_back([this] { help(); });
    }

    void dismiss_helpers() {                    // a caller that still holds this pool then works alone
        {
            std::lock_guard<std::mutex> lock(mutex);
            stop.store(true);
            work.notify_all();
        }
        for (auto& helper : helpers) helper.join();
        helpers.clear();
    }

    int asleep() const { return sleepers.load(); }

    void run(int64_t items, ItemFunction body, void* argument) {        // items < 2^32; `busy` is held
        count = items;
        function = body;
        context = argument;
        done.store(0);
        claim.store(((claim.load() >> 32) + 1) << 32 | uint64_t(items));
        if (sleepers.load()) {
            std::lock_guard<std::mutex> lock(mutex);
            work.notify_all();
        }
        while (do_one_item()) {}
        if (spin([&] { return done.load() == items; })) return;
        std::unique_lock<std::mutex> lock(mutex);
        caller_sleeps.store(true);
        finished.wait(lock, [&] { return done.load() == items; });
        caller_sleeps.store(false);
    }
};

std::mutex making;                              // guards `pool` and `threads` being changed
std::atomic<Pool*> pool{nullptr};
std::atomic<int> wanted_threads{1};

void forget_after_fork() {                      // the parent's helpers do not exist in the child; its pool is left alone
    pool.store(nullptr);
    new (&making) std::mutex;
    inside = false;
}

Pool* get_pool() {
    if (Pool* ready = pool.load()) return ready;
    std::lock_guard<std::mutex> lock(making);
    if (!pool.load()) {
        static const int registered = pthread_atfork(nullptr, nullptr, forget_after_fork);
        (void)registered;
        pool.store(new Pool(wanted_threads.load()));
    }
    return pool.load();
}

void run_alone(int64_t count, ItemFunction function, void* context) {
    DefaultFloatMode mode;
    for (int64_t item = 0; item < count; item++) function(context, item);
}

struct Scratch {
    void* memory = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(memory); }
};

}  // namespace

void set_threads(int threads) {
    if (threads < 1 || threads > MAX_THREADS) throw std::invalid_argument("threads: 1 to 256");
    std::lock_guard<std::mutex> lock(making);
    if (threads == wanted_threads.load()) return;
    if (Pool* old = pool.load()) {
        std::lock_guard<std::mutex> unused(old->busy);          // until a loop under way has ended
        pool.store(nullptr);
        old->dismiss_helpers();                                 // the object stays: someone may be about to lock it
    }
    wanted_threads.store(threads);
}

int get_threads() { return wanted_threads.load(); }

int sleeping_threads() {
    Pool* ready = pool.load();
    return ready ? ready->asleep() : 0;
}

void run_items(int64_t count, ItemFunction function, void* context) {
    if (count <= 1 || inside || wanted_threads.load() == 1) return run_alone(count, function, context);
    Pool* shared = get_pool();
    std::unique_lock<std::mutex> mine(shared->busy, std::try_to_lock);
    if (!mine) return run_alone(count, function, context);
    DefaultFloatMode mode;
    inside = true;
    shared->run(count, function, context);
    inside = false;
}

void* scratch(size_t bytes) {
    thread_local Scratch mine;
    if (mine.size < bytes) {
        std::free(mine.memory);
        mine.size = (bytes + 4095) / 4096 * 4096;
        mine.memory = std::aligned_alloc(64, mine.size);
        if (!mine.memory) std::abort();
    }
    return mine.memory;
}

}  // namespace dc
