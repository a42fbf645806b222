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

// What a step brings. Ids below 0: token_ids ~i (-1 - i) is the token that row i of the step before draws; previous_ids
// -1 is none, -2 - i the token that row i of the step before draws.
struct StepInput {
    std::vector<int64_t> token_ids, previous_ids, starts, lengths, logit_rows;
    std::vector<int32_t> pages;         // of all sequences; sequence i's from offsets[i]: a page of each group in turn
    std::vector<int64_t> offsets;
    std::vector<int64_t> state_reads;   // of layers that keep states: the slot of each sequence, unless its first row is at position 0
    std::vector<int64_t> write_rows, write_slots;               // after these rows, ascending, the state goes to these slots
    std::vector<std::shared_ptr<const Adapter>> adapters;       // of each sequence, or null; empty: no sequence has one
    std::vector<int64_t> turns;         // of each token, the row of the tables cos and sin that it turns by; empty: its position
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
    double us, gap_us;                  // its own time; what passed between the end of the step before and its begin
    std::vector<std::pair<std::string, double>> phases;         // (what, us)
};

class Program {
public:
    Program(int64_t max_tokens, int64_t max_rows);
    ~Program();                         // after the steps that were started
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    // What it points to outlives the program. std::invalid_argument after the first start.
    void record(Op op);
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
