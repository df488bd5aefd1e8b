// linear_norms: per unit u, |W_u|^2 for W_u = sum_t g_t a_t^T, and sum_t |a_t||g_t|.
//
// a: [N, d], K times g: [N, p] fp32, fp64, bf16 or fp16, offsets: int32 or int64 [U + 1] -> fp64 [K, 2, U].
// Gram route: sum over pairs of rows of (a_s . a_t)(g_s . g_t), L^2 (d + p) FLOPs by symmetry, in tiles of rows that are
// squared and dropped; the products of a serve all g, and those of a row with itself its norm. Direct route: W_u in slices, 2 L d p
// FLOPs. A thread does whole tiles and slices, by kernels of gram.h and narrow.h with AVX-512, else by the BLAS that torch
// carries. docs/sensitivity.md says which precision suffices when, and why.
#include <cmath>
#include <string>

#include "row_norms.h"
#include "unit_products.h"

namespace fastclip {
namespace {

constexpr double kCancelling = 4;
// Beside larger rows, what underflows in another factor would matter: such a unit gets inf, and so no part in the sum.
template <class T>
constexpr double kLargestRow = std::is_same_v<T, double> ? 0x1p400 : 0x1p100;

// A row above which no product with another such row loses more than half a rounding to what processors flush: 2^-126 a column.
inline double smallest_row(int64_t columns) { return std::sqrt(static_cast<double>(columns)) * 0x1p-50; }

// The norms of one g, and what is yet to be done for them.
struct Job {
  std::vector<double> norms, lost;  // [N], and what tiny rows may lose, [U]
  double *squares, *spreads;        // [U]
  std::vector<bool> again, large;   // [U]: in fp64, and with a row beyond kLargestRow
};

// Whether fp32 has done: `error` bounds what the square is off by, 2 lost spread what it is off by for tiny rows. Rows that do not
// cancel have spread^2 of at most `length` times the square, and are then far closer than the bound; those that do are not left to it.
bool enough(const Job& job, int64_t u, int64_t length, double error) {
  const double square = job.squares[u], spread = job.spreads[u];
  return std::isfinite(square) && error <= 2 * kNormSlack * square && spread * spread <= kCancelling * length * square &&
         2 * job.lost[u] * spread <= 1e-6 * square && square > 1e-30;
}

template <class T>
class Norms {
 public:
  Norms(const Rows<T>& a, const std::vector<Rows<T>>& g, const std::vector<int64_t>& bounds) : a(a), g(g), bounds(bounds) {
    for (const Rows<T>& x : g) columns += x.columns, widest = std::max(widest, x.columns);
  }

  void run(const std::string& route, double* out) {
    const int64_t units = bounds.size() - 1;
    std::vector<int64_t> single, gram, direct;
    for (int64_t u = 0; u < units; ++u) {
      const int64_t rows = length(u);
      if (rows == 0) {
        continue;
      } else if (rows == 1 && !std::is_same_v<T, double>) {  // squares of fp64 rows may underflow on the way
        single.push_back(u);
      } else if (route == "direct" || (route == "auto" && rows * (a.columns + columns) > 2 * a.columns * columns)) {
        direct.push_back(u);
      } else {
        gram.push_back(u);
      }
    }
    std::fill(out, out + 2 * units * g.size(), 0.0);
    const int64_t rows = gram.empty() && direct.empty() ? 0 : bounds.back();
    a_norms.resize(rows);
    for (size_t k = 0; k < g.size(); ++k)
      jobs.push_back({std::vector<double>(rows), std::vector<double>(units), out + 2 * k * units, out + (2 * k + 1) * units,
                      std::vector<bool>(units), std::vector<bool>(units)});
    by_row(single);
    by_gram(gram);
    by_slices(direct);
    for (Job& job : jobs)
      for (int64_t u = 0; u < units; ++u)
        if (job.large[u]) job.squares[u] = HUGE_VAL;
  }

 private:
  int64_t length(int64_t u) const { return bounds[u + 1] - bounds[u]; }
  Blocks blocks(int64_t u) const { return blocks_for(a.columns, widest, length(u)); }

  // Norms of these units' rows, from the rows.
  void measure(const Rows<T>& x, const std::vector<int64_t>& units, std::vector<double>& norms) const {
    const std::vector<Tile> list = tiles(units);
    over_tasks<Scratch>(list.size(), [&](int64_t i, Scratch&) { row_norms(x, list[i].i, list[i].j, norms.data()); });
  }

