// The share of a thread is one word, (number of the phase, next chunk, end), which changes by compare-and-swap. Its owner takes
// chunks from the front, other threads from the end. `done` is (number of the phase, chunks counted). The thread that completes it
// is alone with the run until it has begun the next phase. Phases of all runs are numbered on. So a thread that comes late
// notices it: what it claimed names its phase, and what it counts for a phase that has ended is ignored. Phases stay in memory while
// any thread is `active`, because a run returns only when all have left it.
//
// Redoing: if the operating system stops a thread inside a staged chunk, one other thread does that chunk again, the first that wins
// the chunk's word in `redoing`. Before that it waits twice as long as a chunk took in the slowest share that is done, because long
// chunks and slow cores are no reason to do work twice. While no share is done it waits UNKNOWN_US.
//
// Why it is safe to do a chunk twice:
//   1. A chunk with `put` writes only to memory of its own thread. So two threads that run it never write the same bytes.
//   2. The thread that first sets the chunk's word in `written` from an earlier phase's number to 2 n puts its output in place, and then
//      sets the word to 2 n + 1. All other threads discard theirs. So each chunk is put in place once.
//   3. A phase ends when every word says 2 n + 1, or when every chunk is counted, and a chunk is counted after its put. So
//      nothing that a later phase reads is still being written.
//   4. A late thread reads what later phases already overwrite, and computes nonsense, which rule 2 drops. But it must come to an
//      end, and touch only memory that exists. Hence the rule for every `run` with a `put`: it never indexes, and never counts a
//      loop, by what later phases of the run overwrite. Values read from there are numbers to calculate with. Addresses and counts
//      come from what is fixed before the run begins (the step's plan, tables, sizes).
//   5. What it reads stays allocated: the run waits until every thread has left (`active`) before it returns.
// The thread sanitizer reports the reads of rule 4. If a thread is stopped in the middle of `put`, the phase waits for it. That is
// rare, because a put copies only some kilobytes.
#include "cpu/pool/pool.h"

#include "cpu/cpu.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>
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
std::atomic<int> redo_us{MEASURED};
std::atomic<size_t> most_memory{~size_t(0)};     // for tests

// ---- shares

constexpr uint64_t ONE_NEXT = 1 << 16;
constexpr uint64_t NOWHERE = ~uint64_t(0);      // no chunk; also `done` between two phases

bool is_empty(uint64_t share) { return (share >> 16 & 0xFFFF) >= (share & 0xFFFF); }

struct Claim {
    uint32_t number;                            // of the phase, its lower half
    int64_t chunk;                              // -1: the share is empty
};

// A chunk from the front or the end of a share.
Claim take(std::atomic<uint64_t>& share, bool from_end) {
    uint64_t seen = share.load();
    do {
        if (is_empty(seen)) return {0, -1};
    } while (!share.compare_exchange_weak(seen, from_end ? seen - 1 : seen + ONE_NEXT));
    return {uint32_t(seen >> 32), from_end ? int64_t(seen & 0xFFFF) - 1 : int64_t(seen >> 16 & 0xFFFF)};
}

// How much a thread fetches of a coming phase: 64 KB, which take about 2 us at 25 to 40 GB/s. What it brings was not measured.
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
        const int64_t some = std::min<int64_t>(bytes, 512);
        fetch_once(at, some);
        at += some, bytes -= some;
    }
};

struct alignas(64) Member {
    std::atomic<uint64_t> share{0};
    alignas(64) std::atomic<bool> active{false};        // may look at the run and its phases
    std::atomic<uint64_t> doing{NOWHERE};               // the staged chunk it runs: number of the phase << 16 | chunk
    std::atomic<bool> away{false};                      // stopped in it, it seems: it gets no share until it is back
    Memory staged;
    alignas(64) std::atomic<bool> asleep{false};
    std::mutex mutex;
    std::condition_variable woken;

    void note_whether_away(uint64_t chunk) {
        if (doing.load() != chunk) return;
        away.store(true);
        if (doing.load() != chunk) away.store(false);   // it is back just now, and may not have seen this
    }

    void is_back() {
        doing.store(NOWHERE);
        if (away.load()) away.store(false);
    }

    void wake() {
        if (!asleep.load()) return;
        std::lock_guard<std::mutex> lock(mutex);
        woken.notify_one();
    }
};

