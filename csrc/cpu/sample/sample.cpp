// op sample: the rows are shared out over the pool, and each goes to the path of the chosen instruction set.
#include "cpu/pool/pool.h"
#include "cpu/sample/scratch.h"
#include "ops.h"

namespace dc {

size_t sample_scratch_bytes(int64_t vocab) { return sampling::Scratch::bytes(vocab); }

void sample(const SampleArgs& args) {
    const auto row = DC_CHOSEN(sample_row);
    parallel_for(args.rows, [&](int64_t i) { row(args, i); });
}

}  // namespace dc
