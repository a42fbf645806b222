// op       multiply through AMX's tile registers: panels of 16 rows of x times the q tiles of `is_wide`. Types whose x comes in steps
//          have tiles_amx_steps.inl.h; all other types, and products of too few rows, have the kernels of VNNI
// shapes   a unit = 16 rows of x, 16 rows of weights and a block of 32 columns: A = x8 or fine [16][32], B = codes [8][64], C = sums
//          int32 [16][16]. A block in which any row has a fine plane is two units
// mapping  as tiles.inl.h: a tile's weights meet one panel after another. The totals of 16 rows stay in 16 registers
// cost     a unit takes 16 cycles of the tile registers and 47 of vector instructions. Next to tiles only one expensive instruction
//          (fma, mul, conversions) runs per cycle, so sums become floats by an addition (to_floats_cheaply). A sum is stored LAG
//          units after its product and scaled a unit later; nibbles become bytes a block before their product
// numerics those of every instruction set (tiles.h): integer sums are exact, and each row's floats are added in the same order
#include "cpu/lanes.h"
#include "cpu/tiles/dots.h"
#include "cpu/tiles/finish.inl.h"
#include "cpu/tiles/formats.h"
#include "cpu/tiles/tile_registers.h"
#include "cpu/tiles/tiles.h"

#if defined(__AVX512F__)
#define DC_FOR_ROWS _Pragma("GCC unroll 16") for (int r = 0; r < PANEL_ROWS; r++)
#else
#define DC_FOR_ROWS for (int r = 0; r < PANEL_ROWS; r++)
#endif
#if defined(DC_EMULATED_TILES)
#define DC_WIDE static __attribute__((noinline))          // copies for tests, quickly compiled
#define DC_WIDE_MEMBER __attribute__((noinline))
#else
#define DC_WIDE DC_INLINE
#define DC_WIDE_MEMBER __attribute__((always_inline))
#endif

