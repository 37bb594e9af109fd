// Products of slots with the weights of the experts that they chose, and the choice of a row's largest scores.
//
// A row has several slots, each with an expert. Slots of one expert stand together, whichever rows they are of, so that
// its panels are read once; what no slot chose is not read. Every output of a slot is one sum over the inputs in their
// order, so a slot's results do not depend on its company.
#pragma once
#include <vector>
#include "matmul.h"
#include "top.h"

namespace graft {

// Each expert's panels one behind the other, and biases [experts, outputs], if any.
template <class W> struct Experts {
    const W *panels, *bias;
    int64_t count, outputs, depth;
    int64_t each() const { return (outputs + PANEL - 1) / PANEL; }
    const W* panel(int64_t expert, int64_t number) const {
        return panels + (expert * each() + number) * panel_size<W>(depth);
    }
};

// What slots read and whom they chose; `step` elements lie between the inputs of a row's slots.
template <class W> struct Chosen {
    const W* x;
    int64_t stride, step;
    const int64_t* index;
    int64_t index_stride, slots;
    const W* input(int64_t slot) const { return x + slot / slots * stride + slot % slots * step; }
    int64_t expert(int64_t slot) const { return index[slot / slots * index_stride + slot % slots]; }
};

// Slots in the order of their experts; those that chose none are left out.
struct Grouped {
    std::vector<int32_t> start, slots;  // of expert e: slots[start[e]] .. slots[start[e + 1] - 1]

    template <class W> Grouped(const Chosen<W>& chosen, int64_t count, int64_t experts) : start(experts + 2), slots(count) {
        for (int64_t slot = 0; slot < count; ++slot)
            if (there(chosen.expert(slot), experts)) ++start[chosen.expert(slot) + 2];
        for (int64_t expert = 0; expert < experts; ++expert) start[expert + 2] += start[expert + 1];
        for (int64_t slot = 0; slot < count; ++slot)
            if (there(chosen.expert(slot), experts)) slots[start[chosen.expert(slot) + 1]++] = int32_t(slot);
    }

    int64_t size(int64_t expert) const { return start[expert + 1] - start[expert]; }
    static bool there(int64_t expert, int64_t experts) { return expert >= 0 && expert < experts; }
};

// A panel of an expert times some of its slots, whose inputs lie one behind the other.
template <class W, class O>
void multiply_chosen(const Experts<W>& experts, int64_t expert, int64_t number, const int32_t* slots, int64_t count,
                     const W* x, O* out, Ahead ahead) {
    const int64_t top = number * PANEL, high = least(experts.outputs - top, int64_t(PANEL));
    const W* bias = experts.bias ? experts.bias + expert * experts.outputs + top : nullptr;
    const W* panel = experts.panel(expert, number);
    if (count == 1) {
        O* to = out + slots[0] * experts.outputs + top;
        multiply_block<W, O, 1>(panel, x, experts.depth, experts.depth, bias, to, experts.outputs, 0, high, ahead);
        return;
    }
    O results[BLOCK<computing<W>> * PANEL];
    multiply_some<W, O>(count, panel, x, experts.depth, experts.depth, bias, results, int64_t(PANEL), int64_t(0), high, ahead);
    for (int64_t i = 0; i < count; ++i)
        memcpy(out + slots[i] * experts.outputs + top, results + i * PANEL, high * sizeof(O));
}

// out [rows, slots, outputs]; a slot that chose no expert gets zeros.
template <class W, class O>
void multiply_experts(const Step& step, int part, int64_t rows, const Experts<W>& experts, const Chosen<W>& chosen, O* out) {
    constexpr int64_t most_rows = BLOCK<computing<W>>;
    const int64_t count = rows * chosen.slots, each = experts.each();
    const Grouped grouped(chosen, count, experts.count);
    int64_t total = 0;
    for (int64_t expert = 0; expert < experts.count; ++expert)
        total += each * ((grouped.size(expert) + most_rows - 1) / most_rows);
    for (Share share(count, part, step.parts); share.first < share.last; ++share.first)
        if (!Grouped::there(chosen.expert(share.first), experts.count))
            memset((void*)(out + share.first * experts.outputs), 0, experts.outputs * sizeof(O));
    const Share share(total, part, step.parts);
    std::vector<W> inputs;
    int64_t done = 0, after = 0;
    for (int64_t expert = 0; expert < experts.count; ++expert) {
        const int64_t size = grouped.size(expert), blocks = (size + most_rows - 1) / most_rows;
        const int64_t from = most(share.first - done, int64_t(0)), to = least(share.last - done, each * blocks);
        done += each * blocks;
        if (from >= to) continue;
        const int32_t* slots = grouped.slots.data() + grouped.start[expert];
        const W* x = chosen.input(slots[0]);
        if (size > 1) {
            inputs.resize(size * experts.depth);
            for (int64_t i = 0; i < size; ++i)
                memcpy((void*)(inputs.data() + i * experts.depth), chosen.input(slots[i]), experts.depth * sizeof(W));
            x = inputs.data();
        }
        for (after = expert + 1; after < experts.count && grouped.size(after) == 0;) ++after;
        for (int64_t at = from; at < to; ++at) {
            const int64_t number = at / blocks, block = at % blocks;
            const int64_t first = size * block / blocks, last = size * (block + 1) / blocks;
            const W* next = number + 1 < each ? experts.panel(expert, number + 1) : experts.panel(after, 0);
            const int64_t bytes = PANEL * sizeof(W) / blocks;
            multiply_chosen(experts, expert, number, slots + first, last - first, x + first * experts.depth, out,
                            Ahead{(const char*)next + block * bytes * experts.depth, bytes});
        }
    }
}

// The `count` largest of every `width` elements, largest first, of equals the first; NaN is larger than any number.
// `values` and `ids`, where they are wanted, [rows, groups, count].
template <class W>
void largest(const Step& step, int part, int64_t rows, const W* x, int64_t stride, int64_t groups, int64_t width, int count,
             W* values, int64_t* ids) {
    for (Share share(rows, part, step.parts); share.first < share.last; ++share.first)
        for (int64_t group = 0; group < groups; ++group) {
            const W* from = x + share.first * stride + group * width;
            Best<computing<W>> best(count);
            for (int64_t at = 0; at < width; ++at) {
                const auto value = widen(from[at]);
                best.take(value == value ? value : INFINITY, at);
            }
            const int64_t to = (share.first * groups + group) * count;
            for (int i = 0; i < count; ++i) {
                if (values) values[to + i] = from[best.ids[i]];
                if (ids) ids[to + i] = best.ids[i];
            }
        }
}

}  // namespace graft
