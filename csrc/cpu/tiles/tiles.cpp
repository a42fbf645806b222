// Sizes of tiles, the way to the kernels, and the memory that tiles lie in.
#include "cpu/tiles/tiles.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "cpu/attention/attention.h"
#include "cpu/choices.h"
#include "cpu/tiles/least_rows.h"

#define DC_ISA portable
#include "cpu/tiles/formats.h"

namespace dc {
namespace {

using portable::with_format;

constexpr size_t HUGE_PAGE = 2 << 20;

size_t rounded_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

const TileKernels& narrow_kernels() {
#if defined(__x86_64__)
    static const bool vnni = cpu_has("avx512_vnni");
    if (chosen_isa() == Isa::portable) return portable::tile_kernels;
    if (chosen_dot() != Dot::own) return chosen_dot() == Dot::vex ? avxvnni::tile_kernels : evex::tile_kernels;
    return chosen_isa() == Isa::avx512 && vnni ? avx512::tile_kernels : avx2::tile_kernels;
#elif defined(__aarch64__)
    if (chosen_dot() != Dot::own) return chosen_dot() == Dot::i8mm ? i8mm::tile_kernels : dotprod::tile_kernels;
    return DC_CHOSEN(tile_kernels);
#else
    return portable::tile_kernels;
#endif
}

static int64_t any_rows(Weight, int64_t) { return 1; }

int64_t tile_count(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

static int64_t float_bytes(Weight type) { return type == Weight::f32 ? 4 : 2; }

const char* name_of(Weight type) { return WEIGHT_NAMES[int(type)]; }

int64_t file_columns(Weight type) {
    return is_float(type) ? 1 : with_format(type, [](auto format) { return decltype(format)::FILE_COLUMNS; });
}

int64_t tile_bytes(Weight type, int64_t columns) {
    if (is_float(type)) return columns * TILE_ROWS * float_bytes(type);
    return with_format(type, [&](auto format) {
        using F = decltype(format);
        return (columns / BLOCK + F::BLOCKS - 1) / F::BLOCKS * portable::group_of_blocks_bytes<F>();
    });
}

int64_t row_bytes(Weight type, int64_t columns) {
    if (is_float(type)) return columns * float_bytes(type);
    return with_format(type, [&](auto format) { return columns / decltype(format)::FILE_COLUMNS * decltype(format)::FILE_BYTES; });
}

int64_t bytes_of(const Tiles& tiles) {
    const int64_t count = tile_count(tiles.rows);
    int64_t bytes = 0;
    for (int64_t i = 0; tiles.places && i < count; i++) bytes += tile_bytes(tiles.places[i].type, tiles.columns);
    return tiles.places ? bytes : count * tile_bytes(tiles.type, tiles.columns);
}

bool wants_many_rows(const Tiles& tiles) {
#if defined(__x86_64__)
    const bool all = &narrow_kernels() == &avx512::tile_kernels;        // tile_pairs.inl.h, folded.inl.h; AMX gains as much
#else
    const bool all = false;
#endif
    const auto wants = [&](Weight type) {
        return is_float(type) || all || with_format(type, [](auto format) { return decltype(format)::EXPANDS; });
    };
    if (!tiles.places) return wants(tiles.type);
    return std::any_of(tiles.places, tiles.places + tile_count(tiles.rows), [&](const TilePlace& place) { return wants(place.type); });
}

int panels_of(Weight type) {
    if (is_float(type)) return FLOAT_PANELS;
    return with_format(type, [](auto format) -> int {
        using F = decltype(format);
        if (!F::WHOLE_SCALES) return BLOCK_PANELS;
        return F::ROW_SCALE ? STEP_PANELS : STEP_PANELS | HIGH_BYTES;
    });
}

size_t prepared_bytes(const Tiles& tiles, int64_t rows) { return size_t(panel_count(rows) * panel_bytes(tiles.panels, tiles.columns)); }

void prepare(const Tiles& tiles, const float* x, int64_t stride, int64_t row_begin, int64_t row_end, bool norm, const float* norm_weight,
             float epsilon, bool fine, void* prepared) {
    narrow_kernels().prepare({tiles.panels, x, stride, tiles.columns, norm, norm_weight, epsilon, fine, static_cast<uint8_t*>(prepared)}, row_begin, row_end);
}

void multiply(const Product& product, int64_t tile_begin, int64_t tile_end, int64_t group_begin, int64_t group_end) {
    const Amx amx = chosen_amx();
    if (amx == Amx::none) return narrow_kernels().multiply(product, tile_begin, tile_end, group_begin, group_end);
    wide_kernel(amx)(product, tile_begin, tile_end, group_begin, group_end, narrow_kernels(), amx == Amx::measured ? measured_rows : any_rows);
}

WideMultiply wide_kernel(Amx amx) {
#if defined(__x86_64__)
    if (amx == Amx::emulated) return emulated_vnni::wide_multiply;
    if (amx == Amx::measured || amx == Amx::always) return amx::wide_multiply;
#endif
    (void)amx;
    return emulated_portable::wide_multiply;
}

#if defined(__x86_64__)
const bool AMX_IS_COMPILED = amx::wide_multiply, VNNI_IS_COMPILED = avx512::tile_kernels.multiply, AVX512_IS_COMPILED = avx512::attention_kernels.attend,
           AVXVNNI_IS_COMPILED = avxvnni::tile_kernels.multiply, AVX2_IS_COMPILED = avx2::tile_kernels.multiply;
#else
const bool AMX_IS_COMPILED = false, VNNI_IS_COMPILED = false, AVX512_IS_COMPILED = false, AVXVNNI_IS_COMPILED = false, AVX2_IS_COMPILED = false;
#endif
const bool TEST_SETS_ARE_COMPILED = emulated_portable::wide_multiply;

// ---- memory

struct Arena::Segment {
    Segment* next;
    void* mapping;
    size_t mapped;
    uint8_t *at, *end;
};

Arena::Arena(size_t bytes) { add_segment(bytes); }

Arena::~Arena() {
    while (segments) {
        Segment* next = segments->next;
        munmap(segments->mapping, segments->mapped);
        delete segments;
        segments = next;
    }
}

void Arena::add_segment(size_t bytes) {
    bytes = rounded_up(std::max(bytes, HUGE_PAGE), HUGE_PAGE);
    const size_t mapped = bytes + HUGE_PAGE;            // room for the alignment; what is not touched costs nothing
    void* mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    uint8_t* begin = reinterpret_cast<uint8_t*>(rounded_up(reinterpret_cast<uintptr_t>(mapping), HUGE_PAGE));
#if defined(MADV_HUGEPAGE)
    madvise(begin, bytes, MADV_HUGEPAGE);               // a refusal costs speed only
#endif
    segments = new Segment{segments, mapping, mapped, begin, begin + bytes};
    reserved_ += bytes;
}

void Arena::grow(size_t bytes) {
    try {
        add_segment(std::max(bytes, SEGMENT));
    } catch (const std::bad_alloc&) {                   // where address space is limited
        add_segment(bytes);
    }
}

uint8_t* Arena::allocate(size_t bytes) {
    bytes = rounded_up(bytes, 64);
    if (size_t(segments->end - segments->at) < bytes) grow(bytes);
    uint8_t* memory = segments->at;
    segments->at += bytes;
    used_ += bytes;
    return memory;
}

}  // namespace dc
