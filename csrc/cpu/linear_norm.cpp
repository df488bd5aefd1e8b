// linear_norms, row_norm_products: per unit u, |W_u|^2 for W_u = sum_t g_t a_t^T, and sum_t |a_t||g_t|.
//
// a: [N, d], K times g: [N, p] fp32, fp64, bf16 or fp16, offsets: int32 or int64 [U + 1] -> fp64 [K, 2, U].
// Gram route: sum over pairs of rows of (a_s . a_t)(g_s . g_t), L^2 (d + p) FLOPs by symmetry, in tiles of rows that are
// squared and dropped; the products of a serve all g. Direct route: W_u in slices, 2 L d p FLOPs. Products go to the BLAS that
// torch carries, one thread a tile. docs/sensitivity.md says which precision suffices when, and why.
#include <cmath>
#include <string>

#include "unit_products.h"

namespace fastclip {
namespace {

constexpr double kRoundoff64 = 0x1p-53, kSmallestRow = 1e-15, kCancelling = 4;
// Beside larger rows, what underflows in another factor would matter: such a unit gets inf, and so no part in the sum.
template <class T>
constexpr double kLargestRow = std::is_same_v<T, double> ? 0x1p400 : 0x1p100;

template <class T>
std::vector<double> row_norms(const Rows<T>& x, int64_t rows) {
  std::vector<double> norms(rows);
  torch::stable::parallel_for(0, rows, 64, [&](int64_t first, int64_t last) {
    best([&]() FASTCLIP_LAMBDA {
      for (int64_t t = first; t < last; ++t) norms[t] = square_above(x.row(t), x.columns);
      for (int64_t t = first; t < last; ++t) norms[t] = __builtin_sqrt(norms[t]);
    });
  });
  return norms;
}

// The norms of one g, and what is yet to be done for them.
struct Job {
  std::vector<double> norms, lost;  // [N], and what tiny rows may lose, [U]
  double *squares, *spreads;        // [U]
  std::vector<bool> again, large;   // [U]: in fp64, and with a row beyond kLargestRow
};

// Whether fp32 has done: `error` bounds what the square is off by. Rows that do not cancel have spread^2 of at most `length`
// times the square, and are then far closer than the bound; those that do are not left to it.
bool enough(const Job& job, int64_t u, int64_t length, double error) {
  const double square = job.squares[u], spread = job.spreads[u];
  return std::isfinite(square) && error <= 2 * kNormSlack * square && spread * spread <= kCancelling * length * square &&
         job.lost[u] * job.lost[u] <= 1e-9 * square && square > 1e-30;
}

template <class T>
class Norms {
 public:
  Norms(const Rows<T>& a, const std::vector<Rows<T>>& g, const std::vector<int64_t>& bounds) : a(a), g(g), bounds(bounds) {
    for (const Rows<T>& x : g) columns += x.columns, widest = std::max(widest, x.columns);
  }

  void run(const std::string& route, double* out) {
    const int64_t units = bounds.size() - 1;
    bool one_by_one = true;
    for (int64_t u = 0; u < units; ++u) one_by_one &= length(u) == 0 || alone(u);
    const std::vector<double> a_norms = one_by_one ? std::vector<double>() : row_norms(a, bounds.back());
    for (size_t k = 0; k < g.size(); ++k) {
      jobs.push_back({one_by_one ? std::vector<double>() : row_norms(g[k], bounds.back()), std::vector<double>(units),
                      out + 2 * k * units, out + (2 * k + 1) * units, std::vector<bool>(units), std::vector<bool>(units)});
      spread(a_norms, jobs.back());
    }
    std::vector<int64_t> single, gram, direct;
    for (int64_t u = 0; u < units; ++u) {
      const int64_t rows = length(u);
      if (rows == 0) {
        continue;
      } else if (alone(u)) {
        single.push_back(u);
      } else if (route == "direct" || (route == "auto" && rows * (a.columns + columns) > 2 * a.columns * columns)) {
        direct.push_back(u);
      } else {
        gram.push_back(u);
      }
    }
    by_row(single);
    by_gram(gram);
    by_slices(direct);
    for (Job& job : jobs)
      for (int64_t u = 0; u < units; ++u)
        if (job.large[u]) job.squares[u] = HUGE_VAL;
  }

 private:
  int64_t length(int64_t u) const { return bounds[u + 1] - bounds[u]; }
  // A unit of one row; squares of fp64 rows may underflow on the way.
  bool alone(int64_t u) const { return length(u) == 1 && !std::is_same_v<T, double>; }
  Blocks blocks(int64_t u) const { return blocks_for(a.columns, widest, length(u)); }

  void spread(const std::vector<double>& a_norms, Job& job) const {
    for (size_t u = 0; u + 1 < bounds.size(); ++u) {
      job.squares[u] = job.spreads[u] = 0;
      if (alone(u)) continue;
      for (int64_t t = bounds[u]; t < bounds[u + 1]; ++t) {
        const double product = a_norms[t] * job.norms[t];
        job.spreads[u] += product;
        if (a_norms[t] < kSmallestRow || job.norms[t] < kSmallestRow) job.lost[u] += product;
        if (a_norms[t] > kLargestRow<T> || job.norms[t] > kLargestRow<T>) job.large[u] = true;
      }
    }
  }

  // Whether all products of rows are exactly 0.
  bool nothing(const Job& job, int64_t u) const { return job.spreads[u] == 0 && !std::is_same_v<T, double>; }