namespace dc {
namespace DC_ISA {
namespace {

constexpr int LEAD = 3, LAG = 2, RING = 4;      // in units: from product to scaling; from product to store; sums that are kept
constexpr int UNROLLED = 4;                     // so many units are written out; then their registers repeat
constexpr int CODES = 8;                        // so many blocks are kept with their codes as bytes
constexpr int64_t MOST_BLOCKS = 1024;           // the list of units has room for a row of so many
constexpr int32_t MAGIC_BITS = 0x4B400000;      // the bits of the float MAGIC: adding a small integer to them adds it to the float

constexpr bool is_wide(Weight type) {
    return type == Weight::q8_0 || type == Weight::q4_0 || type == Weight::q4_1 || type == Weight::q4_k || type == Weight::q5_k ||
           type == Weight::mxfp4 || type == Weight::u4_g32 || type == Weight::u4_g128;
}

// ---- units of a panel

enum class Role : uint8_t { whole, first, second, none };       // a block without a fine plane; one with: its x8; its fine; no unit

struct Unit {
    uint16_t block;
    Role role;
};

constexpr int64_t units_bound(int64_t blocks) { return 2 * blocks + UNROLLED + LEAD + 1; }

// Lists the units of a panel's first `rows` rows. It is filled up to a multiple of UNROLLED, and LEAD + 1 more follow, which are computed
// but not used.
int list_units(const PanelBlock* panel, int64_t blocks, int64_t rows, Unit* to) {
    uint32_t real[PANEL_ROWS / SET_ROWS];       // of has_fine as a word: a byte a row
    for (int s = 0; s < PANEL_ROWS / SET_ROWS; s++) {
        const int64_t count = rows - s * SET_ROWS;
        real[s] = count >= SET_ROWS ? ~0u : count <= 0 ? 0u : (1u << 8 * count) - 1;
    }
    int units = 0;
    for (int64_t b = 0; b < blocks; b++) {
        uint32_t fine = 0, flags;
        for (int s = 0; s < PANEL_ROWS / SET_ROWS; s++) std::memcpy(&flags, panel[b].sets[s].has_fine, sizeof flags), fine |= flags & real[s];
        to[units++] = {uint16_t(b), fine ? Role::first : Role::whole};
        if (fine) to[units++] = {uint16_t(b), Role::second};
    }
    const int count = (units + UNROLLED - 1) / UNROLLED * UNROLLED;
    while (units < count + LEAD + 1) to[units++] = {uint16_t(blocks - 1), Role::none};
    return count;
}

// ---- sums -> totals

#if defined(__AVX512F__)
DC_INLINE void store_words(uint8_t* to, Words words) { _mm512_store_si512(to, words.v); }
DC_INLINE Whole load_sums(const int32_t* sums) { return {_mm512_load_si512(sums)}; }
struct Sixteen { int32_t of[16]; };
// Assembler, because GCC 12 would load the sums of all rows first, broadcast an offset with an instruction of its own, and then
// has no registers for the totals.
DC_INLINE Whole load_plus(const int32_t* sums, const int32_t& offset) {
    __m512i sum;
    asm("vpbroadcastd %1, %0\n\tvpaddd %2, %0, %0" : "=&v"(sum) : "m"(offset), "m"(*reinterpret_cast<const Sixteen*>(sums)));
    return {sum};
}
DC_INLINE Whole load_plus_magic(const int32_t* sums) {
    __m512i sum;
    asm("vpaddd %1, %2, %0" : "=v"(sum) : "m"(*reinterpret_cast<const Sixteen*>(sums)), "v"(_mm512_set1_epi32(MAGIC_BITS)));
    return {sum};
}
DC_INLINE Whole plus(Whole sum, int32_t offset) { return {_mm512_add_epi32(sum.v, _mm512_set1_epi32(offset))}; }
DC_INLINE Lanes to_floats_cheaply(Whole sums) {         // the sums have MAGIC_BITS in them; exact up to 2^22
    return {_mm512_sub_ps(_mm512_castsi512_ps(sums.v), _mm512_set1_ps(MAGIC))};
}
#else
DC_INLINE void store_words(uint8_t* to, const Words& words) { std::memcpy(to, words.of, sizeof words.of); }
DC_INLINE Whole load_sums(const int32_t* sums) {
    Whole whole;
    std::memcpy(whole.of, sums, sizeof whole.of);
    return whole;
}
DC_INLINE Whole plus(Whole sums, int32_t offset) {
    for (int32_t& sum : sums.of) sum = int32_t(uint32_t(sum) + uint32_t(offset));      // as below
    return sums;
}
DC_INLINE Whole load_plus(const int32_t* sums, int32_t offset) { return plus(load_sums(sums), offset); }
DC_INLINE Whole load_plus_magic(const int32_t* sums) { return load_plus(sums, MAGIC_BITS); }
DC_INLINE Lanes to_floats_cheaply(const Whole& sums) { return to_floats(plus(sums, -MAGIC_BITS)); }
#endif

// For each row of a set: first + minus * 2^SHIFT or, with `fine`, first + (256 * minus + fine) * 2^SHIFT.
template <int SHIFT>
DC_INLINE void put_offsets(int32_t* to, const int32_t* minus, const int32_t* fine, int32_t first) {
#if defined(__AVX512F__)            // GCC 12 would compute them one by one
    __m128i sum = _mm_load_si128(reinterpret_cast<const __m128i*>(minus));
    if (fine) sum = _mm_add_epi32(_mm_slli_epi32(sum, 8), _mm_load_si128(reinterpret_cast<const __m128i*>(fine)));
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi32(_mm_slli_epi32(sum, SHIFT), _mm_set1_epi32(first)));
#else
    for (int r = 0; r < SET_ROWS; r++) {        // unsigned, since x may lack the row, and then its sums are whatever lay there
        const uint32_t sum = fine ? 256 * uint32_t(minus[r]) + uint32_t(fine[r]) : uint32_t(minus[r]);
        to[r] = int32_t(uint32_t(first) + (sum << SHIFT));
    }
#endif
}

// to [16] = for each row what is added to its sums: it takes the codes' offset back, and has MAGIC_BITS in it where sums are small.
template <class F>
DC_WIDE void find_offsets(const PanelBlock& x, Role role, int32_t* to) {
    for (int s = 0; s < PANEL_ROWS / SET_ROWS; s++, to += SET_ROWS) {
        const PanelSet& set = x.sets[s];
        if (role != Role::second) put_offsets<F::OFFSET_SHIFT>(to, set.minus, nullptr, MAGIC_BITS);
        else if (F::FINE_APART) put_offsets<F::OFFSET_SHIFT>(to, set.fine_minus[0], nullptr, MAGIC_BITS);
        else put_offsets<F::OFFSET_SHIFT>(to, set.minus, set.fine_minus[0], 0);
    }
}

// Adds a unit's sums (`now`) to the totals. `before` has the sums of the unit before, and i is the block's place in its group.
template <class F>
DC_WIDE void add_unit(Role role, const PanelBlock& x, const uint8_t* group, int i, const int32_t* before, const int32_t* now,
                        Lanes (&total)[PANEL_ROWS]) {
    if (role == Role::none || (role == Role::first && !F::FINE_APART)) return;
    alignas(64) int32_t offset[PANEL_ROWS];
    if constexpr (!F::HAS_MINIMUM) find_offsets<F>(x, role, offset);
    Lanes d = F::scale(group, i, 0);
    if (role == Role::second) d = d * all(1.0f / 256);
#define DC_SCALE(r) (d * all(x.sets[(r) / SET_ROWS].scale[(r) % SET_ROWS]))
    if (role == Role::second && !F::FINE_APART) {
        DC_FOR_ROWS {
            const Whole sum = add_fine(load_sums(before + 16 * r), load_sums(now + 16 * r));
            add_product(total[r], DC_SCALE(r), to_floats(F::HAS_MINIMUM ? sum : plus(sum, offset[r])));
        }
    } else {
        DC_FOR_ROWS {
            const int32_t* const sums = now + 16 * r;
            add_product(total[r], DC_SCALE(r), to_floats_cheaply(F::HAS_MINIMUM ? load_plus_magic(sums) : load_plus(sums, offset[r])));
        }
    }
#undef DC_SCALE
    if (!F::HAS_MINIMUM || role == Role::first) return;
    const Lanes m = minimum_of<F>(group, i, 0);
    DC_FOR_ROWS add_product(total[r], m, all(x.sets[r / SET_ROWS].product[r % SET_ROWS]));
}

// ---- a tile times a panel

// What tile loads read and tile stores write; apart from TileWalk, whose members the compiler could otherwise not keep in registers.
template <class F>
struct Scratch {
    alignas(64) uint8_t codes[F::BITS == 8 ? 1 : CODES][8][64];
    alignas(64) int32_t ring[RING][16 * 16];
};

template <class F>
class TileWalk {
public:
    TileWalk(const uint8_t* tile, int64_t ahead, const PanelBlock* panel, const Unit* units, Scratch<F>& scratch)
        : tile(tile), ahead(ahead), panel(panel), units(units), codes(scratch.codes), ring(scratch.ring) {}

