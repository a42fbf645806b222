// Records, checks and queues steps. Each Program has a leader, a thread that runs the steps one after the other.
//
// Threads exchange data only under `mutex`. A step belongs to the leader from when it is queued until it has `ended`. A run never
// throws into another thread: a failure becomes the step's `error`, which finish() raises.
#include "cpu/program/program.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "checks.h"
#include "cpu/pool/pool.h"
#include "cpu/program/pause.h"
#include "cpu/program/step.h"
#include "cpu/program/width.h"
#include "cpu/tiles/least_rows.h"

namespace dc {
namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t STEPS_AT_ONCE = 2, STEPS_REMEMBERED = 16;
constexpr int PROBE_STEPS = 6;
constexpr double MOST_GAP_US = 10000;           // after a longer one nobody was waiting for a token

double us_since(Clock::time_point begin) { return std::chrono::duration<double, std::micro>(Clock::now() - begin).count(); }

class Leader {
    std::mutex mutex;
    std::condition_variable queued, ended;
    std::deque<std::shared_ptr<Step>> waiting;          // started and not begun
    std::deque<std::shared_ptr<Step>> started;          // and not finished by the caller
    std::deque<std::shared_ptr<const Step>> remembered;
    std::atomic<bool> something{false};                 // waiting is not empty, or stop
    bool stop = false;
    std::vector<int32_t> drawn;                         // by the step that ended last
    Width decoding{PROBE_STEPS};                        // a prompt's step always gets all threads: its chunks are long, so they
                                                        // are shared out even where another program has a CPU
    Clock::time_point last_end;
    std::thread thread;

    std::shared_ptr<Step> next(bool wait) {             // null: stop, or nothing is there
        const auto end = Clock::now() + std::chrono::microseconds(wait ? SPIN_US : 0);
        while (!something.load() && Clock::now() < end) relax();
        std::unique_lock<std::mutex> lock(mutex);
        if (wait) queued.wait(lock, [&] { return stop || !waiting.empty(); });
        if (waiting.empty()) return nullptr;
        auto step = std::move(waiting.front());
        waiting.pop_front();
        something.store(stop || !waiting.empty());
        return step;
    }

    // `begun` is called when the step is under way.
    void run(Step& step, const std::function<void()>& begun) {
        const int threads = get_threads(), width = step.many_rows() ? threads : decoding.choose(threads);
        step.resolve_ids(drawn);
        if (step.by_rows()) begun();            // its first phase is long, and no other thread does a stopped one's part of it
        const auto begin = Clock::now();
        const int64_t waited_ns = pausing.waited_ns.load();
        step.run(width, begun);
        step.us = us_since(begin);
        // The time from token to token counts, because Python comes late with the next step if kernels hold every CPU.
        step.gap_us = std::chrono::duration<double, std::micro>(begin - last_end).count();
        last_end = Clock::now();
        if (threads == 1 || forced_width() || step.many_rows()) return;       // nothing to choose
        if (pausing.waited_ns.load() != waited_ns) return;                    // its time says nothing about the width
        decoding.learn(step.tokens * (MAX_CHUNKS + 1) + step.logit_rows, step.us + (step.gap_us < MOST_GAP_US ? step.gap_us : 0), step.outcome.stalled);
    }

    // The thread that waits for a step often wakes up on this thread's CPU and takes it for 200 us. So if the next step is queued
    // already, the end is announced only when that has begun and the helpers go on with it.
    void lead() {
        std::shared_ptr<Step> untold;
        for (;;) {
            const std::shared_ptr<Step> step = next(!untold);
            if (!step && !untold) return;
            if (step) {
                try {
                    run(*step, [&] { tell(untold); });
                } catch (const std::exception& failure) {   // std::bad_alloc, or ids that a failed step did not draw
                    step->error = failure.what();
                    step->poison_ranks();
                }
                drawn = step->error.empty() ? step->drawn : std::vector<int32_t>();
            }
            tell(untold);
            untold = step;
        }
    }

    void tell(std::shared_ptr<Step>& step) {
        if (!step) return;
        std::shared_ptr<const Step> forgotten;          // freed when others have the mutex
        std::lock_guard<std::mutex> lock(mutex);
        remembered.push_back(step);
        if (remembered.size() > STEPS_REMEMBERED) forgotten = std::move(remembered.front()), remembered.pop_front();
        step->ended = true;
        step.reset();
        ended.notify_all();
    }

public:
    const int generation = fork_generation();

    Leader() : thread([this] { lead(); }) {}