  // From products of a tile's rows with themselves.
  template <class To>
  void take_norms(const Rows<T>& x, const Tile& tile, const Products<To>& found, std::vector<double>& norms) const {
    for (int64_t t = tile.i; t < tile.j; ++t) norms[t] = found.data[(t - tile.i) * (found.stride + 1)] / (1 - found.off);
    roots(x, tile.i, tile.j, norms.data());
  }

  void spread(Job& job, const Rows<T>& x, const std::vector<int64_t>& units) const {
    const double smallest_left = smallest_row(a.columns), smallest_right = smallest_row(x.columns);
    for (int64_t u : units) {
      double sum = 0, lost = 0;
      bool large = false;
      for (int64_t t = bounds[u]; t < bounds[u + 1]; ++t) {
        const double left = a_norms[t], right = job.norms[t], product = left * right;
        sum += product;
        lost += left < smallest_left || right < smallest_right ? product : 0;
        large |= left > kLargestRow<T> || right > kLargestRow<T>;
      }
      job.spreads[u] = sum, job.lost[u] = lost, job.large[u] = large;
    }
  }

  // Whether all products of rows are exactly 0.
  bool nothing(const Job& job, int64_t u) const { return job.spreads[u] == 0 && !std::is_same_v<T, double>; }

  std::vector<Tile> tiles(const std::vector<int64_t>& units) const {
    std::vector<Tile> list;
    for (int64_t u : units) {
      const int64_t step = length(u) <= 2 * kRows && !packs_once<T>() ? kFewRows : kRows;
      for (int64_t i = bounds[u]; i < bounds[u + 1]; i += step) list.push_back({u, i, std::min(i + step, bounds[u + 1]), bounds[u + 1]});
    }
    return list;
  }

  // |g_t a_t^T| = |a_t||g_t|.
  void by_row(const std::vector<int64_t>& units) {
    torch::stable::parallel_for(0, units.size(), 64, [&](int64_t first, int64_t last) {
      best([&](auto set) FASTCLIP_LAMBDA {
        for (int64_t i = first; i < last; ++i) {
          const int64_t t = bounds[units[i]];
          const double left = square_near<8, decltype(set)>(a.row(t), a.columns);
          for (size_t k = 0; k < g.size(); ++k) {
            const double right = square_near<8, decltype(set)>(g[k].row(t), g[k].columns), both = left * right;
            constexpr double largest = kLargestRow<T> * kLargestRow<T>;
            jobs[k].squares[units[i]] = left > largest || right > largest ? HUGE_VAL : both;
            jobs[k].spreads[units[i]] = __builtin_sqrt(both) * (1 + 16 * 0x1p-24);  // not below the exact one
          }
        }
      });
    });
  }

  void by_gram(const std::vector<int64_t>& units) {
    std::vector<int64_t> narrow, wide;
    for (int64_t u : units)
      (std::is_same_v<T, double> || blocks(u).terms * kRoundoff32 * length(u) > 2 * kNormSlack ? wide : narrow).push_back(u);
    const std::vector<Tile> list = tiles(narrow);
    const int64_t few = capability() == Capability::kAvx512 && !by_tiles<T>() ? kFew : 16, longest = std::max(a.columns, widest);
    const bool chunks_suffice = few_terms(longest) <= 128 + 16;  // no more than blocks allow
    const auto parts = over(list, [&](const Tile& tile, Scratch& s, double* to) {
      const Blocks how = blocks(tile.unit);
      const auto each = [&](const auto& left, const auto& right) {
        take_norms(a, tile, left, a_norms);
        for (size_t k = 0; k < g.size(); ++k) {
          const auto found = right(g[k]);
          take_norms(g[k], tile, found, jobs[k].norms);
          to[k] = weigh(tile, left, found);
        }
      };
      if (tile.i == bounds[tile.unit] && tile.stop - tile.i <= few && (how.columns >= longest || chunks_suffice))
        each(few_products(a, tile, s.copy, s.tile), [&](const Rows<T>& x) { return few_products(x, tile, s.copy, s.other); });
      else if (how.columns >= longest)
        each(products<float>(a, tile, s, s.tile), [&](const Rows<T>& x) { return products<float>(x, tile, s, s.other); });
      else
        each(blocked_products(a, tile, how, s, s.left),
             [&](const Rows<T>& x) { return blocked_products(x, tile, how, s, s.right); });
    });
    add(list, parts);
    if (!wide.empty()) measure(a, wide, a_norms);
    for (size_t k = 0; k < g.size(); ++k) {
      Job& job = jobs[k];
      if (!wide.empty()) measure(g[k], wide, job.norms);
      spread(job, g[k], units);
      std::vector<int64_t> again;
      for (int64_t u : wide) job.again[u] = true;
      for (int64_t u : narrow)
        job.again[u] = !enough(job, u, length(u), blocks(u).terms * kRoundoff32 * job.spreads[u] * job.spreads[u]);
      for (int64_t u : units) {
        if (nothing(job, u)) job.again[u] = false;
        if (job.again[u]) again.push_back(u);
        if (job.again[u] || nothing(job, u)) job.squares[u] = 0;
      }
      const std::vector<Tile> rest = tiles(again);
      const auto exact = over(rest, [&](const Tile& tile, Scratch& s, double* to) {
        const auto left = products<double>(a, tile, s, s.left);
        to[k] = weigh(tile, left, products<double>(g[k], tile, s, s.right));
      });
      add(rest, exact);
      for (int64_t u : again) {
        const double terms = a.columns + g[k].columns + 2 * length(u) + 4;
        job.squares[u] += 4 * terms * kRoundoff64 * job.spreads[u] * job.spreads[u];
      }
    }
  }