    const uint8_t* group_of(unsigned b) const { return tile + b / F::BLOCKS * group_of_blocks_bytes<F>(); }

    // Fetch, and make bytes of, the blocks up to unit u's.
    DC_WIDE_MEMBER void reach(int u) {
        if (made > units[u].block) return;
        const uint8_t* group = group_of(made);
        const unsigned i = made % F::BLOCKS;
        if (ahead) prefetch_block<F>(group, i, ahead);
        if constexpr (F::BITS != 8) spread<0>(group, i), spread<1>(group, i), spread<2>(group, i), spread<3>(group, i);
        made++;
    }

    template <int J>                    // J = u % UNROLLED, here and below
    DC_WIDE_MEMBER void compute(int u) {
        const Unit unit = units[u];
        tile_zero<4 + J>();
        tile_load<J % 2>(unit.role == Role::second ? panel[unit.block].fine : panel[unit.block].x, BLOCK);
        tile_load<2 + J % 2>(codes_of(unit.block), 64);
        tile_dot<4 + J, J % 2, 2 + J % 2>();
    }

    template <int J>
    DC_WIDE_MEMBER void put() { tile_store<4 + J>(ring[J], 64); }

    template <int J>
    DC_WIDE_MEMBER void step(int u, Lanes (&total)[PANEL_ROWS]) {
        reach(u + LEAD + 1);
        compute<(J + LEAD) % UNROLLED>(u + LEAD);
        put<(J + LEAD - LAG) % UNROLLED>();
        const unsigned b = units[u].block;
        add_unit<F>(units[u].role, panel[b], group_of(b), int(b % F::BLOCKS), ring[(J + RING - 1) % RING], ring[J], total);
    }

private:
    const uint8_t* const tile;
    const int64_t ahead;
    const PanelBlock* const panel;
    const Unit* const units;
    unsigned made = 0;                                               // blocks
    uint8_t (*const codes)[8][64];
    int32_t (*const ring)[16 * 16];