    ~Leader() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            stop = true;
            something.store(true);
            queued.notify_all();
        }
        thread.join();
    }

    void check_room() {
        std::lock_guard<std::mutex> lock(mutex);
        require(started.size() < STEPS_AT_ONCE, "start: two steps are under way; finish one first");
    }

    void start(std::shared_ptr<Step> step) {
        std::lock_guard<std::mutex> lock(mutex);
        started.push_back(step);
        waiting.push_back(std::move(step));
        something.store(true);
        queued.notify_all();
    }

    std::vector<int32_t> finish(int64_t ticket) {
        std::unique_lock<std::mutex> lock(mutex);
        const auto found = std::find_if(started.begin(), started.end(), [&](const auto& step) { return step->ticket == ticket; });
        require(found != started.end(), "ticket: must be of a step that was started and not finished");
        const std::shared_ptr<Step> step = *found;
        started.erase(found);
        ended.wait(lock, [&] { return step->ended; });
        if (!step->error.empty()) throw std::runtime_error("the step failed: " + step->error);
        return step->drawn;
    }

    std::vector<StepTimes> times() {
        std::lock_guard<std::mutex> lock(mutex);
        std::vector<StepTimes> all;
        for (const auto& step : remembered) all.push_back(step->times());
        return all;
    }
};

// ---- what describe() says about an op in addition to its name

std::string words(Activation activation) {
    return activation == Activation::none ? "" : std::string(" ") + ACTIVATIONS[int(activation)].name;
}

std::string words(const float* bias) { return bias ? " bias" : ""; }

std::string shape(const Tiles& tiles) { return std::to_string(tiles.rows) + "x" + std::to_string(tiles.columns); }

std::string shape(const Routing& routing, const Tiles& tiles) {
    return " " + std::to_string(routing.experts) + "x" + std::to_string(tiles.rows / routing.experts) + "x" + std::to_string(tiles.columns);
}

template <class T> std::string details(const T&) { return ""; }
std::string details(const op::route& op) { return words(op.bias); }
std::string details(const op::gate_up& op) { return shape(*op.routing, op.tiles) + words(op.activation) + words(op.bias); }
std::string details(const op::down& op) { return shape(*op.routing, op.tiles) + words(op.bias); }
std::string details(const op::short_conv& op) { return words(op.bias); }
std::string details(const op::convolve& op) { return words(op.bias); }

std::string details(const op::linear& op) {
    return " " + shape(op.tiles) + (op.norm ? " norm" : "") + words(op.activation) + words(op.bias) + (op.residual.at ? " residual" : "");
}

std::string details(const op::by_head& op) { return " " + std::to_string(op.heads) + " of " + shape(op.tiles); }

std::string details(const op::paged_attention& op) {
    return std::string(op.of_texts ? " of texts" : op.two_sided ? " two-sided" : "") + (op.window ? " window " + std::to_string(op.window) : "") + (op.softcap ? " softcap" : "") + (op.sinks ? " sinks" : "") + (op.value_size ? " of latents" : "");
}

}  // namespace

const char* name_of(OpKind kind) {
    static const char* const names[] = {
#define OP(name, runs, has, ...) #name,
#include "ops.def"
    };
    return names[int(kind)];
}

struct Program::Inside {
    std::vector<Op> ops;
    Memory prepared, panels, hidden, added;
    size_t prepared_size = 0, panels_size = 0, hidden_size = 0, added_size = 0;
    int64_t vocab = INT32_MAX, max_positions = INT32_MAX, sampled_vocab = 0;    // the least of any table; of the logits
    int64_t turn_rows = INT32_MAX;                      // the least of any tables cos and sin
    int64_t num_slots = INT64_MAX;                      // of states; INT64_MAX: no layer keeps any
    int64_t tickets = 0;
    std::vector<bool> draws;                            // for each logit row of the step started last: does it draw a token?
    std::unique_ptr<Leader> leader;                     // changed under `starting`; another one only in a forked child
    std::mutex starting;

    // What a program must know about an op with at most this many rows in a step.
    template <class T>
    void note(const T& op, int64_t) {
        if constexpr (keeps_states<T>) num_slots = std::min(num_slots, op.num_slots);
    }

    void note(const op::embed& op, int64_t) {
        int64_t& limit = op.by_position ? max_positions : vocab;
        limit = std::min(limit, op.vocabulary);
        if (op.tiles.memory) measure_for(op.tiles);
    }

    void note(const op::rope_append& op, int64_t) {
        max_positions = std::min(max_positions, op.max_positions);
        turn_rows = std::min(turn_rows, op.max_positions);
    }
    void note(const op::append_latents& op, int64_t) {
        max_positions = std::min(max_positions, op.max_positions);
        turn_rows = std::min(turn_rows, op.max_positions);
    }
    void note(const op::by_head& op, int64_t) { measure_for(op.tiles); }
    void note(const op::sample& op, int64_t) { sampled_vocab = op.logits.columns; }

