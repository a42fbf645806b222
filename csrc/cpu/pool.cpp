// A thread's share is one word, (number of the phase, next chunk, end), that changes by compare-and-swap: its owner takes from
// the front, thieves from the end. A thread reads what a phase is only between claiming one of its chunks and counting it
// done; the phase cannot end in between, so what it reads is that phase's. `done` counts the chunks; who completes it is
// alone with the run until it has begun the next phase.
#include "cpu/pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
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

using Clock = std::chrono::steady_clock;

thread_local bool inside = false;               // this thread is running a chunk
std::atomic<int> width_forced{0};
std::atomic<bool> steal_forced{false};

// ---- shares

constexpr uint64_t ONE_NEXT = 1 << 16, ONE_PHASE = 1ull << 32;

bool is_empty(uint64_t share) { return (share >> 16 & 0xFFFF) >= (share & 0xFFFF); }

// A chunk from the front or the end of a share, or -1.
int64_t take(std::atomic<uint64_t>& share, bool from_end) {
    uint64_t seen = share.load();
    do {
        if (is_empty(seen)) return -1;
    } while (!share.compare_exchange_weak(seen, from_end ? seen - 1 : seen + ONE_NEXT));
    return from_end ? int64_t(seen & 0xFFFF) - 1 : int64_t(seen >> 16 & 0xFFFF);
}

// What a thread reads first in a coming phase: 64 KB, some 2 us of reading at 25 to 40 GB/s. Not measured with and without.
struct Coming {
    const uint8_t* at = nullptr;
    int64_t bytes = 0;

    Coming() = default;
    Coming(const Phase* phase, int thread, int width) {
        if (!phase || thread >= width) return;
        const int64_t begin = phase->chunks * thread / width, end = phase->chunks * (thread + 1) / width;
        at = phase->weights + phase->weight_bytes * begin / phase->chunks;
        bytes = std::min<int64_t>(phase->weight_bytes * (end - begin) / phase->chunks, 64 << 10);
    }

    void fetch_some() {                         // 8 lines
        for (int i = 0; i < 8 && bytes > 0; i++, at += 64, bytes -= 64) __builtin_prefetch(at, 0, 2);
    }
};

struct alignas(64) Member {
    std::atomic<uint64_t> share{0};
    alignas(64) std::atomic<bool> asleep{false};
    std::mutex mutex;
    std::condition_variable woken;

    void wake() {
        if (!asleep.load()) return;
        std::lock_guard<std::mutex> lock(mutex);
        woken.notify_one();
    }
};

class Pool {
    const int threads;
    std::unique_ptr<Member[]> members;          // 0: whoever runs the phases
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<int> width{1};
    std::atomic<int> spin_us{SPIN_US};
    std::atomic<bool> finished{true}, stop{false};
    Run* current = nullptr;                     // of these three, see the top of the file
    const Phase* phase = nullptr;
    uint64_t number = 0;
    std::vector<std::thread> helpers;

    // ---- the phase under way

    // The chunks this thread can get; then what it should fetch while it waits.
    void work(int me, Coming& coming) {
        const bool steal_first = steal_forced.load(std::memory_order_relaxed);
        for (;;) {
            if (steal_first && steal_one(me, coming)) continue;
            if (do_own_share(me, coming)) continue;
            if (!steal_one(me, coming)) return;
        }
    }

    bool do_own_share(int me, Coming& coming) {
        int64_t count = 0;
        for (int64_t chunk; (chunk = take(members[me].share, false)) >= 0; count++) phase->run(phase->context, chunk);
        if (count) count_done(me, count, coming);
        return count;
    }

    bool steal_one(int me, Coming& coming) {
        if (me >= width.load()) return false;
        for (int i = 1; i < threads; i++) {     // of all: the width may have shrunk since the shares went out
            const int64_t chunk = take(members[(me + i) % threads].share, true);
            if (chunk < 0) continue;
            phase->run(phase->context, chunk);
            count_done(me, 1, coming);
            return true;
        }
        return false;
    }