    const uint8_t* codes_of(unsigned b) const { return F::BITS == 8 ? quants_of<F>(group_of(b), b % F::BLOCKS) : codes[b % CODES][0]; }

    template <int C>
    DC_WIDE_MEMBER void spread(const uint8_t* group, unsigned i) {
        Words low, high;
        F::template unpack<C>(quants_of<F>(group, i), low, high);
        store_words(codes[made % CODES][F::NEXT * C / 4], F::weights(low));
        store_words(codes[made % CODES][(F::SECOND + F::NEXT * C) / 4], F::weights(high));
    }
};

// One tile times a panel -> y [16] of `out`, 8 rows in each.
template <Weight TYPE>
__attribute__((noinline)) void wide_rows(const uint8_t* tile, int64_t ahead, const PanelBlock* panel, const Unit* units, int count, int t,
                                         Sums* out) {
    Scratch<Format<TYPE>> scratch;
    TileWalk<Format<TYPE>> walk(tile, ahead, panel, units, scratch);
    for (int u = 0; u <= LEAD; u++) walk.reach(u);
    walk.template compute<0>(0), walk.template compute<1>(1), walk.template compute<2>(2), walk.template put<0>();
    Lanes total[PANEL_ROWS];
    DC_FOR_ROWS total[r] = all(0.0f);
    for (int u = 0; u < count; u += UNROLLED) {
        walk.template step<0>(u, total), walk.template step<1>(u + 1, total);
        walk.template step<2>(u + 2, total), walk.template step<3>(u + 3, total);
    }
    DC_FOR_ROWS store(out[r / GROUP_ROWS].y[t][r % GROUP_ROWS], total[r]);
}

using WideKernel = void (*)(const uint8_t*, int64_t, const PanelBlock*, const Unit*, int, int, Sums*);

WideKernel wide_kernel(Weight type) {
    switch (type) {
        case Weight::q8_0: return wide_rows<Weight::q8_0>;
        case Weight::q4_0: return wide_rows<Weight::q4_0>;
        case Weight::q4_1: return wide_rows<Weight::q4_1>;
        case Weight::q4_k: return wide_rows<Weight::q4_k>;
        case Weight::q5_k: return wide_rows<Weight::q5_k>;
        case Weight::u4_g32: return wide_rows<Weight::u4_g32>;
        case Weight::u4_g128: return wide_rows<Weight::u4_g128>;
        default: return wide_rows<Weight::mxfp4>;
    }
}

// ---- what all kernels do

void finish_panel(const Product& job, int64_t tile, int64_t tiles, int64_t panel, int64_t rows_end, Sums (&sums)[PANEL_ROWS / GROUP_ROWS]) {
    const int64_t row = panel * PANEL_ROWS, rows = least(PANEL_ROWS, rows_end - row);
    const auto finish = is_gate(job.activation) ? finish_gated_row : finish_row;
    for (int64_t r = 0; job.adapted.adapters && r < rows; r += GROUP_ROWS)
        add_adapters(job, tile, int(tiles), row + r, int(least(GROUP_ROWS, rows - r)), sums[r / GROUP_ROWS]);
    for (int64_t r = 0; r < rows; r++) finish(job, tile, int(tiles), row + r, int(r % GROUP_ROWS), sums[r / GROUP_ROWS]);
}

// Some tiles times rows from the beginning of a panel up to rows_end; what AMX does not take goes to `narrow`.
struct WideRange {
    const Product& job;
    int64_t tile_begin, tile_end, first_panel, rows_end;
    const TileKernels& narrow;
    LeastRows least_rows;

