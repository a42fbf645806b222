// All of rope_append and paged_attention but their kernels: it checks indices, divides the work and shares it out.
#include "cpu/attention/attention_plan.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "checks.h"
#include "cpu/pool/pool.h"
#include "ops.h"

namespace dc {
namespace {

constexpr int64_t ROWS_AT_ONCE = 16;            // rope_append: a page, so that few cache lines of K have two writers
constexpr int64_t RUNS_PER_THREAD = 2, LONGEST_RUN = 2;     // paged_attention: runs of its items, which take 2 us or more each
// Less work than about 7 us stays with the caller: it gains little from a helper, and loses much where the helper sleeps or
// another process has its CPU (measured next to one: 32 rows took 24 us instead of 3.5, attention to 128 positions 9 instead of 4).
constexpr int64_t ROWS_WORTH_SHARING = 64;
constexpr int64_t BYTES_WORTH_SHARING = 256 << 10;          // of cache, counted again for each row of an item
// Rows that see this many numbers of a head's keys take turns at each chunk: with the values these are 2 MB in float16, as much as a
// second cache may hold (60 rows of 8,060 positions, one thread, Xeon: 0.77 of the time for 8 heads of 512, 0.93 for 4 of 128;
// 1.03 for 3 of 64 at 4,096 positions, which the cache holds).
constexpr int64_t NUMBERS_WORTH_TURNS = 512 << 10, ITEMS_PER_THREAD = 4;

}  // namespace

const AttentionKernels& attention_kernels_of(Element cache_type) {
    if (cache_type != Element::q8_0) return DC_CHOSEN(attention_kernels);
#if defined(__x86_64__)
    static const bool vnni = cpu_has("avx512_vnni");
    if (chosen_dot() != Dot::own) return chosen_dot() == Dot::vex ? avxvnni::packed_attention_kernels : evex::packed_attention_kernels;
    if (chosen_isa() == Isa::avx512 && !vnni) return avx2::packed_attention_kernels;
#elif defined(__aarch64__)
    if (chosen_dot() != Dot::own) return chosen_dot() == Dot::i8mm ? i8mm::packed_attention_kernels : dotprod::packed_attention_kernels;
#endif
    return DC_CHOSEN(packed_attention_kernels);
}

void check_rope_indices(const RopeJob& job, int64_t max_positions, int64_t num_pages) {
    bool good_slots = true, good_positions = true;
    for (int64_t row = 0; row < job.rows; row++) {
        const bool padding = job.slots[row] == -1;
        good_slots &= padding || (job.slots[row] >= 0 && job.slots[row] < num_pages * PAGE_SIZE);
        good_positions &= padding || (job.positions[row] >= 0 && job.positions[row] < max_positions);
    }
    require(good_slots, "slots: each must be -1 or lie in the cache");
    require(good_positions, "positions: each must lie in the tables cos and sin");
}

void rope_append(const RopeJob& job) {
    const AttentionKernels& use = attention_kernels_of(job.cache_type);
    const int64_t step = job.rows < ROWS_WORTH_SHARING ? ROWS_WORTH_SHARING : ROWS_AT_ONCE;
    parallel_for((job.rows + step - 1) / step, [&](int64_t i) {
        use.rope_rows(job, i * step, std::min((i + 1) * step, job.rows));
    });
}

// ---- plan

AttentionPlan::AttentionPlan(std::vector<int32_t> pages_, std::vector<int64_t> offsets_, std::vector<int64_t> lengths_,
                             std::vector<int64_t> starts_, int heads_, int kv_heads_, int64_t num_pages_,
                             std::vector<int64_t> ahead_)
    : heads(heads_), kv_heads(kv_heads_), num_pages(num_pages_), pages(std::move(pages_)), offsets(std::move(offsets_)),
      lengths(std::move(lengths_)), starts(std::move(starts_)), ahead(std::move(ahead_)) {
    const size_t count = lengths.size();
    require(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && heads / kv_heads <= MAX_GROUP,
            "heads: a multiple of kv_heads, at most 16 for each");
    require(starts.size() == count + 1 && starts[0] == 0, "starts: one more than lengths, beginning at 0");
    require(offsets.size() == count + 1, "tables: as many as lengths");
    for (size_t i = 0; i < count; i++) {
        const int64_t rows = starts[i + 1] - starts[i];
        require(rows >= 0, "starts: must not fall");
        require(lengths[i] == 0 || lengths[i] >= rows, "lengths: a sequence is 0 (padding) or at least as long as its new rows");
        require(lengths[i] <= (offsets[i + 1] - offsets[i]) * PAGE_SIZE, "tables: too few pages for the length");
        require(lengths[i] <= INT32_MAX - 2 * CHUNK_SIZE, "lengths: too long");
    }
    require(starts.back() <= INT32_MAX, "starts: too many rows");
    require(ahead.empty() || int64_t(ahead.size()) == starts.back(), "ahead: one for each row");
    for (size_t i = 0; !ahead.empty() && i < count; i++)
        for (int64_t row = starts[i]; row < starts[i + 1]; row++)
            require(ahead[size_t(row)] >= 0 && ahead[size_t(row)] <= lengths[i], "ahead: each must lie in its sequence");
    bool good = true;
    for (int32_t page : pages) good &= page >= 0 && page < num_pages;
    require(good, "tables: each page must lie in the cache");
}

const AttentionPlan::Work& AttentionPlan::work(int window, int head_size, bool of_texts, bool two_sided) {
    two_sided &= !ahead.empty();
    const std::tuple key(window, head_size, of_texts, two_sided);
    auto found = made.find(key);
    if (found == made.end()) found = made.emplace(key, divide(window, head_size, of_texts, two_sided)).first;
    return found->second;
}

AttentionPlan::Work AttentionPlan::divide(int window, int head_size, bool of_texts, bool two_sided) const {
    const int64_t together = rows_together(heads, kv_heads), threads = get_threads();
    int64_t prompt_rows = 0;
    for (size_t i = 0; i < lengths.size(); i++)
        if (starts[i + 1] - starts[i] > together) prompt_rows += starts[i + 1] - starts[i];
    const int64_t parts = std::clamp<int64_t>(prompt_rows / together * kv_heads / (ITEMS_PER_THREAD * threads), 1, MAX_PARTS);
    Work work;
    for (size_t i = 0; i < lengths.size(); i++) {
        const int64_t end = starts[i + 1], first_position = lengths[i] - (end - starts[i]);
        require(!of_texts || !lengths[i] || !first_position, "lengths: a text must be whole in one step");
        // One group of rows alone (decoding) is divided by chunks; many groups are work enough for all threads.
        const bool divided = end - starts[i] <= together;
        const int64_t seen = window > 0 ? std::min<int64_t>(lengths[i], of_texts ? 2 * int64_t(window) + 1 : window) : lengths[i];
        const int64_t rows_at_once = divided || seen * head_size < NUMBERS_WORTH_TURNS ? together : together * parts;
        for (int64_t row = starts[i], count; row < end; row += count) {
            count = std::min(rows_at_once, end - row);
            AttentionItem item{};
            if (two_sided) {                            // rows of one item see as far ahead as each other
                item.ahead = int32_t(ahead[size_t(row)]);
                count = std::find_if(ahead.begin() + row, ahead.begin() + row + count, [&](int64_t its) { return its != item.ahead; }) - ahead.begin() - row;
            }
            item.pages = pages.data() + offsets[i];
            item.row = int32_t(row);
            item.rows = int32_t(count);
            item.merge = -1;
            if (lengths[i] > 0) {
                item.position = int32_t(first_position + row - starts[i]);
                item.text = of_texts ? int32_t(lengths[i]) : 0;
                const int64_t after = !of_texts ? 0 : window > 0 ? window : lengths[i];
                item.end = std::max(item.ahead, int32_t(std::min(lengths[i], item.position + item.rows + after)));
                item.chunk_begin = window > 0 ? std::max(0, item.position + !of_texts - window) / CHUNK_SIZE : 0;
                item.chunk_end = (item.end - 1) / CHUNK_SIZE + 1;
            }
            work.positions += int64_t(item.rows) * (item.chunk_end - item.chunk_begin) * kv_heads * CHUNK_SIZE;
            const int chunks = item.chunk_end - item.chunk_begin, queries = item.rows * (heads / kv_heads);
            for (item.kv_head = 0; item.kv_head < kv_heads; item.kv_head++) {
                if (!divided || chunks <= 1) {
                    work.items.push_back(item);
                    continue;
                }
                AttentionItem part = item;
                part.merge = work.merges++;
                part.merge_begin = work.states;
                part.merge_count = chunks;
                for (int c = 0; c < chunks; c++) {
                    part.chunk_begin = item.chunk_begin + c;
                    part.chunk_end = part.chunk_begin + 1;
                    part.state = work.states;
                    work.states += queries;
                    work.items.push_back(part);
                }
            }
        }
    }
    // Chunk after chunk over all sequences and heads: an item fetches as many pages of the next as it has itself, so a short
    // last chunk must not come before a whole one (16 rows of 264 positions, one thread: 4.5 ms for 30 layers in the order of rows, 3.7 in this one with fetch_keys).
    std::stable_sort(work.items.begin(), work.items.end(), [](const AttentionItem& a, const AttentionItem& b) {
        return (a.merge >= 0 ? a.chunk_begin : 0) < (b.merge >= 0 ? b.chunk_begin : 0);
    });
    return work;
}

// ---- run

size_t AttentionRun::counter_bytes(const AttentionPlan::Work& work) {
    return (size_t(work.merges) * sizeof(std::atomic<int>) + 63) / 64 * 64;
}

size_t AttentionRun::memory_bytes(const AttentionPlan::Work& work, int head_size) {
    return counter_bytes(work) + size_t(work.states * state_floats(1, head_size)) * sizeof(float);
}

// With more than one thread, runs of items, so that a thread knows what it reads next; short enough that the threads end together.
AttentionRun::AttentionRun(const AttentionPlan::Work& work, void* memory, int threads)
    : work(work), unfinished(static_cast<std::atomic<int>*>(memory)),
      states(reinterpret_cast<float*>(static_cast<char*>(memory) + counter_bytes(work))), count(int64_t(work.items.size())),
      per_chunk(threads > 1 ? std::clamp<int64_t>(count / (RUNS_PER_THREAD * threads), 1, LONGEST_RUN) : std::max<int64_t>(count, 1)) {
    for (const AttentionItem& item : work.items)
        if (item.merge >= 0) new (&unfinished[item.merge]) std::atomic<int>(item.merge_count);
}

int64_t AttentionRun::floats_of(const AttentionJob& job, const AttentionItem& item) {
    return state_floats(item.rows * (job.heads / job.kv_heads), job.values());
}

size_t AttentionRun::staged_bytes(const AttentionJob& job) const {
    int64_t most = 0;
    for (const AttentionItem& item : work.items) most = std::max(most, floats_of(job, item));
    return size_t(per_chunk * most) * sizeof(float);
}

// The keys of an item's first chunk, at once: later ones are fetched while the item before is computed.
void fetch_keys(const AttentionJob& job, const AttentionItem& item) {
    const int64_t bytes = block_bytes(job.cache_type, job.head_size);
    const int first = item.chunk_begin * CHUNK_PAGES, seen = item.chunk_begin < item.chunk_end ? (item.end - 1) / PAGE_SIZE + 1 : 0;
    for (int page = first; page < std::min(first + CHUNK_PAGES, seen); page++) {
        const char* keys = static_cast<const char*>(job.cache) + item.pages[page] * job.page_stride * bytes_of(job.cache_type) + (job.value_size ? 0 : item.kv_head * 2 * bytes);
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(keys + i);
    }
}

void AttentionRun::run(const AttentionJob& job, int64_t chunk, float* staged) const {
    const AttentionKernels& use = attention_kernels_of(job.cache_type);
    const int64_t end = std::min((chunk + 1) * per_chunk, count);
    if (chunk * per_chunk < end) fetch_keys(job, work.items[size_t(chunk * per_chunk)]);
    for (int64_t j = chunk * per_chunk; j < end; j++) {
        const AttentionItem& item = work.items[size_t(j)];
        const AttentionItem* following = j + 1 < count ? &work.items[size_t(j + 1)] : nullptr;
        (job.value_size ? use.attend_latents : use.attend)(job, item, following, staged ? staged : item.merge < 0 ? nullptr : state_of(job, item));
        if (staged) staged += floats_of(job, item);
        else if (item.merge >= 0) count_state(job, item);
    }
}

void AttentionRun::put(const AttentionJob& job, int64_t chunk, const float* staged) const {
    const int64_t end = std::min((chunk + 1) * per_chunk, count);
    for (int64_t j = chunk * per_chunk; j < end; j++) {
        const AttentionItem& item = work.items[size_t(j)];
        const int64_t floats = floats_of(job, item);
        if (item.merge < 0) {
            attention_kernels_of(job.cache_type).merge(job, item, staged, 1);
        } else {
            std::memcpy(state_of(job, item), staged, size_t(floats) * sizeof(float));
            count_state(job, item);
        }
        staged += floats;
    }
}

void AttentionRun::count_state(const AttentionJob& job, const AttentionItem& item) const {
    if (unfinished[item.merge].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    unfinished[item.merge].store(item.merge_count, std::memory_order_relaxed);       // for the next layer
    attention_kernels_of(job.cache_type).merge(job, item, states + item.merge_begin * state_floats(1, job.values()), item.merge_count);
}

void paged_attention(const AttentionJob& job, const AttentionPlan::Work& work) {
    const bool shared = work.positions * 2 * job.head_size * bytes_of(job.cache_type) > BYTES_WORTH_SHARING;
    const AttentionRun run(work, scratch(AttentionRun::memory_bytes(work, job.head_size)), shared ? get_threads() : 1);
    parallel_for(run.chunks(), [&](int64_t i) { run.run(job, i, nullptr); });
}

// Reads memory as attention does, an item of 64 KB after another, and does nothing with it: what a bench compares with.
uint64_t read_memory(const void* memory, int64_t bytes) {
    constexpr int64_t item_bytes = 65536, lines = 8;
    std::atomic<uint64_t> total{0};
    parallel_for(bytes / item_bytes, [&](int64_t i) {
        const uint64_t* from = static_cast<const uint64_t*>(memory) + i * item_bytes / 8;
        uint64_t sums[lines] = {};
        for (int64_t j = 0; j < item_bytes / 8; j += lines)
            for (int k = 0; k < lines; k++) sums[k] += from[j + k];
        total.fetch_add(sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7]);
    });
    return total.load();
}

}  // namespace dc