    void count_done(int me, int64_t count, Coming& coming) {
        const int64_t all = phase->chunks;
        coming = Coming(phase->ahead, me, width.load(std::memory_order_relaxed));
        if (done.fetch_add(count) + count == all) advance(me, phase + 1 - current->phases);
    }

    // ---- from phase to phase: this thread alone is at work

    void advance(int me, int64_t next) {
        for (; next < current->count; next++) {
            if (current->stamps) current->stamps[next] = ticks();
            phase = current->phases + next;
            if (phase->chunks > 1 && !(me == 0 && width.load() == 1)) return share_out(me);
            for (int64_t chunk = 0; chunk < phase->chunks; chunk++) phase->run(phase->context, chunk);
        }
        if (current->stamps) current->stamps[next] = ticks();
        finished.store(true);
        if (me != 0) members[0].wake();
    }

    void share_out(int me) {
        const int64_t chunks = phase->chunks;           // not to be read again once a share is out
        const int all = width.load();
        done.store(0, std::memory_order_relaxed);
        number += ONE_PHASE;
        const uint64_t now = number;
        for (int i = 0; i < all; i++)                   // the last is never empty, so the phase cannot end before it is out
            members[i].share.store(now | uint64_t(chunks * i / all) << 16 | uint64_t(chunks * (i + 1) / all));
        for (int i = 0; i < all; i++)
            if (i != me) members[i].wake();
    }

    // ---- waiting

    bool something_to_do(int me) const {
        return !is_empty(members[me].share.load()) || (me == 0 ? finished.load() : stop.load());
    }

    bool something_to_steal(int me) const {
        if (me >= width.load()) return false;
        for (int i = 0; i < threads; i++)
            if (!is_empty(members[i].share.load())) return true;
        return false;
    }

    // Fetches what comes and spins; false when spin_us have passed without anything to do.
    bool spin(int me, Coming coming) {
        const auto end = Clock::now() + std::chrono::microseconds(spin_us.load(std::memory_order_relaxed));
        for (; coming.bytes > 0; coming.fetch_some())
            if (something_to_do(me)) return true;
        do {
            for (int i = 0; i < 32; i++, relax())
                if (something_to_do(me)) return true;
            if (something_to_steal(me)) return true;
        } while (Clock::now() < end);
        return something_to_do(me);
    }

    void sleep(int me) {
        Member& mine = members[me];
        std::unique_lock<std::mutex> lock(mine.mutex);
        mine.asleep.store(true);                // before the last look at its share; share_out looks at `asleep` after setting it
        mine.woken.wait(lock, [&] { return something_to_do(me); });
        mine.asleep.store(false);
    }

    void help(int me) {
        DefaultFloatMode mode;
        inside = true;
        while (!stop.load()) {
            Coming coming;
            work(me, coming);
            if (!spin(me, coming)) sleep(me);
        }
    }

public:
    std::mutex busy;                            // held by the thread whose run this is

    explicit Pool(int threads) : threads(threads), members(new Member[size_t(threads)]) {
        for (int i = 1; i < threads; i++) helpers.emplace_back([this, i] { help(i); });
    }

    void dismiss_helpers() {                    // a caller that still holds this pool then works alone
        stop.store(true);
        for (int i = 1; i < threads; i++) members[i].wake();
        for (auto& helper : helpers) helper.join();
        helpers.clear();
    }

    int asleep() const {
        int count = 0;
        for (int i = 1; i < threads; i++) count += members[i].asleep.load();
        return count;
    }

    void run(Run& wanted) {                     // `busy` is held
        const int forced = forced_width();
        current = &wanted;
        finished.store(false);
        width.store(std::clamp(forced ? forced : wanted.width, 1, helpers.empty() ? 1 : threads));
        spin_us.store(wanted.spin_us);
        advance(0, 0);
        while (!finished.load()) {
            Coming coming;
            work(0, coming);
            if (spin(0, coming)) continue;
            wanted.stalled = true;              // a helper has been stopped inside a chunk
            sleep(0);
        }
    }
};