    void note(const op::paged_attention& op, int64_t) {
        if (op.distances) max_positions = std::min(max_positions, op.reach - PAGE_SIZE);
        for (const Op& recorded : ops) {
            const auto* const other = recorded.as<op::paged_attention>();
            require(!other || other->cache_type == op.cache_type || other->cache_type == Element::q8_0 || op.cache_type == Element::q8_0,
                    "q: every attention of a program must have the same type of floats in its cache");
        }
    }

    void note(const op::linear& op, int64_t most_rows) {
        prepared_size = std::max(prepared_size, prepared_bytes(op, op.on_logit_rows ? most_rows : std::min(most_rows, MOST_TOKENS_BY_TILES)));
        measure_for(op.tiles);
    }

    void note(const op::gate_up& op, int64_t most_rows) { note_experts(*op.routing, op.tiles, most_rows, op.columns, hidden_size); }
    void note(const op::down& op, int64_t most_rows) { note_experts(*op.routing, op.tiles, most_rows, op.columns, added_size); }

    void note_experts(const Routing& routing, const Tiles& tiles, int64_t most_rows, int64_t columns, size_t& size) {
        const int64_t pairs = most_rows * routing.chosen, panels = Routing::most_panels(routing.experts, pairs);
        panels_size = std::max(panels_size, size_t(panels * panel_bytes(tiles.panels, tiles.columns)));
        size = std::max(size, size_t(pairs * columns) * sizeof(float));
        measure_for(tiles);
    }

    void note(const op::all_reduce& op, int64_t most_rows) { check_part(*op.ranks, op.x, most_rows); }
    void note(const op::all_gather& op, int64_t most_rows) { check_part(*op.ranks, op.x, most_rows); }

    static void check_part(const Ranks& ranks, const Rows& x, int64_t most_rows) {
        require(most_rows * x.columns * int64_t(sizeof(float)) <= ranks.part_bytes, "x: is more than the ranks' memory file has for a part");
    }

    Leader* leader_here() {                             // null: none in this process
        std::lock_guard<std::mutex> lock(starting);
        return leader && leader->generation == fork_generation() ? leader.get() : nullptr;
    }

    void check_ids(const std::vector<int64_t>& ids, int64_t none, const char* range, const char* earlier) const {
        bool in_range = true, drawn = true;
        for (const int64_t id : ids) {
            in_range &= id < vocab;
            if (id < -none) drawn &= size_t(-1 - none - id) < draws.size() && draws[size_t(-1 - none - id)];
        }
        require(in_range, range);
        require(drawn, earlier);
    }

    void check_sampling(const StepInput& in) const {
        if (!in.samples) return;
        require(sampled_vocab > 0, "sampling: no sample op was recorded");
        require(in.sample_rows.size() == in.logit_rows.size(), "sampling: must have a row for each of logit_rows");
        const size_t counted = in.count_ids.size(), biased = in.bias_ids.size();
        require(in.counts.size() == counted && in.bias_values.size() == biased, "sampling: its lists differ in length");
        const int32_t below = int32_t(sampled_vocab);
        check_range(in.count_ids.data(), int64_t(counted), 0, below, "sampling: counted ids must lie in the vocabulary");
        check_range(in.bias_ids.data(), int64_t(biased), 0, below, "sampling: biased ids must lie in the vocabulary");
        bool good = true;
        for (const SampleRow& row : in.sample_rows)
            good &= row.count_begin >= 0 && row.count_begin <= row.count_end && size_t(row.count_end) <= counted &&
                    row.bias_begin >= 0 && row.bias_begin <= row.bias_end && size_t(row.bias_end) <= biased;
        require(good, "sampling: a row's part of the lists must lie in them");
    }

    void check(const StepInput& in, int64_t max_tokens, int64_t max_rows) const {
        const int64_t tokens = int64_t(in.token_ids.size());
        require(tokens > 0 && tokens <= max_tokens, "token_ids: must be 1 to max_tokens");
        require(in.previous_ids.size() == in.token_ids.size(), "previous: must be as many as token_ids");
        check_ids(in.token_ids, 0, "token_ids: must lie in the vocabulary", "token_ids: ~i must name a row of the step before that draws");
        check_ids(in.previous_ids, 1, "previous: must lie in the vocabulary",
                  "previous: -2 - i must name a row of the step before that draws");
        require(!in.starts.empty() && in.starts.back() == tokens, "starts: must end with the number of tokens");
        require(in.starts.size() == in.lengths.size() + 1, "starts: one more than lengths");
        for (const int64_t length : in.lengths) require(length <= max_positions, "lengths: must not pass the tables cos and sin, or that of positions");
        require(int64_t(in.logit_rows.size()) <= max_rows, "logit_rows: must be at most max_rows");
        for (const int64_t row : in.logit_rows) require(row >= 0 && row < tokens, "logit_rows: must be rows of the step");
        require(in.turns.empty() || in.turns.size() == in.token_ids.size(), "turns: must be as many as token_ids, or none");
        for (const int64_t turn : in.turns) require(turn >= 0 && turn < turn_rows, "turns: must be rows of the tables cos and sin");
        check_sampling(in);
        check_states(in);
        check_adapters(in);
    }

