// One call of a function: its rows, where they stand in their slots, and where every array lies.
#pragma once
#include <vector>
#include "team.h"

namespace graft {

struct Step;
typedef void (*Kernel)(const Step&, const int32_t* arguments, int part);

// What Python hands over; all pointers outlive the call.
struct Call {
    int64_t rows, results, slots;
    const int64_t *sequences, *parents, *lengths, *wanted;
    const int64_t* sizes;        // of each state: its capacity, and the pages that a kv head may have
    void* const* addresses;      // arrays, weights and states, by number
    const int32_t* schedule;     // for each kernel to run: its number, and where its arguments start
    const int32_t* arguments;
    int64_t first, last;         // the part of the schedule to run
    double* seconds;             // if any: for each kernel of the schedule, what it took is added
    int64_t* skips;              // if any: for each guard that is counted, what `tally` adds
};

struct Step {
    const Call& call;
    const Kernel* kernels;
    int parts;                      // that the work of every kernel is cut into
    std::vector<int32_t> place;     // where in its slot a row is written
    std::vector<int32_t> plain;     // so many tokens of the row's text stand at the places of their positions
    std::vector<int32_t> position;  // of the row in its text
    std::vector<int32_t> path_start, path;  // the places of those behind `plain`, row after row

    Step(const Call& call, const Kernel* kernels, int parts) : call(call), kernels(kernels), parts(parts) {
        const int64_t rows = call.rows;
        place.resize(rows), plain.resize(rows), position.resize(rows), path_start.resize(rows + 1);
        for (int64_t row = 0; row < rows; ++row) lay_out(row);
    }

    template <class T> T* array(int32_t number) const { return (T*)call.addresses[number]; }
    int64_t capacity(int32_t state) const { return call.sizes[2 * state]; }
    int64_t pages(int32_t state) const { return call.sizes[2 * state + 1]; }
    int64_t count(char rows) const { return rows == 'R' ? call.results : call.rows; }
    // Whether the mask of some row is as wanted. The first part of the kernel that counts for its guard, the others having
    // -1 in the place of its number, adds this call to what is known of it.
    bool any(const float* mask, char rows, bool wanted, int32_t guard, int part) const {
        if (guard >= 0 && part == 0 && call.skips) tally(call.skips + 4 * guard, mask, count(rows), wanted);
        for (int64_t row = 0; row < count(rows); ++row)
            if ((mask[row] != 0) == wanted) return true;
        return false;
    }

  private:
    // Calls, calls that no row needed, rows, rows that did not need it.
    static void tally(int64_t* counts, const float* mask, int64_t rows, bool wanted) {
        int64_t skipped = 0;
        for (int64_t row = 0; row < rows; ++row) skipped += (mask[row] != 0) != wanted;
        counts[0] += 1, counts[1] += skipped == rows, counts[2] += rows, counts[3] += skipped;
    }

    void lay_out(int64_t row) {
        const int64_t slot = call.sequences[row], parent = call.parents[row];
        const bool first = row == 0 || call.sequences[row - 1] != slot;
        const int32_t length = int32_t(call.lengths[slot]);
        place[row] = first ? length : place[row - 1] + 1;
        position[row] = parent < 0 ? length : position[parent] + 1;
        plain[row] = parent < 0 ? length : plain[parent];
        path_start[row] = int32_t(path.size());
        if (plain[row] == position[row] && place[row] == position[row]) {
            ++plain[row];
        } else {
            if (parent >= 0)
                for (int32_t i = path_start[parent]; i < path_start[parent + 1]; ++i) path.push_back(path[i]);
            path.push_back(place[row]);
        }
        path_start[row + 1] = int32_t(path.size());
    }
};

// One of so many parts of `count` equal pieces of work.
struct Share {
    int64_t first, last;
    Share(int64_t count, int part, int parts) : first(count * part / parts), last(count * (part + 1) / parts) {}
};

// How far a kernel has got.
struct Progress { Shared taken, done; };

// Threads take parts of a kernel as they come, and go on to the next when all parts are done.
inline void run(Team& team, const Call& call, const Kernel* kernels) {
    const Step step(call, kernels, team.size);
    const int64_t count = step.call.last - step.call.first;
    Progress* const progress = new Progress[count];
    double* const seconds = step.call.seconds;
    double before = seconds ? seconds_now() : 0;
    team.run([&] {
        for (int64_t i = 0; i < count; ++i) {
            const int32_t* entry = step.call.schedule + 2 * (step.call.first + i);
            Progress& kernel = progress[i];
            uint32_t part = 0;
            while (kernel.taken.read() < uint32_t(step.parts) && (part = kernel.taken.add(1)) < uint32_t(step.parts)) {
                step.kernels[entry[0]](step, step.call.arguments + entry[1], int(part));
                const bool last = kernel.done.add(1) + 1 == uint32_t(step.parts);
                if (last && seconds) {
                    const double now = seconds_now();
                    seconds[step.call.first + i] += now - before;
                    before = now;
                }
            }
            for (int spins = 0; kernel.done.read() < uint32_t(step.parts); ++spins) pause(spins);
        }
    });
    delete[] progress;
}

}  // namespace graft
