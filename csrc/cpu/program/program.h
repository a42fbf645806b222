// A model's step as a list of ops over fixed buffers, run by a thread of its own and the pool's helpers.
//
//     record(op) ...;  ticket = start(input);  tokens = finish(ticket)
//
// The same list serves every batch: T tokens and R logit rows are counts of a step. start() checks the step, works out what
// its layers share (positions, slots, attention's items, the phases) and queues it; at most two steps wait or run, and the
// second may take ids that the first has yet to draw. finish() waits. How ops become phases: step.h.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/attention/attention.h"
#include "cpu/tiles/tiles.h"
#include "cpu/program/adapters.h"
#include "cpu/program/delta_rule.h"
#include "cpu/program/experts.h"
#include "cpu/program/mamba2.h"
#include "cpu/ranks/ranks.h"
#include "ops.h"

namespace dc {

enum class OpKind { embed, gather_rows, rms_norm, linear, copy, mix, smear, softcap, rope_append, paged_attention, sample, route, group,
                    gate_up, down, combine, all_reduce, all_gather, short_conv, delta_rule, split_gates, gate, gated_add,
                    convolve, mamba2, layer_inputs, gate_input, group_squares, norm_groups };
const char* name_of(OpKind kind);
static inline bool is_convolution(OpKind kind) { return kind == OpKind::short_conv || kind == OpKind::convolve; }
static inline bool keeps_states(OpKind kind) { return is_convolution(kind) || kind == OpKind::delta_rule || kind == OpKind::mamba2; }

struct Rows {                           // a buffer: contiguous rows of `columns`
    float* at = nullptr;
    int64_t columns = 0;
    float* row(int64_t i) const { return at + i * columns; }
};

struct Op {
    OpKind kind{};
    bool on_logit_rows = false;         // runs over the R rows that have logits, else over the T tokens
    Rows x, out;
    Rows other;                         // linear: residual; mix: x0 (or backout's middle); smear: previous; all_reduce: residual; gated_add: what is added;
                                        // mamba2: what a convolution made of p; layer_inputs: the tokens' rows; gate_input: from column `channels` on
    bool norm = false;                  // linear: of x first; weight and epsilon are the norm's
    const float* weight = nullptr;      // smear: the gate; a convolution: the taps; route: the experts' scales
    float epsilon = 0;
    Tiles tiles{};                      // linear; embed unless memory is null
    const float* bias = nullptr;
    Activation activation = Activation::none;
    const void* table = nullptr;        // embed: (table_rows, columns), plain unless there are tiles
    Element table_type{};
    int64_t file_row_bytes = 0;         // embed: > 0: the table has rows of GGUF blocks, so long, of type tiles.type
    int64_t table_rows = 0, first_row = 0, vocabulary = 0;      // its rows are those from first_row on, of so many ids
    bool previous_ids = false;          // embed: of the tokens before
    int64_t channels = 0;               // smear; a convolution: how many taps; split_gates: of a head; rms_norm: groups of columns, 0: one; layer_inputs: of a layer's part
    float* states = nullptr;            // a convolution: (num_slots, taps - 1, columns)
    int64_t num_slots = 0;              // of any op that keeps states
    std::shared_ptr<const DeltaRule> delta;
    Mamba2 mamba{};                     // of group_squares and norm_groups its heads alone
    Rows gates;                         // split_gates: written; gate, gated_add (one column): read; norm_groups: the sums of squares
    float a = 0, b = 0;                 // mix: a x + b other; smear: lambda; softcap: cap
    RopeJob rope{};                     // positions and slots come with the step
    int64_t max_positions = 0;          // of the tables cos and sin
    AttentionJob attention{};
    int64_t num_pages = 0;              // of rope's and attention's cache
    int page_group = 0;                 // rope, attention: which of a table's pages are theirs, see StepInput
    std::shared_ptr<Routing> routing;   // route (x: logits), group, gate_up (x), down, combine (x: what is added to, or nothing): see experts.h
    std::shared_ptr<Ranks> ranks;       // all_reduce, all_gather
    int64_t adapted = -1;               // linear: the number of its matrix in adapters; -1: no adapter changes it
};

// What a step brings. Ids below 0: token_ids ~i (-1 - i) is the token that row i of the step before draws; previous_ids
// -1 is none, -2 - i the token that row i of the step before draws.
struct StepInput {
    std::vector<int64_t> token_ids, previous_ids, starts, lengths, logit_rows;
    std::vector<int32_t> pages;         // of all sequences; sequence i's from offsets[i]: a page of each group in turn
    std::vector<int64_t> offsets;
    std::vector<int64_t> state_reads;   // of layers that keep states: the slot of each sequence, unless its first row is at position 0
    std::vector<int64_t> write_rows, write_slots;               // after these rows, ascending, the state goes to these slots
    std::vector<std::shared_ptr<const Adapter>> adapters;       // of each sequence, or null; empty: no sequence has one
    bool all_rows = false;              // compute all of the last layer, not only the rows that have logits
    bool samples = false;
    std::vector<SampleRow> sample_rows;                         // one for each logit row
    std::vector<int32_t> count_ids, counts, bias_ids;
    std::vector<float> bias_values;
};

struct StepTimes {                      // of one step that has ended
    int64_t tokens, logit_rows;
    int width;
    bool stalled;
    double us, gap_us;                  // its own time; what passed between the end of the step before and its begin
    std::vector<std::pair<std::string, double>> phases;         // (what, us)
};

class Program {
public:
    Program(int64_t max_tokens, int64_t max_rows);
    ~Program();                         // after the steps that were started
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    void record(const Op& op);          // std::invalid_argument after the first start
    int64_t start(StepInput input);     // a ticket; std::invalid_argument that names what is wrong, and then nothing has happened
    std::vector<int32_t> finish(int64_t ticket);
    std::vector<StepTimes> times() const;                       // the last steps, oldest first
    std::vector<std::string> describe() const;

    const int64_t max_tokens, max_rows;

private:
    struct Inside;
    std::unique_ptr<Inside> inside;
};

}  // namespace dc