std::mutex making;                              // guards `pool` and `threads` being changed
std::atomic<Pool*> pool{nullptr};
std::atomic<int> wanted_threads{1}, forks{0};

void forget_after_fork() {                      // the parent's helpers do not exist in the child; its pool is left alone
    pool.store(nullptr);
    new (&making) std::mutex;
    inside = false;
    forks.fetch_add(1);
}

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget_after_fork);

Pool* get_pool() {
    if (Pool* ready = pool.load()) return ready;
    std::lock_guard<std::mutex> lock(making);
    if (!pool.load()) pool.store(new Pool(wanted_threads.load()));
    return pool.load();
}

class Inside {                                  // this thread's chunks run with the default float mode, and loops in them alone
    DefaultFloatMode mode;
    const bool before = inside;
public:
    Inside() { inside = true; }
    ~Inside() { inside = before; }
};

void run_alone(int64_t count, ItemFunction function, void* context) {
    DefaultFloatMode mode;
    for (int64_t item = 0; item < count; item++) function(context, item);
}

struct Items {
    ItemFunction function;
    void* context;
    int64_t count, chunks;

    static void run(const void* self, int64_t chunk) {
        const Items& items = *static_cast<const Items*>(self);
        const int64_t end = items.count * (chunk + 1) / items.chunks;
        for (int64_t item = items.count * chunk / items.chunks; item < end; item++) items.function(items.context, item);
    }
};

struct Scratch {
    void* memory = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(memory); }
};

}  // namespace

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

#if defined(__x86_64__)
DefaultFloatMode::DefaultFloatMode() : before(_mm_getcsr()) { _mm_setcsr(0x1F80); }
DefaultFloatMode::~DefaultFloatMode() { _mm_setcsr(before); }
uint64_t ticks() { return __rdtsc(); }
#else
DefaultFloatMode::DefaultFloatMode() {}
DefaultFloatMode::~DefaultFloatMode() {}
uint64_t ticks() { return uint64_t(Clock::now().time_since_epoch().count()); }
#endif

void set_threads(int threads) {
    if (threads < 1 || threads > MAX_THREADS) throw std::invalid_argument("threads: 1 to 256");
    std::lock_guard<std::mutex> lock(making);
    if (threads == wanted_threads.load()) return;
    if (Pool* old = pool.load()) {
        std::lock_guard<std::mutex> unused(old->busy);          // until a run under way has ended
        pool.store(nullptr);
        old->dismiss_helpers();                                 // the object stays: someone may be about to lock it
    }
    wanted_threads.store(threads);
}

int get_threads() { return wanted_threads.load(); }
int fork_generation() { return forks.load(); }
int forced_width() { return width_forced.load(); }

void force_schedule(int width, bool steal_first) {
    width_forced.store(width);
    steal_forced.store(steal_first);
}

int sleeping_threads() {
    Pool* ready = pool.load();
    return ready ? ready->asleep() : 0;
}

void run_phases(Run& run) {
    Inside here;
    Pool* shared = get_pool();
    std::lock_guard<std::mutex> mine(shared->busy);
    shared->run(run);
}

void run_items(int64_t count, ItemFunction function, void* context) {
    if (count <= 1 || inside || wanted_threads.load() == 1) return run_alone(count, function, context);
    Pool* shared = get_pool();
    std::unique_lock<std::mutex> mine(shared->busy, std::try_to_lock);
    if (!mine) return run_alone(count, function, context);
    Inside here;
    const Items items{function, context, count, std::min(count, MAX_CHUNKS)};
    const Phase phase{Items::run, &items, items.chunks};
    Run run{&phase, 1, MAX_THREADS, SPIN_US, nullptr};
    shared->run(run);
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