class Pool {
    const int threads;
    std::unique_ptr<Member[]> members;          // 0: the thread that runs the phases
    std::unique_ptr<std::atomic<uint64_t>[]> written{new std::atomic<uint64_t>[MAX_CHUNKS]()};      // by chunk
    std::unique_ptr<std::atomic<uint64_t>[]> redoing{new std::atomic<uint64_t>[MAX_CHUNKS]()};      // the last phase that redid it
    alignas(64) std::atomic<uint64_t> longest{0};       // number << 32 | us of the phase's longest chunk, the mean of a share's
    alignas(64) std::atomic<uint64_t> done{NOWHERE};     // number << 16 | chunks counted
    std::atomic<uint64_t> shared_out{0};        // the last phase whose shares are all out
    alignas(64) std::atomic<int> width{1};
    std::atomic<int> spin_us{SPIN_US};
    std::atomic<bool> finished{true}, stop{false}, failed{false};
    std::exception_ptr failure;                 // the first that a chunk of the run threw; set by who sets `failed`
    std::atomic<int64_t> redone{0};
    Run* current = nullptr;                     // this and `first`: see the top of the file
    uint64_t first = 1, next_first = 1;         // number of the run's first phase; of the next run's
    std::vector<std::thread> helpers;

    class Active {
        Pool& pool;
        Member& mine;
    public:
        Active(Pool& pool, int me) : pool(pool), mine(pool.members[me]) { mine.active.store(true); }
        ~Active() {
            mine.active.store(false);
            if (pool.finished.load()) pool.members[0].wake();
        }
    };

    // ---- the phase under way

    int64_t index_of(uint32_t number) const { return number - uint32_t(first); }

    // The chunks this thread can get; then what it should fetch while it waits.
    void work(int me, Coming& coming) {
        const Active here(*this, me);
        const bool steal_first = steal_forced.load(std::memory_order_relaxed);
        for (;;) {
            if (steal_first && steal_one(me, coming)) continue;
            if (do_own_share(me, coming)) continue;
            if (!steal_one(me, coming)) return;
        }
    }

    // False if another thread has done the chunk, or is just putting it in place. A chunk that throws counts as done, and makes the
    // run fail when it ends.
    bool do_chunk(int me, int64_t index, int64_t chunk) noexcept {
        const Phase& phase = current->phases[index];
        if (phase.put) return do_staged_chunk(me, phase, first + uint64_t(index), chunk);
        note_failure(run_chunk(phase, chunk, nullptr));
        return true;
    }

    static std::exception_ptr run_chunk(const Phase& phase, int64_t chunk, void* staged) noexcept {     // what it threw, or null
        try {
            phase.run(phase.context, chunk, staged);
            return nullptr;
        } catch (...) {
            return std::current_exception();
        }
    }

    void note_failure(const std::exception_ptr& thrown) noexcept {
        if (thrown && !failed.exchange(true)) failure = thrown;
    }

    bool do_staged_chunk(int me, const Phase& phase, uint64_t number, int64_t chunk) noexcept {
        Member& mine = members[me];
        void* staged = mine.staged.at_least(phase.staged_bytes);        // there already: see make_room
        mine.doing.store(number << 16 | uint64_t(chunk), std::memory_order_relaxed);     // to be seen late costs nothing
        const std::exception_ptr thrown = run_chunk(phase, chunk, staged);
        mine.is_back();
        uint64_t seen = written[chunk].load();
        if (seen >= 2 * number || !written[chunk].compare_exchange_strong(seen, 2 * number)) return false;
        if (thrown) note_failure(thrown);
        else phase.put(phase.context, chunk, staged);
        written[chunk].store(2 * number + 1);
        return true;
    }

    // `took`: of `count` chunks of phase `index`. Once for a share, since two looks at the clock cost 2 % of a chunk of 3 us.
    void note_time(int64_t index, Clock::duration took, int64_t count) {
        const int64_t us = std::chrono::duration_cast<std::chrono::microseconds>(took).count() / count + 1;
        const uint64_t mine = (first + uint64_t(index)) << 32 | uint64_t(std::min<int64_t>(us, UINT32_MAX));
        uint64_t seen = longest.load(std::memory_order_relaxed);
        while (seen >> 32 == mine >> 32 && seen < mine && !longest.compare_exchange_weak(seen, mine)) {}
    }

    // How long a thread waits for a chunk of the phase under way before it does it itself.
    std::chrono::microseconds patience() const {
        const int forced = redo_us.load(std::memory_order_relaxed);
        if (forced != MEASURED) return std::chrono::microseconds(forced);
        const uint64_t us = longest.load(std::memory_order_relaxed) & UINT32_MAX;
        return std::chrono::microseconds(us ? std::max<uint64_t>(2 * us, REDO_US) : UNKNOWN_US);
    }