  std::vector<Tile> tiles(const std::vector<int64_t>& units) const {
    std::vector<Tile> list;
    for (int64_t u : units) {
      const int64_t step = length(u) <= 2 * kRows && !packed::faster() ? kFewRows : kRows;
      for (int64_t i = bounds[u]; i < bounds[u + 1]; i += step) list.push_back({u, i, std::min(i + step, bounds[u + 1]), bounds[u + 1]});
    }
    return list;
  }

  // |g_t a_t^T| = |a_t||g_t|.
  void by_row(const std::vector<int64_t>& units) {
    torch::stable::parallel_for(0, units.size(), 64, [&](int64_t first, int64_t last) {
      best([&]() FASTCLIP_LAMBDA {
        for (int64_t i = first; i < last; ++i) {
          const int64_t t = bounds[units[i]];
          const double left = square_near<8>(a.row(t), a.columns);
          for (size_t k = 0; k < g.size(); ++k) {
            const double right = square_near<8>(g[k].row(t), g[k].columns), both = left * right;
            constexpr double largest = kLargestRow<T> * kLargestRow<T>;
            jobs[k].squares[units[i]] = left > largest || right > largest ? HUGE_VAL : both;
            jobs[k].spreads[units[i]] = __builtin_sqrt(both) * (1 + 16 * 0x1p-24);  // not below the exact one
          }
        }
      });
    });
  }

  void by_gram(const std::vector<int64_t>& units) {
    std::vector<int64_t> narrow;
    for (int64_t u : units) {
      const bool wide = std::is_same_v<T, double> || blocks(u).terms * kRoundoff32 * length(u) > 2 * kNormSlack;
      bool any = false;
      for (Job& job : jobs) job.again[u] = wide && !nothing(job, u), any |= !nothing(job, u);
      if (!wide && any) narrow.push_back(u);
    }
    const std::vector<Tile> list = tiles(narrow);
    const int64_t few = capability() == Capability::kAvx512 && !by_tiles<T>() ? kFew : 16, longest = std::max(a.columns, widest);
    // A product is kFewChunk / 16 sums in each of 16 lanes, 4 levels above them, and its chunks: no more than blocks allow.
    const bool chunks_suffice = kFewChunk / 16 + 4 + (longest + kFewChunk - 1) / kFewChunk <= 128 + 16;
    const auto parts = over(list, [&](const Tile& tile, Scratch& s, double* to) {
      const Blocks how = blocks(tile.unit);
      const auto each = [&](const auto* left, const auto& right) {
        for (size_t k = 0; k < g.size(); ++k)
          if (!nothing(jobs[k], tile.unit)) to[k] = weigh(tile, left, right(g[k]));
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
    for (int64_t u : narrow)
      for (Job& job : jobs)
        job.again[u] =
            !nothing(job, u) && !enough(job, u, length(u), blocks(u).terms * kRoundoff32 * job.spreads[u] * job.spreads[u]);

    for (size_t k = 0; k < g.size(); ++k) {
      Job& job = jobs[k];
      std::vector<int64_t> again;
      for (int64_t u : units)
        if (job.again[u]) again.push_back(u), job.squares[u] = 0;
      const std::vector<Tile> rest = tiles(again);
      const auto exact = over(rest, [&](const Tile& tile, Scratch& s, double* to) {
        const double* left = products<double>(a, tile, s, s.left);
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
    for (size_t k = 0; k < g.size(); ++k) {
      Job& job = jobs[k];
      const auto pass = [&](auto zero, bool again) {
        std::vector<Slice> list;
        const int64_t longer = std::max(a.columns, g[k].columns), shorter = std::min(a.columns, g[k].columns);
        const int64_t step = std::clamp<int64_t>((longer / 4 + 15) / 16 * 16, 16, std::max<int64_t>(16, kSlice / shorter));
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
      pass(float{}, false);
      for (int64_t u : units) {
        // |W_u| itself is off by no more than `off`; its square by twice that, and half of it again, of it.
        const double off = (std::min(kSliceRows, length(u)) + kSliceGroup + 2) * kRoundoff32 * job.spreads[u];
        job.again[u] = !nothing(job, u) && !enough(job, u, length(u), 2 * off * std::sqrt(job.squares[u]) + off * off);
      }
      pass(double{}, true);
      for (int64_t u : units)
        if (job.again[u]) add_error(u);
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

// sum_t |a_t||g_t| a unit: the second of the parts alone.
Tensor row_norm_products(const Tensor& a, const Tensor& g, const Tensor& offsets) {
  const char* op = "row_norm_products";
  STD_TORCH_CHECK(a.dim() == 2 && g.dim() == 2 && a.size(0) == g.size(0), op, ": a must be [N, d] and g [N, p] with the same N");
  const auto bounds = bounds_of(op, offsets, a.size(0));
  const int64_t units = bounds.size() - 1, rows = bounds.back();
  const auto norms = [&](const Tensor& x) {
    std::vector<double> out;
    const Tensor dense = dense_rows(x, x.scalar_type());
    by_dtype(op, x.scalar_type(), [&](auto zero) { out = row_norms(rows_of<decltype(zero)>(dense), rows); });
    return out;
  };
  const std::vector<double> a_norms = norms(a), g_norms = norms(g);
  Tensor out = torch::stable::new_empty(a, {units}, ScalarType::Double);
  auto* to = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t u = 0; u < units; ++u) {
    to[u] = 0;
    for (int64_t t = bounds[u]; t < bounds[u + 1]; ++t) to[u] += a_norms[t] * g_norms[t];
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("linear_norms", TORCH_BOX(&linear_norms));
  m.impl("row_norm_products", TORCH_BOX(&row_norm_products));
}

}  // namespace fastclip
