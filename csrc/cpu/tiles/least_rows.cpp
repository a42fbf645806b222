// See least_rows.h.
#include "cpu/tiles/least_rows.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/choices.h"

namespace dc {
namespace {

constexpr int64_t COLUMNS[] = {576, 2048, 8192};                        // stand for up to 1024, 4096, and more
constexpr int64_t ROWS[] = {9, 10, 11, 12, 13, 14, 15, 16, 24, 32, 48};
constexpr int64_t MOST_ROWS = 48, TILES = 4, REPEATS = 7;
constexpr double MARGIN = 0.97;                                         // at most this share of the time, or it is no gain

// x like a model's: of every 256 columns one is large in all rows, and one elsewhere in each row.
std::vector<float> make_x(int64_t columns) {
    std::vector<float> x(size_t(MOST_ROWS * columns));
    for (int64_t i = 0; i < int64_t(x.size()); i++) x[size_t(i)] = float(i * 37 % 201 - 100) / 50;
    for (int64_t row = 0; row < MOST_ROWS; row++) {
        for (int64_t c = 40; c < columns; c += 256) x[size_t(row * columns + c)] = 30;
        x[size_t(row * columns + row * 577 % columns)] = 30;
    }
    return x;
}

// A product with made-up weights: the time does not depend on them. Bytes of 28 are scales that are small and normal, and that files may have, in every type.
class Trial {
public:
    Trial(Weight type, int64_t columns, const TileKernels& narrow)
        : weights(aligned(size_t(TILES * tile_bytes(type, columns)))), tiles{type, TILES * TILE_ROWS, columns, weights.get(), panels_of(type)},
          prepared(aligned(prepared_bytes(tiles, MOST_ROWS))), product{tiles, prepared.get(), 0, nullptr, nullptr, 0, Activation::none, nullptr,
                  TILES * TILE_ROWS, TILES * TILE_ROWS} {
        std::memset(weights.get(), 28, size_t(TILES * tile_bytes(type, columns)));
        const std::vector<float> x = make_x(columns);
        narrow.prepare({tiles.panels, x.data(), columns, columns, false, nullptr, 0, false, prepared.get()}, 0, MOST_ROWS);
    }

    template <class Multiply>
    double seconds(int64_t rows, std::vector<float>& out, Multiply multiply) {
        product.rows = rows, product.out = out.data();
        const auto begin = std::chrono::steady_clock::now();
        multiply(product);
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    }

private:
    struct Free { void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t(64)); } };
    using Memory = std::unique_ptr<uint8_t, Free>;
    static Memory aligned(size_t bytes) {
        Memory memory(static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(64))));
        std::memset(memory.get(), 0, bytes);
        return memory;
    }

    Memory weights;
    Tiles tiles;
    Memory prepared;
    Product product;
};

}  // namespace

int64_t measure_least_rows(Weight type, int64_t columns, WideMultiply wide, const TileKernels& narrow) {
    if (is_float(type)) return 0;
    Trial trial(type, columns, narrow);
    std::vector<float> expected(size_t(MOST_ROWS * TILES * TILE_ROWS)), out(expected.size());
    int64_t least = 0;
    for (size_t i = std::size(ROWS); i-- > 0; least = ROWS[i]) {
        double narrow_s = 1e9, wide_s = 1e9;
        for (int repeat = 0; repeat < REPEATS; repeat++) {
            narrow_s = std::min(narrow_s, trial.seconds(ROWS[i], expected, [&](const Product& product) {
                narrow.multiply(product, 0, TILES, 0, group_count(ROWS[i]));
            }));
            wide_s = std::min(wide_s, trial.seconds(ROWS[i], out, [&](const Product& product) {
                wide(product, 0, TILES, 0, group_count(ROWS[i]), narrow, [](Weight, int64_t) -> int64_t { return 1; });
            }));
        }
        if (std::memcmp(expected.data(), out.data(), size_t(ROWS[i] * TILES * TILE_ROWS) * sizeof(float))) return -1;
        if (wide_s > MARGIN * narrow_s) break;
    }
    return least;
}

int64_t measured_rows(Weight type, int64_t columns) {
    static std::atomic<int64_t> known[WEIGHT_TYPES][std::size(COLUMNS)];        // 0: not yet; else one more
    static std::mutex one_at_a_time;
    const int i = columns <= 1024 ? 0 : columns <= 4096 ? 1 : 2;
    std::atomic<int64_t>& rows = known[int(type)][i];
    if (!rows.load(std::memory_order_relaxed)) {
        const std::lock_guard<std::mutex> lock(one_at_a_time);
        if (!rows.load(std::memory_order_relaxed)) {
            const int64_t unit = file_columns(type), multiple = COLUMNS[i] / unit * unit;
            const int64_t least = measure_least_rows(type, multiple, wide_kernel(Amx::measured), narrow_kernels());
            if (least < 0) give_up_amx();
            rows.store(std::max<int64_t>(least, 0) + 1, std::memory_order_relaxed);
        }
    }
    return rows.load(std::memory_order_relaxed) - 1;
}

void measure_for(const Tiles& tiles) {
    if (chosen_amx() != Amx::measured) return;
    const int64_t count = tiles.places ? tile_count(tiles.rows) : 1;
    for (int64_t i = 0; i < count; i++) measured_rows(tiles.places ? tiles.places[i].type : tiles.type, tiles.columns);
}

}  // namespace dc