    void multiply_narrow(int64_t tile, int64_t tiles, int64_t panel, int64_t panel_end) const {
        constexpr int64_t GROUPS = PANEL_ROWS / GROUP_ROWS;
        narrow.multiply(job, tile, tile + tiles, panel * GROUPS, least(panel_end * GROUPS, group_count(rows_end)));
    }
};

}  // namespace
}  // namespace DC_ISA
}  // namespace dc

#include "cpu/tiles/tiles_amx_steps.inl.h"

namespace dc {
namespace DC_ISA {
namespace {

// ---- multiply

// The units of panels that pass by one tile, as many as a quarter of the L2 cache holds.
struct Panels {
    static constexpr int64_t MOST = GROUPS_BYTES / int64_t(sizeof(PanelBlock));
    Unit units[MOST * units_bound(1) > units_bound(MOST_BLOCKS) ? MOST * units_bound(1) : units_bound(MOST_BLOCKS)];
    int counts[MOST];
};

// Some tiles (1, or a gate and its up) times panels [first, end), whose units are listed, up to row rows_end.
struct WideMeeting {
    const Product& job;
    int64_t tile, tiles, tile_bytes;
    int64_t blocks, first, end, rows_end;
};

const PanelBlock* blocks_of(const Product& job, int64_t panel) {
    return reinterpret_cast<const PanelBlock*>(panel_of(job, panel));
}

void multiply_panels(const WideMeeting& m, const Panels& panels) {
    for (int64_t panel = m.first; panel < m.end; panel++) {
        const int64_t i = panel - m.first;
        Sums sums[PANEL_ROWS / GROUP_ROWS];
        for (int64_t t = 0; t < m.tiles; t++) {
            const TilePlace place = tile_of(m.job.tiles, m.tile + t, m.tile_bytes);
            wide_kernel(place.type)(place.memory, i ? 0 : AHEAD, blocks_of(m.job, panel), panels.units + i * units_bound(m.blocks), panels.counts[i],
                                    int(t), sums);
        }
        finish_panel(m.job, m.tile, m.tiles, panel, m.rows_end, sums);
    }
}

Weight type_of(const Tiles& w, int64_t tile) { return w.places ? w.places[tile].type : w.type; }

// The number of rows from which some tiles go through AMX block by block, as their types require; NEVER for types without kernels.
constexpr int64_t NEVER = INT64_MAX;

int64_t rows_wanted(const Tiles& w, int64_t tile, int64_t tiles, LeastRows least_rows) {
    int64_t wanted = 1;
    for (int64_t t = 0; t < tiles; t++) {
        const Weight type = type_of(w, tile + t);
        const int64_t rows = is_wide(type) && w.columns / BLOCK <= MOST_BLOCKS ? least_rows(type, w.columns) : 0;
        wanted = !rows ? NEVER : rows > wanted ? rows : wanted;
        if (wanted == NEVER) break;
    }
    return wanted;
}

void multiply_in_blocks(const WideRange& range) {
    const Tiles& w = range.job.tiles;
    const int64_t blocks = w.columns / BLOCK, bytes = tile_bytes(w.type, w.columns), step = is_gate(range.job.activation) ? PAIR : 1;
    TileConfig config;
    for (int t = 0; t < 8; t++) config.rows[t] = t == 2 || t == 3 ? 8 : 16, config.bytes[t] = t < 2 ? BLOCK : 64;      // A, A, B, B, C ...
    tile_configure(config);
    const int64_t fit = Panels::MOST / blocks, at_once = fit > 1 ? fit : 1, all_panels = panel_count(range.rows_end);
    Panels panels;
    for (int64_t first = range.first_panel; first < all_panels; first += at_once) {
        const int64_t end = least(first + at_once, all_panels), last = range.rows_end - (end - 1) * PANEL_ROWS;
        for (int64_t p = first; p < end; p++)
            panels.counts[p - first] = list_units(blocks_of(range.job, p), blocks, range.rows_end - p * PANEL_ROWS, panels.units + (p - first) * units_bound(blocks));
        for (int64_t tile = range.tile_begin; tile < range.tile_end; tile += step) {
            const int64_t tiles = least(step, range.tile_end - tile), wanted = rows_wanted(w, tile, tiles, range.least_rows);
            const int64_t wide_end = last < least(wanted, PANEL_ROWS) ? end - 1 : end;
            multiply_panels({range.job, tile, tiles, bytes, blocks, first, wide_end, range.rows_end}, panels);
            if (wide_end < end) range.multiply_narrow(tile, tiles, wide_end, end);
        }
    }
}

using StepsKernel = void (*)(const WideRange&);

StepsKernel steps_kernel(Weight type) {             // null for types that do not come in steps
    return with_format(type, [](auto format) -> StepsKernel {
        using F = decltype(format);
        if constexpr (F::WHOLE_SCALES) return multiply_in_steps<F>;
        else return nullptr;
    });
}

// How some tiles are multiplied: two of one type in steps, else block by block or, narrow, by kernels of VNNI.
struct Way {
    StepsKernel steps;
    bool narrow;
    bool operator==(const Way& other) const { return steps == other.steps && narrow == other.narrow; }
};

// The ways of tiles up to tile_end, `step` of which go together in any case, with so many rows.
struct Ways {
    const Tiles& w;
    int64_t tile_end, step, rows;
    LeastRows least_rows;

