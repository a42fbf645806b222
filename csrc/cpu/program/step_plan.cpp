// What the layers of a step share, and how ops become phases. All of this happens before the step runs.
#include "cpu/program/step.h"

#include <algorithm>

#include "checks.h"

namespace dc {
namespace {

// A chunk of a product is 64 KB of weights, which take 1.5 to 3 us at 20 to 40 GB/s. Less than half of that is not worth a hand-over
// (0.1 to 0.4 us, measured). The size was chosen by this estimate; no other was tried.
constexpr int64_t CHUNK_BYTES = 64 << 10;
constexpr int64_t FREE_ROWS = 4;                // this many rows take the time of one: with more, chunks take fewer tiles
// A chunk of an expert's product in a prompt. Its weights stay in the second cache while all rows of the expert are multiplied.
constexpr int64_t EXPERT_BYTES = 384 << 10;
constexpr int64_t EXCHANGED_BYTES = 32 << 10;   // of a rank's part, copied or joined by a chunk: estimated 3 us
constexpr int64_t CONV_VALUES = 16 << 10;       // of a chunk of a convolution: estimated 5 us
constexpr int64_t MAMBA_VALUES = 32 << 10;      // of states that a chunk of a Mamba layer goes through: estimated 1 us in the cache, 7 in memory
constexpr int64_t SMALL_CHUNK_ROWS = 4;         // rows of a chunk between two products: 0.7 us of prepare, 2 us of rope

// visit(rows, does it write them?) for each buffer of an op
#define READS(name, columns) visit(op.name, false);
#define WRITES(name, columns) visit(op.name, true);
#define OP(name, runs, has, ...) \
    template <class Visit> void each_buffer([[maybe_unused]] const op::name& op, [[maybe_unused]] const Visit& visit) { __VA_ARGS__ }
#include "ops.def"

}  // namespace

size_t prepared_bytes(const op::linear& op, int64_t rows) { return prepared_bytes(op.tiles, rows); }

Step::Step(const std::vector<Op>& ops, StepInput given, const StepMemory& memory, int threads, int64_t vocab)
    : tokens(int64_t(given.token_ids.size())), logit_rows(int64_t(given.logit_rows.size())), ops(ops), input(std::move(given)),
      memory(memory), threads(threads), vocab(vocab) {
    find_needed();
    plan_attention();
    find_adapters();
    make_phases();
    drawn.resize(input.samples ? size_t(logit_rows) : 0);
    stamps.resize(phases.size() + 1);
}

// The slots of one group, whose pages these are.
void Step::find_slots(const std::vector<int32_t>& all, const std::vector<int64_t>& offsets) {
    std::vector<int64_t>& places = slots.emplace_back(size_t(tokens));
    positions.resize(size_t(tokens));
    for (size_t i = 0; i < input.lengths.size(); i++) {
        const int64_t begin = input.starts[i], end = input.starts[i + 1], first = input.lengths[i] - (end - begin);
        const int32_t* pages = all.data() + offsets[i];
        for (int64_t row = begin; row < end; row++) {
            const int64_t position = first + row - begin;
            const bool padding = input.lengths[i] == 0;
            positions[size_t(row)] = padding ? 0 : position;
            places[size_t(row)] = padding ? -1 : pages[page_of(position)] * int64_t(PAGE_SIZE) + place_of(position);
        }
    }
}

void Step::plan_attention() {
    int groups = 1;
    int64_t num_pages = INT32_MAX;
    const auto note = [&](const auto* op) {
        if (!op) return;
        groups = std::max(groups, op->group + 1);
        if (op->num_pages) num_pages = std::min(num_pages, op->num_pages);
    };
    for (const Op& op : ops) note(op.as<op::rope_append>()), note(op.as<op::append_latents>()), note(op.as<op::paged_attention>());
    Sequences all{{}, input.offsets, input.lengths, input.starts};
    for (int64_t& offset : all.offsets) require(offset % groups == 0, "tables: a page of each group for every 16 tokens"), offset /= groups;
    for (int group = 0; group < groups; group++) {
        all.pages.resize(input.pages.size() / size_t(groups));
        for (size_t i = 0; i < all.pages.size(); i++) all.pages[i] = input.pages[i * size_t(groups) + size_t(group)];
        const auto plan = [&](const Shape& shape, const Sequences& of) {
            // throws for what is wrong; rows, lengths and tables are as it says from here on
            if (!plans.count(shape)) plans.try_emplace(shape, of.pages, of.offsets, of.lengths, of.starts, shape[1], shape[2], num_pages, input.ahead);
        };
        const auto plan_ops = [&](bool of_needed, const Sequences& of) {
            for (const Op& one : ops)
                if (const auto* op = one.as<op::paged_attention>(); op && op->group == group && count_of(*op) && shape_of(*op)[3] == of_needed)
                    plan(shape_of(*op), of);
        };
        plan_ops(false, all);
        if (plans.empty() || plans.rbegin()->first[0] != group) plan({group, 1, 1, false}, all);        // checks them without any attention too
        find_slots(all.pages, all.offsets);
        if (!needed.empty() && last_append < INT32_MAX) plan_ops(true, of_needed(all));
    }
    for (const Op& one : ops) {
        const auto* const op = one.as<op::paged_attention>();
        if (!op || !count_of(*op) || attention.count(key_of(*op))) continue;
        const AttentionPlan::Work& work = plans.at(shape_of(*op)).work(op->window, op->head_size, op->of_texts, op->two_sided);
        attention_memory.emplace_back();
        void* memory = attention_memory.back().at_least(AttentionRun::memory_bytes(work, op->head_size) + 64);
        attention.emplace(key_of(*op), AttentionRun(work, memory, threads));
    }
}

void Step::find_adapters() {
    if (std::none_of(input.adapters.begin(), input.adapters.end(), [](const auto& adapter) { return bool(adapter); })) return;
    for (size_t i = 0; i < input.adapters.size(); i++) {
        const Adapter* const adapter = input.adapters[i].get();
        token_adapters.resize(size_t(input.starts[i + 1]), adapter ? adapter->matrices() : nullptr);
        if (adapter) most_ranks = std::max(most_ranks, adapter->most_ranks());
    }
    for (const int64_t row : needed) needed_adapters.push_back(token_adapters[size_t(row)]);
    for (const int64_t row : input.logit_rows) logit_adapters.push_back(token_adapters[size_t(row)]);
    shrunk.resize(size_t(std::max(tokens, logit_rows) * most_ranks));
}

void Step::find_needed() {
    const auto append = std::find_if(ops.rbegin(), ops.rend(), [](const Op& op) {
        const auto* const rope = op.as<op::rope_append>();
        if (op.as<op::append_latents>()) return true;
        return rope ? rope->job.kv_heads > 0 : std::visit([](const auto& its) { return keeps_states<std::decay_t<decltype(its)>>; }, op.is);
    });
    gathered = input.logit_rows;
    const bool of_texts = std::any_of(ops.begin(), ops.end(), [](const Op& op) {
        const auto* const attention = op.as<op::paged_attention>();
        return attention && attention->of_texts;                // its rows need whole sequences
    });
    if (append == ops.rend() || input.all_rows || of_texts || !input.ahead.empty()) return;
    needed = input.logit_rows;
    std::sort(needed.begin(), needed.end());
    needed.erase(std::unique(needed.begin(), needed.end()), needed.end());
    if (int64_t(needed.size()) == tokens) return;
    last_append = int(ops.rend() - append) - 1;
    for (int64_t& row : gathered) row = std::lower_bound(needed.begin(), needed.end(), row) - needed.begin();
    find_live();
}

// The buffers that ops after the last append read before any of these has written them.
void Step::find_live() {
    std::vector<const float*> seen;
    const auto is_new = [&](const Rows& rows) {
        if (!rows.at || std::find(seen.begin(), seen.end(), rows.at) != seen.end()) return false;
        return seen.push_back(rows.at), true;
    };
    const auto each = [](const Op& op, const auto& visit) { std::visit([&](const auto& its) { each_buffer(its, visit); }, op.is); };
    for (size_t i = size_t(last_append) + 1; i < ops.size(); i++) {
        if (ops[i].any().on_logit_rows && !ops[i].as<op::gather_rows>()) continue;
        each(ops[i], [&](const Rows& rows, bool written) { if (!written && is_new(rows)) live.push_back(rows); });
        each(ops[i], [&](const Rows& rows, bool written) { if (written) is_new(rows); });
    }
}

// The needed rows as sequences of their own, of which they are the newest positions: one for each run of neighbours.
Step::Sequences Step::of_needed(const Sequences& all) const {
    Sequences some{{}, {0}, {}, {0}};
    size_t i = 0;
    for (size_t begin = 0, end; begin < needed.size(); begin = end) {
        while (needed[begin] >= all.starts[i + 1]) i++;
        end = begin + 1;
        while (end < needed.size() && needed[end] == needed[end - 1] + 1 && needed[end] < all.starts[i + 1]) end++;
        const int64_t length = all.lengths[i] ? positions[size_t(needed[end - 1])] + 1 : 0;
        const auto pages = all.pages.begin() + all.offsets[i];
        some.pages.insert(some.pages.end(), pages, pages + (length + PAGE_SIZE - 1) / PAGE_SIZE);
        some.offsets.push_back(int64_t(some.pages.size())), some.lengths.push_back(length), some.starts.push_back(int64_t(end));
    }
    return some;
}

template <class Work>
void Step::note_failure(Work work) const {
    try {
        work();
    } catch (...) {
        failed.store(true);
        throw;
    }
}

Phase& Step::add_phase(Part part) {
    part.step = this;
    part.chunks = std::min(part.chunks, MAX_CHUNKS);
    parts.push_back(part);
    phases.push_back({nullptr, nullptr, part.chunks});
    return phases.back();
}

template <Step::Body body>
void Step::add_plain(Part part) {
    add_phase(part).run = [](const void* context, int64_t chunk, void*) {
        const Part& its = *static_cast<const Part*>(context);
        its.step->note_failure([&] { (its.step->*body)(its, chunk); });
    };
}

template <Step::StagedBody body, Step::Put put>
void Step::add_staged(Part part, size_t staged_bytes) {
    Phase& phase = add_phase(part);
    phase.run = [](const void* context, int64_t chunk, void* staged) {
        const Part& its = *static_cast<const Part*>(context);
        its.step->note_failure([&] { (its.step->*body)(its, chunk, static_cast<float*>(staged)); });
    };
    phase.put = [](const void* context, int64_t chunk, const void* staged) {
        const Part& its = *static_cast<const Part*>(context);
        (its.step->*put)(its, chunk, static_cast<const float*>(staged));
    };
    phase.staged_bytes = staged_bytes;
}

void Step::add_rows(int first, int end, int prepares, int64_t rows) {
    if (rows == 0 || (first == end && prepares < 0)) return;
    int64_t per_chunk = SMALL_CHUNK_ROWS;
    if (by_rows(rows)) {                        // the more, the less often weights are read
        const int64_t least = chosen_amx() != Amx::none && rows >= threads * PANEL_ROWS ? PANEL_ROWS : GROUP_ROWS;
        per_chunk = 4 * GROUP_ROWS;
        while (per_chunk > least && rows < 3 * threads * per_chunk) per_chunk /= 2;
        const auto wants = [&](const Op& op) { const auto* const its = op.as<op::linear>(); return its && wants_many_rows(its->tiles); };
        if (std::any_of(ops.begin() + first, ops.begin() + end, wants)) {     // codes are made once a chunk: 128 rows, 4 % of a prompt better than 32; each thread as many
            const int64_t shares = threads * std::max<int64_t>(1, rows / (threads * 16 * GROUP_ROWS));
            per_chunk = ((rows + shares - 1) / shares + least - 1) / least * least;
        }
        if (rows < 2 * threads * GROUP_ROWS) per_chunk = (rows + threads - 1) / threads;     // one each: with chunks of 8, some would have two
    }
    add_plain<&Step::do_rows>({nullptr, first, end, prepares, rows, per_chunk, (rows + per_chunk - 1) / per_chunk});
}

bool Step::in_phases(const op::linear& op, int64_t rows) const { return op.on_logit_rows || !by_rows(rows); }

void Step::add_phases(const op::linear& op) {
    const int64_t rows = count_of(op), tiles = tile_count(op.tiles.rows), units = tiles / unit_of(op.activation);
    const int64_t bytes = bytes_of(op.tiles), work = bytes * std::max(rows, FREE_ROWS) / FREE_ROWS;
    int64_t chunks = work < CHUNK_BYTES / 2 ? 1 : (work / CHUNK_BYTES / threads + 1) * threads;
    chunks = std::min({chunks, units, MAX_CHUNKS});
    const size_t staged_bytes = size_t(rows * ((units + chunks - 1) / chunks) * TILE_ROWS) * sizeof(float);
    add_staged<&Step::do_product, &Step::put_product>({nullptr, op.index, op.index + 1, -1, rows, rows, chunks}, staged_bytes);
    phases.back().weights = op.tiles.memory, phases.back().weight_bytes = bytes;
}

void Step::add_phases(const op::paged_attention& op) {
    const int64_t rows = count_of(op);
    const AttentionRun& run = attention.at(key_of(op));
    if (!run.chunks()) return;
    add_staged<&Step::do_attention, &Step::put_attention>({nullptr, op.index, op.index + 1, -1, rows, rows, run.chunks()}, run.staged_bytes(job_of(op)));
    if (many_rows(rows)) phases.back().put = nullptr;       // long chunks: one that is only slow would be done twice
}

template <class T>
void Step::add_convolution(const T& op) {
    const int64_t rows = count_of(op), chunks = std::min(op.out.columns / 16, rows * op.out.columns / CONV_VALUES + 1);
    add_plain<&Step::do_convolution<T>>({nullptr, op.index, op.index + 1, -1, rows, rows, chunks});
}

bool Step::in_phases(const op::short_conv&, int64_t rows) const { return rows > SMALL_CHUNK_ROWS; }
bool Step::in_phases(const op::convolve&, int64_t rows) const { return rows > SMALL_CHUNK_ROWS; }
void Step::add_phases(const op::short_conv& op) { add_convolution(op); }
void Step::add_phases(const op::convolve& op) { add_convolution(op); }

void Step::add_phases(const op::delta_rule& op) {
    const int64_t rows = count_of(op);
    add_plain<&Step::do_delta_rule>({nullptr, op.index, op.index + 1, -1, rows, rows, op.key_heads});
}

void Step::add_phases(const op::mamba2& op) {
    const int64_t rows = count_of(op), values = rows * op.heads * Mamba2(op).head_values();
    add_plain<&Step::do_mamba2>({nullptr, op.index, op.index + 1, -1, rows, rows, std::min(op.heads, values / MAMBA_VALUES + 1)});
}

void Step::add_phases(const op::group& op) {
    const int64_t rows = count_of(op);
    add_plain<&Step::do_group>({nullptr, op.index, op.index + 1, -1, rows, rows, 1});
}

// A phase of one chunk: the thread that ended the phase before waits in it, and the others go to sleep.
void Step::add_phases(const op::pause& op) {
    const int64_t rows = count_of(op);
    add_plain<&Step::do_pause>({nullptr, op.index, op.index + 1, -1, rows, rows, 1});
}

void Step::add_phases(const op::gate_up& op) { add_experts(op); }
void Step::add_phases(const op::down& op) { add_experts(op); }

// Only routing decides how much there is to do, but no more than what `most` experts take.
void Step::add_experts(const AnyOp& op) {
    const ExpertProduct its = experts_of(op);
    const int64_t rows = count_of(op), E = its.routing.experts, pairs = rows * its.routing.chosen, most = std::min(E, pairs);
    const int64_t per_chunk = many_rows(rows) ? 4 * GROUP_ROWS : SMALL_CHUNK_ROWS;
    add_plain<&Step::do_gather>({nullptr, op.index, op.index, op.index, rows, rows, (pairs + per_chunk - 1) / per_chunk});
    const int64_t units = tile_count(its.tiles.rows) / unit_of(its.activation) / E * most, bytes = bytes_of(its.tiles) / E * most;
    const int64_t each = (pairs + most - 1) / most, work = bytes * std::max(each, FREE_ROWS) / FREE_ROWS;
    int64_t chunks = ((many_rows(rows) ? bytes / EXPERT_BYTES : work / CHUNK_BYTES) / threads + 1) * threads;
    chunks = std::min({chunks, units, MAX_CHUNKS});
    const size_t staged_bytes = size_t(rows * (units / chunks + 1) * TILE_ROWS) * sizeof(float);
    add_staged<&Step::do_experts, &Step::put_experts>({nullptr, op.index, op.index + 1, -1, rows, rows, chunks}, staged_bytes);
    if (many_rows(rows)) phases.back().put = nullptr;                   // as for paged_attention
}

void Step::add_phases(const op::all_reduce& op) { add_exchange(op); }
void Step::add_phases(const op::all_gather& op) { add_exchange(op); }

// The meeting is in a phase of one chunk: one thread waits for the other ranks.
void Step::add_exchange(const AnyOp& op) {
    const int64_t rows = count_of(op), bytes = rows * exchanged_of(op.index).x.columns * int64_t(sizeof(float));
    const int64_t chunks = threads == 1 ? 1 : std::min({rows, bytes / EXCHANGED_BYTES, MAX_CHUNKS});
    Part part{nullptr, op.index, op.index + 1, -1, rows, rows, 1};
    if (chunks <= 1) return add_plain<&Step::do_exchange>(part);
    if (!is_offered(op.index - 1)) part.chunks = chunks, add_plain<&Step::do_offer>(part);
    part.chunks = 1, add_plain<&Step::do_meet>(part);
    part.chunks = chunks, add_plain<&Step::do_join>(part);
}

constexpr int64_t HEAD_CHUNKS = 4;              // of by_head for each thread, as far as heads or parts of them are enough

// A chunk takes a head, or with few rows and heads a part of one: it makes the head's x ready itself.
void Step::add_phases(const op::by_head& op) {
    const int64_t rows = count_of(op), tiles = tile_count(op.tiles.rows) / op.heads;
    const int64_t wanted = many_rows(rows) ? 1 : (HEAD_CHUNKS * threads + op.heads - 1) / op.heads;
    const int64_t chunks = op.heads * std::clamp<int64_t>(wanted, 1, tiles);
    add_plain<&Step::do_by_head>({nullptr, op.index, op.index + 1, -1, rows, rows, chunks});
}

void Step::add_phases(const op::softcap& op) {
    const int64_t rows = count_of(op), segments = (op.logits.columns + CAP_COLUMNS - 1) / CAP_COLUMNS;
    add_plain<&Step::do_softcap>({nullptr, op.index, op.index + 1, -1, rows, segments, rows * segments});
}

void Step::add_phases(const op::sample& op) {
    const int64_t rows = count_of(op);
    if (input.samples) add_plain<&Step::do_sample>({nullptr, op.index, op.index + 1, -1, rows, 1, rows});
}

void Step::make_phases() {
    int first = 0;                              // ops [first, i) are of the rows' phase that is being collected
    const auto flush = [&](int i, int prepares, int next) {
        if (first < i || prepares >= 0) add_rows(first, i, prepares, count_of(ops[size_t(prepares >= 0 ? prepares : first)].any()));
        first = next;
    };
    for (const Op& one : ops) {
        const AnyOp& op = one.any();
        const int i = op.index;
        const int64_t rows = count_of(op);
        if (first < i && ops[size_t(i - 1)].any().on_logit_rows != op.on_logit_rows) flush(i, -1, i);
        if (i - 1 == last_append) {
            flush(i, -1, i);
            if (!needed.empty() && !live.empty()) add_plain<&Step::do_move_needed>({nullptr, i, i, -1, tokens, tokens, int64_t(live.size())});
        }
        const bool apart = rows && std::visit([&](const auto& its) { return in_phases(its, rows); }, one.is);
        if (!rows || apart) flush(i, apart && one.as<op::linear>() ? i : -1, i + 1);
        if (apart) std::visit([&](const auto& its) { add_phases(its); }, one.is);
    }
    const int count = int(ops.size());
    flush(count, -1, count);
    const Phase* ahead = nullptr;
    for (size_t i = phases.size(); i-- > 0;) {
        phases[i].context = &parts[i], phases[i].ahead = ahead;
        if (phases[i].weights && phases[i].chunks > 1) ahead = &phases[i];
    }
}

}  // namespace dc