  void by_slices(const std::vector<int64_t>& units) {
    if (units.empty()) return;
    bool measured = false;
    for (size_t k = 0; k < g.size(); ++k) {
      Job& job = jobs[k];
      const bool few = by_narrow(k);
      if (few) {
        one_pass(k, units);
      } else {
        measure(g[k], units, job.norms);
        if (!measured) measure(a, units, a_norms);
      }
      measured = true;
      spread(job, g[k], units);
      const auto pass = [&](auto zero, bool again) {
        std::vector<Slice> list;
        const int64_t longer = std::max(a.columns, g[k].columns), shorter = std::min(a.columns, g[k].columns);
        const int64_t slices = 2 * ((longer * shorter + 2 * kSlice - 1) / (2 * kSlice));
        const int64_t step = ((longer + slices - 1) / slices + 15) / 16 * 16;
        for (int64_t u : units) {
          if (nothing(job, u) || (again && !job.again[u])) continue;
          job.squares[u] = 0;
          for (int64_t c = 0; c < longer; c += step) list.push_back({u, c, std::min(c + step, longer)});
        }
        const auto parts = over(list, [&](const Slice& slice, Scratch& s, double* to) {
          to[k] = square_slice<decltype(zero)>(a, g[k], bounds[slice.unit], bounds[slice.unit + 1], slice, s);
        });
        add(list, parts);
      };
      // What fp64 may leave W_u off by is added to its norm.
      const auto add_error = [&](int64_t u) {
        const double off = (length(u) + 2) * kRoundoff64 * job.spreads[u], norm = std::sqrt(job.squares[u]) + off;
        job.squares[u] = norm * norm;
      };
      if (std::is_same_v<T, double>) {
        pass(double{}, false);
        for (int64_t u : units) add_error(u);
        continue;
      }
      if (!few) pass(float{}, false);
      for (int64_t u : units) {
        // |W_u| itself is off by no more than `off`; its square by twice that, and half of it again, of it.
        const int64_t rows = slice_rows(length(u)) + kSliceGroup;
        const double off = (std::min(rows, length(u) + kSliceGroup) + 2) * kRoundoff32 * job.spreads[u];
        job.again[u] = !nothing(job, u) && !enough(job, u, length(u), 2 * off * std::sqrt(job.squares[u]) + off * off);
        if (nothing(job, u)) job.squares[u] = 0;
      }
      pass(double{}, true);
      for (int64_t u : units)
        if (job.again[u]) add_error(u);
    }
  }

  bool by_narrow(size_t k) const {
    return narrow::faster() && !std::is_same_v<T, double> && std::min(a.columns, g[k].columns) <= narrow::kMost;
  }