    Way from(int64_t tile) const {
        const bool pair = tile + PAIR <= tile_end && type_of(w, tile) == type_of(w, tile + 1);
        const StepsKernel kernel = pair ? steps_kernel(type_of(w, tile)) : nullptr;
        const int64_t wanted = kernel ? least_rows(type_of(w, tile), w.columns) : 0;
        if (wanted && rows >= wanted) return {kernel, false};
        return {nullptr, rows < rows_wanted(w, tile, least(step, tile_end - tile), least_rows)};
    }
    int64_t end(const Way& way, int64_t tile) const {       // of those that go this way from `tile` on
        const int64_t own_step = way.steps ? PAIR : step;
        if (!w.places) return tile_end - (tile_end - tile) % own_step;      // all of one type
        for (tile += own_step; tile < tile_end && from(tile) == way;) tile += own_step;
        return least(tile, tile_end);
    }
};

// Panels that begin in groups [begin, end) go through AMX if their rows there are enough; what is left of a tile follows while it
// is in the cache.
void multiply_wide(const Product& job, int64_t tile_begin, int64_t tile_end, int64_t group_begin, int64_t group_end,
                   const TileKernels& narrow, LeastRows least_rows) {
    constexpr int64_t GROUPS = PANEL_ROWS / GROUP_ROWS;
    const Tiles& w = job.tiles;
    const int64_t first_panel = (group_begin + GROUPS - 1) / GROUPS, first_group = least(first_panel * GROUPS, group_end);
    const int64_t rows_end = least(group_end * GROUP_ROWS, job.rows), rows = rows_end - first_group * GROUP_ROWS;
    const int64_t step = is_gate(job.activation) ? PAIR : 1;
    const Ways ways{w, tile_end, step, rows, least_rows};
    if (is_float(w.type) || (ways.from(tile_begin).narrow && ways.end({nullptr, true}, tile_begin) == tile_end))
        return narrow.multiply(job, tile_begin, tile_end, group_begin, group_end);
    if (group_begin < first_group) narrow.multiply(job, tile_begin, tile_end, group_begin, first_group);
    for (int64_t tile = tile_begin, end; tile < tile_end; tile = end) {
        const Way way = ways.from(tile);
        end = ways.end(way, tile);
        const WideRange range{job, tile, end, first_panel, rows_end, narrow, least_rows};
        if (way.steps) way.steps(range);
        else if (way.narrow) narrow.multiply(job, tile, end, first_group, group_end);
        else multiply_in_blocks(range);
    }
    tile_release();
}

}  // namespace

extern const WideMultiply wide_multiply = multiply_wide;

}  // namespace DC_ISA
}  // namespace dc
