// One step of a Program, ready to run: its checked input, what its layers share, and its phases. step_plan.cpp makes the phases,
// step_run.cpp runs them.
//
// How ops become phases depends on the number of tokens:
//   few      The tiles of a product are divided among the threads, so that each weight is read once. What stands between two
//            products (norm, mixing, rope, making x ready for the next product) is one phase of 4 rows a chunk. So up to 4 tokens
//            need no such phase: the thread that ends one product does this work and begins the next product.
//   many     (at least 8 for each thread, and 16 in all) Rows are divided: everything from one attention to the next is one phase.
//            Its chunks take 8 to 32 rows through all products, so that a thread keeps its rows in its cache. Measured with 256
//            tokens: 4,360-4,880 tok/s on two chips, 2,960 with the products divided. With 16 tokens on two threads: 64 phases
//            instead of 303, and a step takes 0.90 of the time. With weights whose codes are made before a product
//            (tiles/grids.h) a chunk takes about 64 rows, and makes the codes once.
// A row has the same bits either way (tiles.h, attention.h).
//
// Always:
//   - Ranks exchange what each has: they sum it (all_reduce) or put it side by side (all_gather). One chunk copies, meets (ranks.h)
//     and joins. If there is much to exchange, copying and joining are phases before and after the meeting, in which all threads
//     take part. A product or an embedding right before an exchange writes where the other ranks read, so that nothing is copied.
//     The buffer that it would have written to then stays as it was.
//   - The products of a layer's experts (experts.h) are divided among the threads, in phases of their own.
//   - Logit rows are treated as few tokens, because the head is too large to be read again for each chunk.
//   - A convolution of more than 4 rows is a phase whose chunks take columns, because each row of a sequence needs those before it.
//   - A delta rule or a Mamba layer is a phase whose chunks take heads, because its states are megabytes even for one row.
//   - After the last op that appends keys or keeps states, only tokens with logits are computed, because nothing reads the others.
//     (That saves a thirtieth of a prompt; nearly half if the last layers read the keys of others.) One phase moves their rows to
//     the front of every buffer that will still be read. From there on the step has only these rows.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/pool/pool.h"
#include "cpu/program/delta_rule.h"
#include "cpu/program/mamba2.h"
#include "cpu/program/program.h"

namespace dc {

constexpr int64_t MANY_ROWS = 32;               // from so many rows on, chunks of rows are long
constexpr int64_t CAP_COLUMNS = 8192;           // of a chunk of softcap

static inline int64_t unit_of(Activation activation) { return is_gate(activation) ? 2 : 1; }     // tiles that stay together

// From this many tokens on, the rows of a step are divided: each thread gets the 8 rows that kernels take through a tile together.
constexpr int64_t MOST_TOKENS_BY_TILES = 128;
static inline int64_t tokens_by_rows(int threads) { return std::min(GROUP_ROWS * int64_t(std::max(2, threads)), MOST_TOKENS_BY_TILES); }

size_t prepared_bytes(const op::linear& op, int64_t rows);      // its x, made ready
static inline AttentionJob job_of(const op::paged_attention& op) {
    return {op.q.at, op.cache, op.cache_type, op.out.at, op.heads, op.kv_heads, op.head_size, op.window, op.softcap, op.sinks, op.page_stride,
            op.distances, op.reach, op.value_size};
}

struct StepMemory {
    void* prepared;                             // of any linear over MOST_TOKENS_BY_TILES or the most logit rows
    void* panels;                               // of any layer's experts, for every token; and of their pairs:
    float *hidden, *added;
};

class Step {
public:
    // Every table in which ids are looked up has at least `vocab` rows.
    Step(const std::vector<Op>& ops, StepInput input, const StepMemory& memory, int threads, int64_t vocab);
    Step(const Step&) = delete;
    Step& operator=(const Step&) = delete;

    // Ids below 0 become what the step before drew. std::out_of_range if it drew nothing, or an id that some table does not have.
    void resolve_ids(const std::vector<int32_t>& drawn);
    void run(int width, const std::function<void()>& begun);
    void poison_ranks() const;                  // of a step that failed: the other ranks wait for it
    StepTimes times() const;
    bool by_rows() const { return by_rows(tokens); }
    bool many_rows() const { return many_rows(tokens); }

