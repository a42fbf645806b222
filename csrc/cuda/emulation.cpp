// The scheduler of emulation.h, and the kernels compiled against it: one library with the entry points of launch.h.

#pragma GCC visibility push(default)
#include "launch.h"
#pragma GCC visibility pop

#include "emulation.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include <ucontext.h>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t STACK_BYTES = 64 * 1024, SHARED_BYTES = 48 * 1024;     // of shared memory: without opting in
constexpr unsigned MAX_THREADS = 1024, MAX_RESIDENT = 3;

enum State { READY, AT_BARRIER, AT_WARP, FINISHED };

struct Fibre {
    jmp_buf context;
    ucontext_t start;
    std::unique_ptr<char[]> stack;      // kept from launch to launch
    State state = FINISHED;
    const char *file = nullptr;         // the barrier it waits at
    int line = 0;
    unsigned generation = 0;            // warp operations done: the parity picks a row of Warp::values
};

struct Warp {
    uint64_t values[2][32];             // a lane may be one operation ahead, never two
};

struct Block {                          // a place for a resident block
    Fibre fibres[MAX_THREADS];
    Warp warps[MAX_THREADS / 32];
    alignas(128) char shared_memory[SHARED_BYTES];
    std::vector<unsigned> warp_turns, lane_turns;
    dim3 index;
};

Block resident[MAX_RESIDENT], *running;
jmp_buf scheduler;
Body kernel;
bool shared_overflow;
Order order = ASCENDING;
uint64_t random_state = 1, lazy = 0;    // bits of warps that hardly move for a while
char message[256];

uint64_t next_random() {                // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 0x2545F4914F6CDD1Dull;
}

void leave(State state, const char *file, int line) {
    Fibre &self = running->fibres[threadIdx.x];
    self.state = state;
    self.file = file;
    self.line = line;
    if (_setjmp(self.context) == 0) _longjmp(scheduler, 1);
}

void live() {                           // a fibre's whole life: one kernel after another
    for (;;) {
        kernel();
        leave(FINISHED, nullptr, 0);
    }
}

void resume(unsigned thread) {
    Fibre &fibre = running->fibres[thread];
    threadIdx.x = thread;
    if (_setjmp(scheduler) != 0) return;
    if (fibre.stack) _longjmp(fibre.context, 1);
    fibre.stack.reset(new char[STACK_BYTES]);
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.get();
    fibre.start.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fibre.start, live, 0);
    setcontext(&fibre.start);
}

const char *fail(const char *what, const Fibre &a, const Fibre &b) {
    std::snprintf(message, sizeof message, "block (%u, %u, %u): %s: %s:%d and %s:%d", blockIdx.x, blockIdx.y, blockIdx.z,
                  what, a.file ? a.file : "left", a.line, b.file ? b.file : "left", b.line);
    for (Block &block : resident) {     // the stacks hold half a kernel
        for (Fibre &fibre : block.fibres) fibre.stack.reset();
    }
    return message;
}

void arrange(std::vector<unsigned> &items) {
    std::sort(items.begin(), items.end());
    if (order == DESCENDING) std::reverse(items.begin(), items.end());
    if (order != RANDOM) return;
    for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[next_random() % i]);
}

void enter(Block &block, unsigned number) {
    block.index = dim3(number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y);
    std::memset(block.shared_memory, 0xA5, sizeof block.shared_memory);
    std::memset(block.warps, 0xA5, sizeof block.warps);
    block.warp_turns.resize(blockDim.x / 32);
    block.lane_turns.resize(32);
    for (unsigned i = 0; i < blockDim.x / 32; i++) block.warp_turns[i] = i;
    for (unsigned i = 0; i < 32; i++) block.lane_turns[i] = i;
    for (unsigned i = 0; i < blockDim.x; i++) {
        block.fibres[i].state = READY;
        block.fibres[i].generation = 0;
    }
    arrange(block.warp_turns);
}

bool has_ready(const Fibre *lanes) {
    return std::any_of(lanes, lanes + 32, [](const Fibre &lane) { return lane.state == READY; });
}

// Every lane up to its next operation; then, if they met at one, they may go on.
const char *step(Block &block, unsigned warp) {
    Fibre *lanes = block.fibres + 32 * warp;
    arrange(block.lane_turns);
    for (unsigned lane : block.lane_turns) {
        if (lanes[lane].state == READY) resume(32 * warp + lane);
    }
    if (std::any_of(lanes, lanes + 32, [](const Fibre &lane) { return lane.state != AT_WARP; })) return nullptr;
    for (unsigned i = 0; i < 32; i++) {
        if (lanes[i].file != lanes[0].file || lanes[i].line != lanes[0].line)
            return fail("lanes of a warp met at different operations", lanes[0], lanes[i]);
        lanes[i].state = READY;
    }
    return nullptr;
}

