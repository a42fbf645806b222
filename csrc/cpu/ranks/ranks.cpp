// op       all_reduce, all_gather
// shapes   x [rows][columns] float32, the same on every rank, at most part_bytes
// mapping  one process a rank; one thread of it says that its part is there and waits; others may help to copy and add
// cost     per phase and rank: its part written once, all parts read once, of which count - 1 come from other CPUs' caches;
//          64 KB between two ranks: see bench/figures/serving.json, "sums"
// numerics float32, each sum rounded, in the order of the ranks; the residual last. So the bits depend on the number of ranks alone
//
// The file: a Head, a Line for each rank, then for each rank two parts. Its begin is zeros but for what prepare() writes.
#include "cpu/ranks/ranks.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>

#include "checks.h"
#include "cpu/pool/pool.h"
#include "cpu/program/rows.h"
#include "ops.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

namespace dc {
namespace {

using Clock = std::chrono::steady_clock;
constexpr uint64_t KIND = 0x31736b6e61726364;           // "dcranks1"
constexpr int64_t PAGE_BYTES = 4096;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

int64_t whole_pages(int64_t bytes) { return (bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES; }

int64_t front_bytes(int count) { return whole_pages(64 * (2 + 2 * count)); }

#if defined(__linux__)
// Of a word that several processes see, so not FUTEX_PRIVATE.
void sleep_while(const std::atomic<uint32_t>& word, uint32_t value) {
    const timespec limit{0, LOOK_MS * 1'000'000L};
    syscall(SYS_futex, &word, FUTEX_WAIT, value, &limit, nullptr, 0);
}

void wake_all(const std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

int cpus() {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : int(std::thread::hardware_concurrency());
}

int cpu_here() { return sched_getcpu(); }

// Go on on another CPU, without being bound to it.
bool leave_cpu(int cpu) {
    cpu_set_t all, others;
    if (cpu < 0 || cpu >= CPU_SETSIZE || sched_getaffinity(0, sizeof all, &all) != 0) return false;
    others = all;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return false;    // which moves the thread at once
    sched_setaffinity(0, sizeof all, &all);
    return true;
}
#else
void sleep_while(const std::atomic<uint32_t>& word, uint32_t value) {
    if (word.load() == value) std::this_thread::sleep_for(std::chrono::microseconds(50));
}
void wake_all(const std::atomic<uint32_t>&) {}
int cpus() { return int(std::thread::hardware_concurrency()); }
int cpu_here() { return -1; }
bool leave_cpu(int) { return false; }
#endif

}  // namespace

struct Ranks::Head {
    uint64_t kind;
    int64_t count, part_bytes;
    alignas(64) std::atomic<uint32_t> poisoned;         // cause << 16 | rank; 0: not
};

struct Ranks::Line {
    alignas(64) std::atomic<uint32_t> come;             // the last phase that it came to; the others wait for this
    std::atomic<uint32_t> sleepers;                     // how many of the others sleep on `come`
    std::atomic<int64_t> bytes[2];                      // of its part in this phase and in the one before
    std::atomic<int32_t> cpu;                           // where it came to this phase
    alignas(64) std::atomic<int32_t> process;           // 0: has not joined
};

int64_t Ranks::file_bytes(int count, int64_t part_bytes) {
    require(count >= 1 && count <= MAX_RANKS, "count: 1 to 64 ranks");
    require(part_bytes > 0 && part_bytes <= int64_t(1) << 40, "part_bytes: must be positive, at most 2^40");
    return front_bytes(count) + 2 * count * whole_pages(part_bytes);
}

void Ranks::prepare(int fd, int count, int64_t part_bytes) {
    static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<int64_t>::is_always_lock_free, "shared by processes");
    static_assert(sizeof(Head) == 128 && sizeof(Line) == 128, "as front_bytes has it");
    Head first{};
    first.kind = KIND, first.count = count, first.part_bytes = part_bytes;
    if (ftruncate(fd, file_bytes(count, part_bytes)) || pwrite(fd, &first, sizeof first, 0) != ssize_t(sizeof first))
        throw std::runtime_error(std::string("the ranks' memory file cannot be made: ") + std::strerror(errno));
}

Ranks::Ranks(int fd, int rank, double patience_s) : rank(rank), patience_s(patience_s) {
    struct stat file{};
    require(patience_s > 0, "patience_s: must be positive");
    require(fstat(fd, &file) == 0 && file.st_size >= int64_t(sizeof(Head)), "memory: must be a file that a RankMemory has made");
    size = size_t(file.st_size);
    void* mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    memory = static_cast<char*>(mapped), head = reinterpret_cast<Head*>(memory);
    const char* complaint = nullptr;
    int32_t nobody = 0;
    if (head->kind != KIND || head->count < 1 || head->count > MAX_RANKS || file_bytes(int(head->count), head->part_bytes) != file.st_size)
        complaint = "memory: must be a file that a RankMemory has made";
    else if (rank != PARENT && (rank < 0 || rank >= head->count)) complaint = "rank: must be 0 to one less than the number of ranks";
    else if (count = int(head->count), part_bytes = head->part_bytes; rank != PARENT && !line(rank).process.compare_exchange_strong(nobody, getpid()))
        complaint = "rank: another process has it; each run of the ranks needs a memory file of its own";
    if (complaint) {
        munmap(memory, size);
        throw std::invalid_argument(complaint);
    }
    spin_us = count <= cpus() ? SPIN_US : 0;
}

Ranks::~Ranks() { munmap(memory, size); }

Ranks::Line& Ranks::line(int of) const { return reinterpret_cast<Line*>(memory + sizeof(Head))[of]; }

float* Ranks::part_of(int of, uint32_t of_phase) const {
    return reinterpret_cast<float*>(memory + front_bytes(count) + (2 * of + int(of_phase & 1)) * whole_pages(part_bytes));
}

bool Ranks::has_come(int of) const { return int32_t(line(of).come.load() - phase) >= 0; }

void Ranks::meet(int64_t bytes) {
    require(rank != PARENT, "rank: the parent is none");
    require(bytes >= 0 && bytes <= part_bytes, "bytes: more than the memory file has for a part");
    throw_if_poisoned();
    Line& mine = line(rank);
    mine.bytes[++phase & 1].store(bytes, std::memory_order_relaxed);
    mine.cpu.store(cpu_here(), std::memory_order_relaxed);
    mine.come.store(phase);                             // before the look at sleepers, who look at it after they are counted
    if (mine.sleepers.load()) wake_all(mine.come);
    for (int other = 0; other < count; other++)
        if (other != rank) wait_for(other);
    for (int other = 0; other < count; other++)
        if (line(other).bytes[phase & 1].load(std::memory_order_relaxed) != bytes) poison(Cause::strayed, other);
    throw_if_poisoned();
}

// Linux wakes a thread where its waker runs, and then often leaves both on that CPU for seconds while another one is idle: sums
// of 8 KB took 130 us instead of 5. So a rank that waited in vain for one on the same CPU moves to another CPU.
void Ranks::wait_for(int other) {
    if (spins_until_come(other)) return;
    Line& its = line(other);
    if (spin_us && its.cpu.load(std::memory_order_relaxed) == cpu_here() && leave_cpu(cpu_here())) {
        moves++;
        if (spins_until_come(other)) return;
    }
    its.sleepers.fetch_add(1);
    sleep_until(other);
    its.sleepers.fetch_sub(1);
    throw_if_poisoned();
}

bool Ranks::spins_until_come(int other) const {
    if (has_come(other)) return true;
    const auto end = Clock::now() + std::chrono::microseconds(spin_us);
    do {
        for (int i = 0; i < 32; i++, relax())
            if (has_come(other)) return true;
        throw_if_poisoned();
    } while (Clock::now() < end);
    return false;
}

// Until it has come, or the file is poisoned.
void Ranks::sleep_until(int other) {
    const auto begin = Clock::now();
    Line& its = line(other);
    for (;;) {
        const uint32_t seen = its.come.load();
        const bool ended = has_ended(other);            // asked first: it may have come and ended meanwhile
        if (has_come(other) || head->poisoned.load()) return;
        if (ended) return poison(Cause::ended, other);
        if (seconds_since(begin) > patience_s) return poison(Cause::late, other);
        sleep_while(its.come, seen);
    }
}

// A process whose parent has not waited for it yet has ended too, although kill() would still find it.
bool Ranks::has_ended(int of) const {
    const pid_t process = line(of).process.load();
    if (!process) return false;                         // it starts; patience bounds how long
#if defined(SYS_pidfd_open)
    const int fd = int(syscall(SYS_pidfd_open, process, 0));
    if (fd >= 0) {
        pollfd ended{fd, POLLIN, 0};
        const bool yes = poll(&ended, 1, 0) == 1;
        close(fd);
        return yes;
    }
#endif
    return kill(process, 0) != 0 && errno == ESRCH;
}

// The first cause stays.
void Ranks::poison(Cause cause, int whose) {
    uint32_t none = 0;
    head->poisoned.compare_exchange_strong(none, uint32_t(cause) << 16 | uint32_t(whose < 0 ? 0 : whose));
    for (int i = 0; i < count; i++) wake_all(line(i).come);
}

void Ranks::poison() { poison(rank == PARENT ? Cause::stopped : Cause::failed, rank); }

std::string Ranks::why() const {
    const uint32_t word = head->poisoned.load();
    const std::string who = "rank " + std::to_string(word & 0xFFFF);
    switch (Cause(word >> 16)) {
        case Cause::none: return "";
        case Cause::stopped: return "the ranks were told to stop";
        case Cause::failed: return "a step of " + who + " failed";
        case Cause::ended: return "the process of " + who + " has ended";
        case Cause::late: return who + " has not come for too long";
        case Cause::strayed: return who + " runs another step than the others";
    }
    return "unknown";
}

void Ranks::throw_if_poisoned() const {
    if (head->poisoned.load(std::memory_order_relaxed)) throw std::runtime_error(why());
}

// ---- the ops

void offer(const Exchange& e, int64_t begin, int64_t end) {
    if (e.x == e.ranks->next()) return;                 // it was written there
    std::memcpy(e.ranks->next() + begin * e.columns, e.x + begin * e.columns, size_t((end - begin) * e.columns) * sizeof(float));
}

void meet(const Exchange& e) { e.ranks->meet(e.rows * e.columns * int64_t(sizeof(float))); }

void join(const Exchange& e, int64_t begin, int64_t end) {
    const float* parts[MAX_RANKS];
    for (int i = 0; i < e.ranks->count; i++) parts[i] = e.ranks->part(i) + begin * e.columns;
    if (e.sums) {
        const int64_t first = begin * e.columns;
        const auto& use = DC_CHOSEN(row_kernels);
        return use.add_up(parts, e.ranks->count, e.residual ? e.residual + first : nullptr, (end - begin) * e.columns, e.out + first);
    }
    for (int64_t row = 0; row < end - begin; row++)
        for (int64_t i = 0; i < e.ranks->count && i * e.columns < e.out_columns; i++)
            std::memcpy(e.out + (begin + row) * e.out_columns + i * e.columns, parts[i] + row * e.columns,
                        size_t(std::min(e.columns, e.out_columns - i * e.columns)) * sizeof(float));
}

void run_exchange(const Exchange& e) {
    offer(e, 0, e.rows), meet(e), join(e, 0, e.rows);
}

}  // namespace dc
