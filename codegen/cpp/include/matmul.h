// Products of rows with packed weights.
//
// A parameter [out, in] is stored as panels of 32 outputs, read from front to back: for every input the 32 weights side
// by side; in bfloat16 for every two inputs 32 pairs. Every output of every row is one sum over the inputs in their
// order, whatever rows there are, so a row's results do not depend on its company.
#pragma once
#include "step.h"
#include "vec.h"

namespace graft {

constexpr int PANEL = 2 * LANES;

template <class W> constexpr int64_t panel_size(int64_t depth) { return PANEL * depth; }
template <> constexpr int64_t panel_size<bf16>(int64_t depth) { return PANEL * ((depth + 1) / 2 * 2); }

// Rows of one parameter, [start, end), whose results begin at `column` of the output; its input begins at `input` of a
// row of x.
struct Piece {
    const void* panels;
    const void* bias;
    int64_t start, end, column, input;
    int64_t first_panel() const { return start / PANEL; }
    int64_t count() const { return (end + PANEL - 1) / PANEL - first_panel(); }
};

#if defined(__AVX512F__)
constexpr int REGISTERS = 24;
#elif defined(__AVX2__)
constexpr int REGISTERS = 4;
#else
constexpr int REGISTERS = 2;
#endif
// Rows that share one pass over a panel: their sums stay in registers.
template <class C> constexpr int BLOCK = most<int>(1, REGISTERS / (2 * sizeof(C) / sizeof(float)));

template <class C, int R> struct Sums { vec<C> of[R][2]; };

// One more input, or pair of inputs, for the rows of a block.
template <int R, class W> INLINE void multiply(Sums<computing<W>, R>& sums, const W* panel, const W* x, int64_t stride) {
    const auto low = widen(panel), high = widen(panel + LANES);
    for (int row = 0; row < R; ++row) {
        const auto factor = load_one(x + row * stride);
        sums.of[row][0] = fma(factor, low, sums.of[row][0]);
        sums.of[row][1] = fma(factor, high, sums.of[row][1]);
    }
}

INLINE void multiply_pair(f32v& sum, u32v weights, uint32_t factors) {
#if defined(__AVX512BF16__)
    sum = (f32v)_mm512_dpbf16_ps((__m512)sum, bits<__m512bh>(weights), bits<__m512bh>(factors - u32v{}));
#else
    sum = fma(bits<f32v>(weights << 16), splat(bits<float>(factors << 16)), sum);
    sum = fma(bits<f32v>(weights & 0xffff0000), splat(bits<float>(factors & 0xffff0000)), sum);
#endif
}

template <int R> INLINE void multiply_pairs(Sums<float, R>& sums, const bf16* panel, const bf16* x, int64_t stride, int of) {
    u32v low, high;
    memcpy(&low, panel, sizeof low), memcpy(&high, panel + PANEL, sizeof high);
    for (int row = 0; row < R; ++row) {
        uint32_t factors = 0;
        if (of == 2) memcpy(&factors, x + row * stride, 4);
        else memcpy(&factors, x + row * stride, 2);
        multiply_pair(sums.of[row][0], low, factors);
        multiply_pair(sums.of[row][1], high, factors);
    }
}

// The panel after this one, brought nearer while this one is multiplied: so many bytes for every input.
struct Ahead { const char* from; int64_t step; };

template <class W, int R>
INLINE void accumulate(Sums<computing<W>, R>& sums, const W* panel, const W* x, int64_t stride, int64_t depth, Ahead ahead) {
    constexpr int64_t line = 64;
    if constexpr (std::is_same_v<W, bf16>) {
        for (int64_t k = 0; k + 1 < depth; k += 2, ahead.from += ahead.step * 2) {
            __builtin_prefetch(ahead.from, 0, 2);
            if (ahead.step * 2 > line) __builtin_prefetch(ahead.from + line, 0, 2);
            multiply_pairs<R>(sums, panel + k * PANEL, x + k, stride, 2);
        }
        if (depth % 2) multiply_pairs<R>(sums, panel + (depth - 1) * PANEL, x + depth - 1, stride, 1);
    } else {
        for (int64_t k = 0; k < depth; ++k, ahead.from += ahead.step) {
            for (int64_t at = 0; at < ahead.step; at += line) __builtin_prefetch(ahead.from + at, 0, 2);
            multiply<R>(sums, panel + k * PANEL, x + k, stride);
        }
    }
}

template <class O, class V> INLINE void store_lanes(O* out, V x, int64_t low, int64_t high) {
    if (low <= 0 && high >= LANES) store(out, x, Whole{});
    else
        for (int64_t lane = most<int64_t>(low, 0); lane < least<int64_t>(high, LANES); ++lane) narrow(x[lane], out[lane]);
}

template <class W, class O, int R>
void multiply_block(const W* panel, const W* x, int64_t stride, int64_t depth, const W* bias, O* out, int64_t out_stride,
                    int64_t low, int64_t high, Ahead ahead) {
    typedef computing<W> C;
    Sums<C, R> sums{};
    accumulate<W, R>(sums, panel, x, stride, depth, ahead);
    for (int half = 0; half < 2; ++half) {
        vec<C> offset{};
        const int64_t from = low - half * LANES, to = high - half * LANES;
        if (bias)
            for (int64_t lane = most<int64_t>(from, 0); lane < least<int64_t>(to, LANES); ++lane)
                offset[lane] = widen(bias[half * LANES + lane]);
        for (int row = 0; row < R; ++row) {
            const vec<C> sum = bias ? sums.of[row][half] + offset : sums.of[row][half];
            store_lanes(out + row * out_stride + half * LANES, sum, from, to);
        }
    }
}

// The same for a number of rows that is only known now.
template <class W, class O, int R = BLOCK<computing<W>>, class... Rest> void multiply_some(int64_t rows, Rest... rest) {
    if constexpr (R > 1) {
        if (rows < R) return multiply_some<W, O, R - 1>(rows, rest...);
    }
    multiply_block<W, O, R>(rest...);
}

// out [rows, out_stride] = x [rows, stride] times the pieces' weights, side by side; of each weight the `depth` columns
// from `column` on (an even number) of the `stored` that it has.
template <class W, class O>
void matmul(const Step& step, int part, int64_t rows, const W* x, int64_t stride, int64_t depth, O* out, int64_t out_stride,
            const Piece* pieces, int count, int64_t column = 0, int64_t stored = 0) {
    if (stored == 0) stored = depth;
    int64_t panels = 0;
    for (int i = 0; i < count; ++i) panels += pieces[i].count();
    const Share share(panels, part, step.parts);
    const int64_t blocks = (rows + BLOCK<computing<W>> - 1) / BLOCK<computing<W>>;
    int64_t done = 0;
    for (int i = 0; i < count; done += pieces[i].count(), ++i) {
        const Piece& piece = pieces[i];
        const W* bias = (const W*)piece.bias;
        for (int64_t at = most(share.first, done); at < least(share.last, done + piece.count()); ++at) {
            const int64_t number = piece.first_panel() + at - done, top = number * PANEL;
            const W* panel = (const W*)piece.panels + number * panel_size<W>(stored) + column * PANEL;
            const int64_t low = most(piece.start - top, int64_t(0)), high = least(piece.end - top, int64_t(PANEL));
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t first = rows * block / blocks, last = rows * (block + 1) / blocks;
                const char* next = (const char*)(panel + panel_size<W>(stored));
                const int64_t step = PANEL * sizeof(W) / blocks;
                multiply_some<W, O>(last - first, panel, x + first * stride + piece.input, stride, depth,
                                    bias ? bias + top : nullptr,
                                    out + first * out_stride + piece.column + top - piece.start, out_stride, low, high,
                                    Ahead{next + block * step * depth, step});
            }
        }
    }
}

// out [rows, depth] = the rows of a packed parameter that `index` names.
template <class W>
void gather_packed(const Step& step, int part, int64_t rows, const int64_t* index, int64_t stride, const W* panels,
                   int64_t depth, W* out) {
    for (Share share(rows, part, step.parts); share.first < share.last; ++share.first) {
        const int64_t row = index[share.first * stride];
        const W* panel = panels + row / PANEL * panel_size<W>(depth);
        const int64_t lane = row % PANEL;
        W* to = out + share.first * depth;
        for (int64_t k = 0; k < depth; ++k) {
            if constexpr (std::is_same_v<W, bf16>) to[k] = panel[k / 2 * 2 * PANEL + lane * 2 + k % 2];
            else to[k] = panel[k * PANEL + lane];
        }
    }
}

// The same from a parameter as it came, [.., depth].
template <class W>
void gather(const Step& step, int part, int64_t rows, const int64_t* index, int64_t stride, const W* table, int64_t depth, W* out) {
    for (Share share(rows, part, step.parts); share.first < share.last; ++share.first)
        memcpy(out + share.first * depth, table + index[share.first * stride] * depth, depth * sizeof(W));
}

}  // namespace graft