    bool do_own_share(int me, Coming& coming) {
        int64_t index = -1, count = 0;
        Clock::time_point begin;
        for (Claim claim; (claim = take(members[me].share, false)).chunk >= 0;) {
            if (index_of(claim.number) != index)                // others have ended the last one
                index = index_of(claim.number), count = 0, begin = Clock::now();
            count += do_chunk(me, index, claim.chunk);
        }
        if (count) note_time(index, Clock::now() - begin, count), count_done(me, index, count, coming);
        return index >= 0;
    }

    bool steal_one(int me, Coming& coming) {
        if (me >= width.load()) return false;
        for (int i = 1; i < threads; i++) {     // of all: the width may have shrunk since the shares went out
            const Claim claim = take(members[(me + i) % threads].share, true);
            if (claim.chunk < 0) continue;
            if (do_chunk(me, index_of(claim.number), claim.chunk)) count_done(me, index_of(claim.number), 1, coming);
            return true;
        }
        return false;
    }

    // `all`: the rest is done, whichever thread did it.
    void count_done(int me, int64_t index, int64_t count, Coming& coming, bool all = false) {
        const Phase& phase = current->phases[index];
        coming = Coming(phase.ahead, me, width.load(std::memory_order_relaxed));
        uint64_t seen = done.load();
        bool last;
        do {
            if (seen >> 16 != first + uint64_t(index)) return;          // it was ended without this
            last = all || int64_t(seen & 0xFFFF) + count == phase.chunks;
        } while (!done.compare_exchange_weak(seen, last ? NOWHERE : seen + uint64_t(count)));
        if (last) advance(me, index + 1);
    }

    // Nothing is left to take, and some chunks are late. This thread repeats those that no other is repeating. False: there are none.
    bool redo(int me, Coming& coming) {
        const Active here(*this, me);
        const uint64_t number = shared_out.load();
        if (done.load() >> 16 != number || me >= width.load() || something_to_steal(me)) return false;
        const int64_t index = index_of(uint32_t(number));
        const Phase& phase = current->phases[index];
        if (!phase.put) return false;
        int64_t count = 0;
        bool whole = true;
        for (int64_t chunk = 0; chunk < phase.chunks; chunk++) {
            if (written[chunk].load() < 2 * number && is_first_to_redo(number, chunk)) {
                for (int i = 0; i < threads; i++)
                    if (i != me) members[i].note_whether_away(number << 16 | uint64_t(chunk));
                count += do_chunk(me, index, chunk);
            }
            whole &= written[chunk].load() == 2 * number + 1;
        }
        redone.fetch_add(count, std::memory_order_relaxed);
        if (count || whole) count_done(me, index, count, coming, whole);
        return count || whole;
    }

    bool is_first_to_redo(uint64_t number, int64_t chunk) {
        uint64_t seen = redoing[chunk].load();
        return seen < number && redoing[chunk].compare_exchange_strong(seen, number);
    }

    bool in_staged_phase() {                    // for member 0, whose run it is
        const uint64_t now = shared_out.load();
        return now >= first && current->phases[now - first].put;
    }

    // ---- from phase to phase: this thread alone is at work

    void advance(int me, int64_t next) {
        for (; next < current->count; next++) {
            if (current->stamps) current->stamps[next] = ticks();
            const Phase& phase = current->phases[next];
            if (phase.chunks > 1 && !(me == 0 && width.load() == 1)) return share_out(me, next);
            for (int64_t chunk = 0; chunk < phase.chunks; chunk++) note_failure(run_chunk(phase, chunk, nullptr));
        }
        if (current->stamps) current->stamps[next] = ticks();
        finished.store(true);
    }

    void share_out(int me, int64_t index) {
        const int64_t chunks = current->phases[index].chunks;
        const uint64_t now = first + uint64_t(index);
        int present[MAX_THREADS], all = 0;
        for (int i = 0; i < width.load(); i++)
            if (i == me || !members[i].away.load()) present[all++] = i;
        longest.store(now << 32, std::memory_order_relaxed);
        done.store(now << 16);
        for (int i = 0; i < all; i++)
            members[present[i]].share.store(now << 32 | uint64_t(chunks * i / all) << 16 | uint64_t(chunks * (i + 1) / all));
        shared_out.store(now);
        for (int i = 0; i < all; i++)
            if (present[i] != me) members[present[i]].wake();
    }

    // ---- waiting

    bool something_to_do(int me) const {
        return !is_empty(members[me].share.load()) || (me == 0 ? is_over() : stop.load());
    }