    const int64_t tokens, logit_rows;
    std::vector<int32_t> drawn;
    Run outcome{};
    int64_t ticket = 0;                         // these belong to Program
    bool ended = false;
    double us = 0, gap_us = 0;
    std::string error;

private:
    struct Part {                               // the work of a phase: ops [first, end) of each row, then x of `prepares`
        const Step* step;
        int first, end, prepares;               // prepares: a linear, or -1
        int64_t rows, rows_per_chunk, chunks;
    };
    // Ops of attention share one run if group, window, heads, kv_heads and head size are equal, and if they are all of all tokens
    // or all of the needed ones.
    using Shape = std::array<int, 4>;           // of a plan: group, heads, kv_heads, only needed tokens?
    using Key = std::tuple<Shape, int, int, bool, bool>;
    Shape shape_of(const op::paged_attention& op) const { return {op.group, op.heads, op.kv_heads, is_of_needed(op)}; }
    Key key_of(const op::paged_attention& op) const { return {shape_of(op), op.window, op.head_size, op.of_texts, op.two_sided}; }
    using Body = void (Step::*)(const Part&, int64_t chunk) const;
    using StagedBody = void (Step::*)(const Part&, int64_t chunk, float* staged) const;
    using Put = void (Step::*)(const Part&, int64_t chunk, const float* staged) const;
    struct Range { int64_t begin, end; };

    template <class Work> void note_failure(Work work) const;     // if a chunk throws, before its phase ends
    Phase& add_phase(Part part);
    template <Body body> void add_plain(Part part);
    template <StagedBody body, Put put> void add_staged(Part part, size_t staged_bytes);
    void add_rows(int first, int end, int prepares, int64_t rows);
    template <class T> void add_convolution(const T& op);
    void add_experts(const AnyOp& op);
    void add_exchange(const AnyOp& op);
    void make_phases();
    void find_slots(const std::vector<int32_t>& pages, const std::vector<int64_t>& offsets);
    struct Sequences {                          // some rows of a step, by the positions they have
        std::vector<int32_t> pages;             // of a group
        std::vector<int64_t> offsets, lengths, starts;
    };
    Sequences of_needed(const Sequences& all) const;
    void plan_attention();
    void find_needed();
    void find_live();
    bool by_rows(int64_t rows) const { return rows >= tokens_by_rows(threads); }
    static bool many_rows(int64_t rows) { return rows >= MANY_ROWS; }
    template <class T> const T& op_of(const Part& part) const { return std::get<T>(ops[size_t(part.first)].is); }
    bool is_of_needed(const AnyOp& op) const { return op.index > last_append && !op.on_logit_rows; }
    int64_t token_of(const AnyOp& op, int64_t row) const { return is_of_needed(op) ? needed[size_t(row)] : row; }
    void find_adapters();
    void prepare_rows(const op::linear& op, int64_t begin, int64_t end, int64_t to, void* prepared, float* wide) const;
    void shrink_rows(const op::linear& op, int64_t begin, int64_t end, const float* normed) const;
    AdaptedRows adapted_rows(const op::linear& op, int64_t first) const;
    const std::vector<const AdapterMatrix*>& adapters_of(const AnyOp& op) const {
        return op.on_logit_rows ? logit_adapters : is_of_needed(op) ? needed_adapters : token_adapters;
    }
    Product product_of(const op::linear& op, const void* prepared, int64_t first, int64_t rows, float* out) const;

