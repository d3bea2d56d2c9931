// linear_grouped_forward and linear_grouped_backward: the products of a mixture's experts, each with its own rows.
//
// Layout of the work: a task is one expert, or where experts are few or uneven some columns of its result, and runs on
//     one thread through the functions for a single weight. Tasks are dealt out in turn, the longest first.
//
// Why: an expert has few rows (8 of 64 experts have one each when a token is decoded), so that a product alone ends
//     soon after its threads have been woken. Here they are woken once for all experts. A part of an expert computes
//     u or v again, r columns beside at least kLeast of its own.
#include <omp.h>

#include <algorithm>
#include <exception>
#include <vector>

#include "cpu/isa.h"
#include "grouped.h"

namespace qlk::cpu {
namespace {

struct Task {
    int64_t expert;
    int64_t begin, end;  // columns of the result; none: the gradients of the adapters
    double cost;
};

// Columns of a part: a multiple of kUnit (a panel in backward, and pieces of work in forward), and at least kLeast.
constexpr int64_t kUnit = 128, kLeast = 256;
// Decoding a weight takes as long as about this many multiplications.
constexpr int64_t kDecoding = 16;

// Cuts the experts that have rows, so that each of `threads` gets about four tasks or more.
std::vector<Task> tasks_of(const int64_t* offsets, int64_t experts, int64_t columns, int64_t depth, int threads) {
    const auto cost = [&](int64_t expert, int64_t width) {
        return static_cast<double>(width) * static_cast<double>(depth) *
               static_cast<double>(kDecoding + offsets[expert + 1] - offsets[expert]);
    };
    double all = 0;
    for (int64_t e = 0; e < experts; ++e) {
        if (offsets[e + 1] > offsets[e]) all += cost(e, columns);
    }
    const double most = threads > 1 ? all / (4.0 * threads) : all;
    std::vector<Task> tasks;
    for (int64_t e = 0; e < experts; ++e) {
        if (offsets[e + 1] == offsets[e]) continue;
        const int64_t parts = std::max<int64_t>(
            1, std::min<int64_t>(columns / kLeast, static_cast<int64_t>(cost(e, columns) / most + 0.5)));
        const int64_t width = ((columns + parts - 1) / parts + kUnit - 1) / kUnit * kUnit;
        for (int64_t begin = 0; begin < columns; begin += width) {
            const int64_t end = std::min(columns, begin + width);
            tasks.push_back({e, begin, end, cost(e, end - begin)});
        }
    }
    return tasks;
}

// Runs all tasks, the longest first, each on one thread; a single one on all threads. run(task, threads).
template <class Run>
void run_all(std::vector<Task>& tasks, int threads, const Run& run) {
    if (tasks.size() == 1) return run(tasks[0], threads);
    if (threads == 1) {
        for (const Task& task : tasks) run(task, 1);
        return;
    }
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
    // Scratch may not be had, and nothing may leave a team by an exception.
    std::exception_ptr failure;
    const int64_t count = static_cast<int64_t>(tasks.size());
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) {
        try {
            run(tasks[i], 1);
        } catch (...) {
#pragma omp critical(qlk_grouped_failure)
            if (!failure) failure = std::current_exception();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace

void grouped_forward(const GroupedForwardParams& all, const Kernels& kernels) {
    const WeightView& w = all.first.weight;
    const int threads = all.first.threads;
    std::vector<Task> tasks = tasks_of(all.offsets, all.experts, w.n, w.k, threads);
    run_all(tasks, threads, [&](const Task& task, int team) {
        LinearForwardParams p = expert_of(all, task.expert);
        p.threads = team;
        p.n_begin = task.begin;
        p.n_end = task.end;
        // Each part makes u for itself; one of them stores it.
        std::vector<char> u;
        if (p.r > 0 && task.begin > 0) {
            u.resize(static_cast<size_t>(bytes_of(p.m * p.r, p.dtype)));
            p.u = u.data();
        }
        kernels.linear_forward(p);
    });
}

void grouped_backward(const GroupedBackwardParams& all, const Kernels& kernels) {
    const WeightView& w = all.first.weight;
    const int threads = all.first.threads;
    std::vector<Task> tasks;
    if (all.first.dx) tasks = tasks_of(all.offsets, all.experts, w.k, w.n, threads);
    if (all.first.da || all.first.db) {
        for (int64_t e = 0; e < all.experts; ++e) {  // those without rows too: their gradients are zero
            const double rows = static_cast<double>(all.offsets[e + 1] - all.offsets[e]);
            tasks.push_back({e, 0, 0, (rows + 1) * static_cast<double>(all.first.r) * static_cast<double>(w.n + w.k)});
        }
    }
    run_all(tasks, threads, [&](const Task& task, int team) {
        LinearBackwardParams p = expert_of(all, task.expert);
        p.threads = team;
        if (task.end > 0) {
            p.da = p.db = nullptr;
            p.k_begin = task.begin;
            p.k_end = task.end;
        } else {
            p.dx = nullptr;
        }
        kernels.linear_backward(p);
    });
}

}  // namespace qlk::cpu
