// A model's step as a list of ops over fixed buffers, run by a thread of its own and the pool's helpers.
//
//     record(op) ...;  ticket = start(input);  tokens = finish(ticket)
//
// The same list serves every batch: each step has its own numbers of tokens T and of logit rows R. start() checks the step, computes
// what its layers share (positions, slots, items of attention, phases) and queues it. At most two steps wait or run, and the second
// may use ids that the first has yet to draw. finish() waits. step.h says how ops become phases.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/program/adapters.h"
#include "cpu/program/experts.h"
#include "cpu/program/recorded.h"
#include "cpu/ranks/ranks.h"
#include "ops.h"

namespace dc {

template <class, class... T> using VariantOf = std::variant<T...>;
using OpOfAnyKind = VariantOf<void
#define OP(name, runs, has, ...) , op::name
#include "ops.def"
>;

struct Op {
    OpOfAnyKind is;

    OpKind kind() const { return OpKind(is.index()); }
    template <class T> const T* as() const { return std::get_if<T>(&is); }      // null: it is another one
    const AnyOp& any() const { return std::visit([](const AnyOp& its) -> const AnyOp& { return its; }, is); }
    AnyOp& any() { return std::visit([](AnyOp& its) -> AnyOp& { return its; }, is); }
};

// What a step brings. Ids below 0 stand for tokens that are not drawn yet: ~i (-1 - i) in token_ids, and -2 - i in previous_ids, are the
// token that row i of the step before draws. -1 in previous_ids means that there is none.
struct StepInput {
    std::vector<int64_t> token_ids, previous_ids, starts, lengths, logit_rows;
    std::vector<int32_t> pages;         // of all sequences; those of sequence i begin at offsets[i], a page of each group in turn
    std::vector<int64_t> offsets;
    std::vector<int64_t> state_reads;   // the slot that each sequence's states are read from, unless its first row is at position 0
    std::vector<int64_t> write_rows, write_slots;               // after these rows, ascending, states go to these slots
    std::vector<std::shared_ptr<const Adapter>> adapters;       // of each sequence, or null; empty: no sequence has one
    std::vector<int64_t> turns;         // for each token, the row of cos and sin by which it turns; empty: its position
    std::vector<int64_t> ahead;         // see AttentionPlan
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
    double us, gap_us;                  // how long it took; how long after the end of the step before it began
    std::vector<std::pair<std::string, double>> phases;         // (ops, us)
};

class Program {
public:
    Program(int64_t max_tokens, int64_t max_rows);
    ~Program();                         // after the steps that were started
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    // What the op points to must outlive the program. std::invalid_argument after the first start.
    void record(Op op);
    int64_t start(StepInput input);     // a ticket; or std::invalid_argument that names what is wrong, and nothing has happened
    std::vector<int32_t> finish(int64_t ticket);
    std::vector<StepTimes> times() const;                       // the last steps, oldest first
    std::vector<std::string> describe() const;

    const int64_t max_tokens, max_rows;

private:
    struct Inside;
    std::unique_ptr<Inside> inside;
};

}  // namespace dc