    void do_rows(const Part& part, int64_t chunk) const;
    void do_product(const Part& part, int64_t chunk, float* staged) const;
    void put_product(const Part& part, int64_t chunk, const float* staged) const;
    Range tiles_of(const Part& part, int64_t chunk) const;
    Range columns_of(const Part& part, int64_t chunk) const;
    void do_attention(const Part& part, int64_t chunk, float* staged) const;
    void put_attention(const Part& part, int64_t chunk, const float* staged) const;
    void do_softcap(const Part& part, int64_t chunk) const;
    void do_by_head(const Part& part, int64_t chunk) const;
    int64_t turn_of(int64_t token) const { return (input.turns.empty() ? positions : input.turns)[size_t(token)]; }
    template <class T> void do_convolution(const Part& part, int64_t chunk) const;
    void do_delta_rule(const Part& part, int64_t chunk) const;
    void do_mamba2(const Part& part, int64_t chunk) const;
    void do_move_needed(const Part& part, int64_t chunk) const;
    void do_group(const Part& part, int64_t chunk) const;
    void do_pause(const Part& part, int64_t chunk) const;
    struct ExpertProduct {                      // gate_up or down
        const Routing& routing;
        const Tiles& tiles;
        const float* bias;
        Activation activation;
        Rows x;                                 // of tokens, or of pairs
        bool of_pairs, norm;
        const float* norm_weight;
        float eps;
        bool fine;
        float* out;                             // of pairs
    };
    ExpertProduct experts_of(const AnyOp& op) const;
    void do_gather(const Part& part, int64_t chunk) const;
    void do_experts(const Part& part, int64_t chunk, float* staged) const;
    void put_experts(const Part& part, int64_t chunk, const float* staged) const;
    struct Piece { Routing::Expert expert; int64_t tile_begin, tile_end, column_begin, column_end, width; };
    template <class Visit> void each_piece(const Part& part, int64_t chunk, Visit visit) const;
    void do_sample(const Part& part, int64_t chunk) const;
    void do_offer(const Part& part, int64_t chunk) const;
    void do_meet(const Part& part, int64_t chunk) const;
    void do_join(const Part& part, int64_t chunk) const;
    struct Exchanged { Ranks* ranks; bool sums; Rows x, residual, out; };       // ranks null: this op exchanges nothing
    Exchanged exchanged_of(int index) const;
    Exchange exchange_of(const Part& part) const;
    bool is_offered(int index) const;
    float* product_row(const AnyOp& op, const Rows& out, int64_t row) const;
    void do_exchange(const Part& part, int64_t chunk) const;

    template <class Visit> void each_sequence(Visit visit) const;
    template <class T> void convolve(const T& op, int64_t first, int64_t last) const;

    // What each op needs, by how it runs (ops.def). step_run.cpp and step_plan.cpp define what has no body here.
#define DO_ROWS(T) void do_rows(const T& op, int64_t begin, int64_t end) const
#define ROW(T)                                       \
    void do_row(const T& op, int64_t row) const;     \
    DO_ROWS(T) { for (int64_t row = begin; row < end; row++) do_row(op, row); } NO_PHASES(T)
#define ROWS(T) DO_ROWS(T); NO_PHASES(T)
#define PHASES(T) void do_rows(const T&, int64_t, int64_t) const {} bool in_phases(const T&, int64_t) const { return true; } void add_phases(const T& op);
#define EITHER(T) DO_ROWS(T); bool in_phases(const T& op, int64_t rows) const; void add_phases(const T& op);
#define NO_PHASES(T) bool in_phases(const T&, int64_t) const { return false; } void add_phases(const T&) {}
#define OP(name, runs, has, ...) runs(op::name)
#include "ops.def"
#undef DO_ROWS
#undef ROW
#undef ROWS
#undef PHASES
#undef EITHER
#undef NO_PHASES

    int64_t count_of(const AnyOp& op) const {
        return op.on_logit_rows ? logit_rows : is_of_needed(op) ? int64_t(needed.size()) : tokens;
    }

    const std::vector<Op>& ops;
    StepInput input;
    const StepMemory memory;
    const int threads;
    const int64_t vocab;
    std::vector<int64_t> positions;
    std::vector<std::vector<int64_t>> slots;    // by group
    std::map<Shape, AttentionPlan> plans;
    std::map<Key, AttentionRun> attention;
    int last_append = INT32_MAX;                // INT32_MAX: all rows are computed to the end
    std::vector<int64_t> needed;                // the tokens that have logits, ascending: the rows of ops after last_append
    std::vector<int64_t> gathered;              // for each logit row, which row gather_rows takes
    std::vector<Rows> live;                     // buffers that were written before last_append and are read after it
    std::vector<Memory> attention_memory;
    std::vector<const AdapterMatrix*> token_adapters, needed_adapters, logit_adapters;    // of each row, or null; empty: no row has one
    int64_t most_ranks = 0;
    mutable std::vector<float> shrunk;          // [rows][most_ranks]: u of the next product
    std::vector<Part> parts;
    std::vector<Phase> phases;
    std::vector<uint64_t> stamps;
    mutable std::atomic<bool> failed{false};    // a chunk has thrown: later output is nonsense, and other ranks must not get it
};

}  // namespace dc