// Gives the warps of one block their turns: one after the other as far as it gets, or at random some of them one step.
const char *advance(Block &block, bool &finished) {
    running = &block;
    blockIdx = block.index;
    if (next_random() % 64 == 0) lazy = next_random() & next_random();
    bool stuck = true;
    for (unsigned warp : block.warp_turns) {
        const Fibre *lanes = block.fibres + 32 * warp;
        while (has_ready(lanes)) {
            stuck = false;
            const unsigned name = warp + 23 * static_cast<unsigned>(&block - resident);
            if (order == RANDOM && next_random() % (lazy >> name % 64 & 1 ? 32 : 2) != 0) break;
            if (const char *error = step(block, warp)) return error;
            if (order == RANDOM) break;
        }
    }
    if (!stuck) return nullptr;
    const Fibre *end = block.fibres + blockDim.x, &first = block.fibres[0];
    for (const Fibre *fibre = block.fibres; fibre < end; fibre++) {
        if (fibre->state != first.state || fibre->state == AT_WARP || fibre->file != first.file || fibre->line != first.line)
            return fail("threads wait for ever", first, *fibre);
    }
    finished = first.state == FINISHED;
    for (unsigned i = 0; i < blockDim.x && !finished; i++) block.fibres[i].state = READY;
    arrange(block.warp_turns);
    return nullptr;
}

}  // namespace

const char *launch(dim3 grid, unsigned threads, Body body) {
    if (threads == 0 || threads > MAX_THREADS || threads % 32 != 0) return "threads must be a multiple of 32 up to 1024";
    kernel = body;
    shared_overflow = false;
    gridDim = grid;
    blockDim = dim3(threads);
    std::vector<unsigned> blocks(size_t(grid.x) * grid.y * grid.z);
    for (size_t i = 0; i < blocks.size(); i++) blocks[i] = static_cast<unsigned>(i);
    arrange(blocks);
    std::vector<Block *> active, idle;
    for (Block &block : resident) idle.push_back(&block);
    if (order != RANDOM) idle.resize(1);
    for (size_t next = 0; next < blocks.size() || !active.empty();) {
        while (next < blocks.size() && !idle.empty()) {
            enter(*idle.back(), blocks[next++]);
            active.push_back(idle.back());
            idle.pop_back();
        }
        const size_t chosen = order == RANDOM ? next_random() % active.size() : 0;
        bool finished = false;
        if (const char *error = advance(*active[chosen], finished)) return error;
        if (!finished) continue;
        idle.push_back(active[chosen]);
        active.erase(active.begin() + chosen);
    }
    return shared_overflow ? "a block needs more shared memory than there is" : nullptr;
}

void *shared(size_t bytes) {
    shared_overflow |= bytes > SHARED_BYTES;
    return running->shared_memory;
}

void wait_for_block(const char *file, int line) { leave(AT_BARRIER, file, line); }

const uint64_t *exchange(uint64_t value, const char *file, int line) {
    const unsigned thread = threadIdx.x;
    uint64_t *values = running->warps[thread / 32].values[running->fibres[thread].generation++ % 2];
    values[thread % 32] = value;
    leave(AT_WARP, file, line);
    return values;
}

void maybe_switch() {
    if (order == RANDOM && next_random() % 8 == 0) leave(READY, nullptr, 0);
}

float half_to_float(uint16_t bits) { return static_cast<float>(from_bits<_Float16>(bits)); }

uint16_t float_to_half(float x) { return static_cast<uint16_t>(to_bits(static_cast<_Float16>(x))); }

}  // namespace emulation

extern "C" __attribute__((visibility("default"))) void dc_emulation_order(int64_t order, int64_t seed) {
    emulation::order = static_cast<emulation::Order>(order);
    emulation::random_state = static_cast<uint64_t>(seed) * 2 + 1;
}

#include "sample.cu"
#include "rope_append.cu"
#include "paged_attention.cu"
#include "latent_attention.cu"
#include "latents.cu"
#include "packed.cu"
#include "experts.cu"
#include "adapters.cu"

// --- kernels with a fault each, to test the emulation itself -------------------------------------------------------

namespace {

enum Fault : int64_t { NONE, NO_BARRIER, DIVIDED_BARRIER, DIVIDED_WARP, NO_BLOCK_BARRIER_BEFORE_TICKET };

struct FaultShared {
    uint32_t values[64];
    bool last;
};

// sums[block] = sum of 0 .. 63, by neighbours' values; total = the sum over the blocks, by the last one.
DC_KERNEL(64) faulty_kernel(int64_t fault, volatile uint32_t *sums, uint32_t *ticket, uint32_t *total) {
    DC_SHARED(FaultShared, shared);
    const unsigned i = threadIdx.x;
    shared.values[i] = i;
    if (fault != NO_BARRIER && (fault != DIVIDED_BARRIER || i != 7)) __syncthreads();
    uint32_t x = shared.values[(i + 33) % 64];
    if (fault == DIVIDED_WARP && i < 5) x = __shfl_xor_sync(0xffffffffu, x, 0);
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    __syncthreads();
    if (i % 32 == 0) shared.values[i / 32] = x;
    __syncthreads();
    if (i == 63) sums[blockIdx.x] = shared.values[0] + shared.values[1];
    if (fault != NO_BLOCK_BARRIER_BEFORE_TICKET) __syncthreads();
    if (i == 0) shared.last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __syncthreads();
    if (i == 0 && shared.last) {
        *total = 0;
        for (unsigned block = 0; block < gridDim.x; block++) *total += sums[block];
    }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char *dc_emulation_faulty(int64_t fault, int64_t total) {
    uint32_t sums[8] = {}, ticket = 0;
    volatile uint32_t *each = sums;
    uint32_t *counter = &ticket, *result = dc_device::as_pointer<uint32_t>(total);
    return DC_LAUNCH(faulty_kernel, dim3(8), 64, nullptr, fault, each, counter, result);
}

int64_t dc_cuda_devices() { return 0; }
int64_t dc_cuda_capability(int64_t) { return 0; }
int64_t dc_cuda_current_device() { return 0; }