  // Squares and the norms of both sides' rows where one side is narrow.
  void one_pass(size_t k, const std::vector<int64_t>& units) {
    if constexpr (!std::is_same_v<T, double>) {
      const bool wide_a = a.columns > g[k].columns;
      const Rows<T>&wide = wide_a ? a : g[k], &few = wide_a ? g[k] : a;
      std::vector<double>&norms = wide_a ? a_norms : jobs[k].norms, &few_norms = wide_a ? jobs[k].norms : a_norms;
      const int64_t step = narrow::columns_of(few.columns), pieces = (wide.columns + step - 1) / step, rows = bounds.back();
      std::vector<double> squares(pieces * rows);
      for (int64_t u : units) jobs[k].squares[u] = 0;
      std::vector<Slice> list;
      for (int64_t u : units)
        for (int64_t c = 0; c < wide.columns; c += step) list.push_back({u, c, std::min(c + step, wide.columns)});
      const auto parts = over(list, [&](const Slice& here, Scratch& s, double* to) {
        const int64_t start = bounds[here.unit], stop = bounds[here.unit + 1];
        double* own = &squares[here.first / step * rows];
        to[k] = narrow::square(few, wide, start, stop, here.first, here.last, slice_rows(stop - start), s.narrow, own);
        if (here.first == 0) row_norms(few, start, stop, few_norms.data());
      });
      add(list, parts);
      for (int64_t u : units) {
        const int64_t start = bounds[u], stop = bounds[u + 1];
        for (int64_t t = start; t < stop; ++t) norms[t] = squares[t];
        for (int64_t piece = 1; piece < pieces; ++piece)
          for (int64_t t = start; t < stop; ++t) norms[t] += squares[piece * rows + t];
        for (int64_t t = start; t < stop; ++t) norms[t] *= 1 + (step / 16 + 8) * kRoundoff32;
        roots(wide, start, stop, norms.data());
      }
    }
  }

  // work(task, scratch, [K] sums) of every task -> [tasks, K]
  template <class Task, class F>
  std::vector<double> over(const std::vector<Task>& tasks, const F& work) const {
    std::vector<double> results(tasks.size() * g.size());
    over_tasks<Scratch>(tasks.size(), [&](int64_t t, Scratch& s) { work(tasks[t], s, &results[t * g.size()]); });
    return results;
  }

  template <class Task>
  void add(const std::vector<Task>& tasks, const std::vector<double>& parts) {
    for (size_t t = 0; t < tasks.size(); ++t)
      for (size_t k = 0; k < g.size(); ++k) jobs[k].squares[tasks[t].unit] += parts[t * g.size() + k];
  }

  const Rows<T>& a;
  const std::vector<Rows<T>>& g;
  const std::vector<int64_t>& bounds;
  int64_t columns = 0, widest = 0;
  std::vector<double> a_norms;  // [N]
  std::vector<Job> jobs;
};

Tensor linear_norms(const Tensor& a_in, std::vector<Tensor> g_in, const Tensor& offsets_in, std::string route) {
  const char* op = "linear_norm";
  STD_TORCH_CHECK(!g_in.empty(), op, ": g must hold at least one tensor");
  ScalarType type = a_in.scalar_type();
  for (const Tensor& g : g_in) {
    STD_TORCH_CHECK(a_in.dim() == 2 && g.dim() == 2 && a_in.size(0) == g.size(0), op,
                    ": a must be [N, d] and g [N, p] with the same N");
    STD_TORCH_CHECK(a_in.size(1) > 0 && g.size(1) > 0, op, ": a and g must have columns");
    STD_TORCH_CHECK(a_in.size(1) < INT32_MAX && g.size(1) < INT32_MAX, op, ": more than 2^31 columns");
    type = common(type, g.scalar_type());
  }
  STD_TORCH_CHECK(route == "auto" || route == "gram" || route == "direct", op, ": unknown route ", route);
  const auto bounds = bounds_of(op, offsets_in, a_in.size(0));
  const int64_t units = bounds.size() - 1;
  Tensor out = torch::stable::new_empty(a_in, {static_cast<int64_t>(g_in.size()), 2, units}, ScalarType::Double);
  const Tensor a = dense_rows(a_in, type);
  for (Tensor& g : g_in) g = dense_rows(g, type);
  by_dtype(op, type, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Rows<T>> g;
    for (const Tensor& x : g_in) g.push_back(rows_of<T>(x));
    Norms<T>(rows_of<T>(a), g, bounds).run(route, static_cast<double*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclip, CPU, m) { m.impl("linear_norms", TORCH_BOX(&linear_norms)); }

}  // namespace fastclip