    bool is_over() const {
        if (!finished.load()) return false;
        for (int i = 0; i < threads; i++)
            if (members[i].active.load()) return false;
        return true;
    }

    bool something_to_steal(int me) const {
        if (me >= width.load()) return false;
        for (int i = 0; i < threads; i++)
            if (!is_empty(members[i].share.load())) return true;
        return false;
    }

    // Fetches what comes, spins, and then does what others have left undone. False: spin_us have passed and there was nothing to do.
    bool spin(int me, Coming& coming) {
        auto now = Clock::now(), since = now;
        const auto end = now + std::chrono::microseconds(spin_us.load(std::memory_order_relaxed));
        for (; coming.bytes > 0; coming.fetch_some())
            if (something_to_do(me)) return true;
        do {
            for (int i = 0; i < 32; i++, relax())
                if (something_to_do(me)) return true;
            if (something_to_steal(me)) return true;
            now = Clock::now();
            if (now - since < patience()) continue;
            if (redo(me, coming)) return true;
            since = now;
        } while (now < end);
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

    int64_t redone_chunks() const { return redone.load(); }
    int64_t patience_us() const { return patience().count(); }

    void run(Run& wanted) {                     // `busy` is held
        const int forced = forced_width();
        make_room(wanted);
        current = &wanted, first = next_first, next_first += uint64_t(wanted.count);
        finished.store(false);
        width.store(std::clamp(forced ? forced : wanted.width, 1, helpers.empty() ? 1 : threads));
        spin_us.store(wanted.spin_us);
        const auto tell = [&] {
            if (const auto begun = std::exchange(wanted.begun, nullptr)) begun();
        };
        if (width.load() == 1) tell();
        {
            const Active here(*this, 0);
            advance(0, 0);
        }
        while (!is_over()) {
            if (wanted.begun && in_staged_phase()) tell();
            Coming coming;
            work(0, coming);
            if (spin(0, coming)) continue;
            wanted.stalled = true;              // a helper has been stopped inside a chunk
            sleep(0);
        }
        tell();
        if (failed.exchange(false)) std::rethrow_exception(std::exchange(failure, nullptr));
    }

private:
    void make_room(const Run& run) {            // before any thread is in the run, so that no chunk is short of memory
        size_t most = 0;
        for (int64_t i = 0; i < run.count; i++)
            if (run.phases[i].put) most = std::max(most, run.phases[i].staged_bytes);
        for (int i = 0; i < threads; i++) members[i].staged.at_least(most);
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

    static void run(const void* self, int64_t chunk, void*) {
        const Items& items = *static_cast<const Items*>(self);
        const int64_t end = items.count * (chunk + 1) / items.chunks;
        for (int64_t item = items.count * chunk / items.chunks; item < end; item++) items.function(items.context, item);
    }
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
#elif defined(__aarch64__)
static void set_float_mode(uint64_t mode) { asm volatile("msr fpcr, %0" ::"r"(mode)); }
DefaultFloatMode::DefaultFloatMode() : before([] { uint64_t mode; asm volatile("mrs %0, fpcr" : "=r"(mode)); return mode; }()) { set_float_mode(0); }
DefaultFloatMode::~DefaultFloatMode() { set_float_mode(before); }
uint64_t ticks() { return uint64_t(Clock::now().time_since_epoch().count()); }
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

void force_schedule(int width, bool steal_first, int redo_after_us) {
    width_forced.store(width);
    steal_forced.store(steal_first);
    redo_us.store(redo_after_us);
}

int sleeping_threads() {
    Pool* ready = pool.load();
    return ready ? ready->asleep() : 0;
}

int64_t patience_us() {
    Pool* ready = pool.load();
    return ready ? ready->patience_us() : 0;
}

int64_t redone_chunks() {
    Pool* ready = pool.load();
    return ready ? ready->redone_chunks() : 0;
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

void* Memory::at_least(size_t bytes) {
    if (bytes > size) {
        const size_t wanted = (bytes + 4095) / 4096 * 4096;
        size = 0;
        memory.reset();
        if (bytes > most_memory.load(std::memory_order_relaxed)) throw std::bad_alloc();
        memory.reset(std::aligned_alloc(64, wanted));
        if (!memory) throw std::bad_alloc();
        size = wanted;
    }
    return memory.get();
}

void refuse_memory(size_t beyond) { most_memory.store(beyond ? beyond : ~size_t(0)); }

void* scratch(size_t bytes) {
    thread_local Memory mine;
    return mine.at_least(bytes);
}

}  // namespace dc