    void check_adapters(const StepInput& in) const {
        require(in.adapters.empty() || in.adapters.size() == in.lengths.size(), "adapters: must be one, or None, for each of lengths");
        for (const auto& adapter : in.adapters)
            for (const Op& op : ops) {
                const auto* const product = op.as<op::linear>();
                if (!adapter || !product || product->adapted < 0) continue;
                require(product->adapted < adapter->count(), "adapters: one is of another program");
                const AdapterMatrix& its = adapter->matrices()[product->adapted];
                require(!its.ranks || (its.columns == product->tiles.columns && its.tile_count == tile_count(product->tiles.rows)),
                        "adapters: one has a matrix of another shape");
            }
    }

    void check_states(const StepInput& in) const {
        if (num_slots == INT64_MAX) return;
        const auto all_slots = [&](const std::vector<int64_t>& slots) {
            return std::all_of(slots.begin(), slots.end(), [&](int64_t slot) { return slot >= 0 && slot < num_slots; });
        };
        require(in.state_reads.size() == in.lengths.size() && all_slots(in.state_reads), "state_reads: must be a slot for each of lengths");
        require(in.write_slots.size() == in.write_rows.size() && all_slots(in.write_slots), "write_slots: must be a slot for each of write_rows");
        int64_t before = 0;
        for (const int64_t row : in.write_rows) {
            require(row >= before && row < int64_t(in.token_ids.size()), "write_rows: must be rows of the step, ascending");
            before = row;
        }
    }
};

Program::Program(int64_t max_tokens, int64_t max_rows) : max_tokens(max_tokens), max_rows(max_rows), inside(new Inside) {
    require(max_tokens > 0 && max_tokens <= MAX_CHUNKS, "max_tokens: 1 to 65535");
    require(max_rows > 0 && max_rows <= max_tokens, "max_rows: 1 to max_tokens");
}

Program::~Program() {
    if (inside->leader && inside->leader->generation != fork_generation()) inside->leader.release();    // its thread is the parent's
}

void Program::record(Op op) {
    Inside& in = *inside;
    require(in.tickets == 0, "program: nothing can be recorded after the first step");
    require(in.sampled_vocab == 0, "program: sample is the last op");
    op.any().index = int(in.ops.size());
    std::visit([&](const auto& its) { in.note(its, its.on_logit_rows ? max_rows : max_tokens); }, op.is);
    in.ops.push_back(std::move(op));
}

int64_t Program::start(StepInput input) {
    Inside& in = *inside;
    std::lock_guard<std::mutex> one_at_a_time(in.starting);
    if (in.leader && in.leader->generation != fork_generation()) {      // a forked child: the parent's leader is not here
        in.leader.release();
        in.draws.clear();
    }
    if (!in.leader) in.leader.reset(new Leader);
    in.leader->check_room();
    in.check(input, max_tokens, max_rows);
    std::vector<bool> draws(input.samples ? input.logit_rows.size() : 0);
    for (size_t i = 0; i < draws.size(); i++) draws[i] = input.sample_rows[i].position >= 0;
    const StepMemory memory{in.prepared.at_least(in.prepared_size), in.panels.at_least(in.panels_size),
                            static_cast<float*>(in.hidden.at_least(in.hidden_size)), static_cast<float*>(in.added.at_least(in.added_size))};
    const auto step = std::make_shared<Step>(in.ops, std::move(input), memory, get_threads(), in.vocab);
    step->ticket = ++in.tickets;
    in.draws = std::move(draws);
    in.leader->start(step);
    return step->ticket;
}

std::vector<int32_t> Program::finish(int64_t ticket) {
    Leader* const leader = inside->leader_here();
    require(leader, "ticket: must be of a step that was started and not finished");
    return leader->finish(ticket);
}

std::vector<StepTimes> Program::times() const {
    Leader* const leader = inside->leader_here();
    return leader ? leader->times() : std::vector<StepTimes>();
}

std::vector<std::string> Program::describe() const {
    std::vector<std::string> lines;
    for (const Op& op : inside->ops)
        lines.push_back(name_of(op.kind()) + std::visit([](const auto& its) { return details(its); }, op.is) +
                        (op.any().on_logit_rows ? " (logit rows)" : ""));
    return lines;
}

}  // namespace dc
