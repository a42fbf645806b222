// Ranks: processes that compute one model together. They share a memory file, and meet in it once for each sum.
//
//     Ranks ranks(fd, rank, patience_s);                       // each process, with its rank; the file is the parent's
//     copy to ranks.next();  ranks.meet(bytes);  read ranks.part(r)      // a phase; all ranks run the same phases
//
// A phase: each rank copies its part to its own place in the memory, says so, and waits until all have said so. There are two places
// for each part, and phases take them in turn. So one wait for each other rank is enough: a rank that begins phase n + 1 may overwrite
// the parts of phase n - 1, because every rank that has come to phase n has read them.
//
// Waiting: a rank spins for SPIN_US, because entering a futex costs 40-50 us. Then it sleeps until the other rank has come, because
// another program may have that rank's CPU, and Linux can move the rank to an idle CPU. Two ranks on one CPU separate. If there are
// more ranks than CPUs, none spins.
//
// No wait is endless. It ends with std::runtime_error when someone has poisoned the file (the parent, or a rank whose step failed),
// when the other process has ended (checked every LOOK_MS), or after `patience_s`. A rank that notices one of the last two poisons
// the file. Then all ranks stop waiting, and every later phase fails at once. A new start needs a new file.
//
// One thread of a rank at a time may use this: a phase of one chunk does, see Step::add_exchange.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace dc {

constexpr int MAX_RANKS = 64;
constexpr int LOOK_MS = 20;             // how long a rank may sleep before it notices that another has ended, or the poison

class Ranks {
public:
    // The size of a file for parts of `part_bytes`. prepare writes its beginning; the rest is zeros.
    static int64_t file_bytes(int count, int64_t part_bytes);
    static void prepare(int fd, int count, int64_t part_bytes);         // once, by the parent; std::runtime_error

    // `rank` is 0 ... count - 1, or PARENT, which cannot meet. std::invalid_argument for a file of another kind, or a rank that is taken.
    static constexpr int PARENT = -1;
    Ranks(int fd, int rank, double patience_s);
    ~Ranks();
    Ranks(const Ranks&) = delete;
    Ranks& operator=(const Ranks&) = delete;

    float* next() const { return part_of(rank, phase + 1); }            // where this rank's part of the next phase goes
    void meet(int64_t bytes);                                           // once so many bytes are there; std::runtime_error, see above
    const float* part(int of) const { return part_of(of, phase); }      // of the phase that all have come to; valid until the next meet

    void poison();                      // all ranks stop waiting
    std::string why() const;            // why the file is poisoned; "" while it is not

    const int rank;
    int count = 0;
    int64_t part_bytes = 0;
    int64_t moves = 0;                  // how often this rank went to another CPU, because the rank it waited for was on the same

private:
    struct Line;
    struct Head;
    enum class Cause : uint32_t { none, stopped, failed, ended, late, strayed };

    Line& line(int of) const;
    float* part_of(int of, uint32_t of_phase) const;
    bool has_come(int of) const;
    void wait_for(int other);
    bool spins_until_come(int other) const;
    void sleep_until(int other);
    bool has_ended(int of) const;
    void poison(Cause cause, int whose);
    void throw_if_poisoned() const;

    const double patience_s;
    char* memory = nullptr;
    size_t size = 0;
    Head* head = nullptr;
    uint32_t phase = 0;                 // the last one this rank has come to; it may wrap around
    int spin_us = 0;
};

}  // namespace dc
