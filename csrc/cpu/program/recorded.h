// What a recorded op holds: for each row of ops.def a struct with its fields, such as op::mix.
#pragma once

#include <cstdint>

#include "cpu/attention/attention.h"
#include "cpu/tiles/tiles.h"

namespace dc {

class Ranks;
struct Routing;

struct Rows {                           // a buffer of contiguous rows; a null address: there is no buffer
    float* at = nullptr;
    int64_t columns = 0;
    float* row(int64_t i) const { return at + i * columns; }
};

struct AnyOp {
    int index = 0;                      // in its program
    bool on_logit_rows = false;         // runs over the R rows that have logits, else over the T tokens
};

namespace op {
#define READS(name, columns) Rows name;
#define WRITES(name, columns) Rows name;
#define WEIGHTS(name, columns) const float* name = nullptr;
#define WEIGHTS_OR_NONE(name, columns) const float* name = nullptr;
#define STATES(name) float* name = nullptr;
#define FIELD(type, name) type name{};
#define OPTION(type, name, value) type name = value;
#define OP(name, runs, has, ...) struct name : AnyOp { __VA_ARGS__ };
#include "ops.def"
}  // namespace op

enum class OpKind {
#define OP(name, runs, has, ...) name,
#include "ops.def"
};
const char* name_of(OpKind kind);

// Does it keep a state of each sequence?
template <class T> inline constexpr bool keeps_states = false;
#define STATES(name) || true
#define OP(name, runs, has, ...) template <> inline constexpr bool keeps_states<op::name> = false __VA_ARGS__;
#include "ops.def"

}  // namespace dc
