// The best few of a row.
#pragma once
#include "team.h"
#include "vec.h"

namespace graft {

constexpr int MOST_BEST = 64;

// The best so far, best first; of equals the one that came first.
template <class T> struct Best {
    int size, held = 0;
    T values[MOST_BEST];
    int64_t ids[MOST_BEST];

    explicit Best(int size) : size(size) {}

    void take(T value, int64_t id) {
        if (held == size && !(value > values[size - 1])) return;
        int at = held < size ? held++ : size - 1;
        for (; at > 0 && value > values[at - 1]; --at) values[at] = values[at - 1], ids[at] = ids[at - 1];
        values[at] = value, ids[at] = id;
    }
};

// ids[0 .. size) of the best of `width` logits. NaN is better than nothing.
inline void best_of_row(const float* logits, int64_t width, int size, int64_t* ids) {
    Best<float> best(size);
    int64_t at = 0;
    for (; at < size; ++at) best.take(logits[at] == logits[at] ? logits[at] : -INFINITY, at);
    for (; at + LANES <= width; at += LANES) {
        // Nearly all of them are worse than the worst kept: one comparison for sixteen.
        const i32v better = widen(logits + at) > splat(best.values[size - 1]);
        if (!any(better)) continue;
        for (int lane = 0; lane < LANES; ++lane) best.take(logits[at + lane], at + lane);
    }
    for (; at < width; ++at) best.take(logits[at], at);
    memcpy(ids, best.ids, size * sizeof(int64_t));
}

inline void best_of_rows(Team& team, const float* logits, int64_t rows, int64_t width, int size, int64_t* ids) {
    Shared taken;
    team.run([&] {
        for (int64_t row; (row = taken.add(1)) < rows;)
            best_of_row(logits + row * width, width, size, ids + row * size);
    });
}

}  // namespace graft
