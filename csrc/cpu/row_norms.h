// Norms of rows that are no smaller than the exact ones.
#pragma once

#include "lanes.h"
#include "rows.h"

namespace fastclip {

// norms[t] for rows first:last.
template <class T>
void row_norms(const Rows<T>& x, int64_t first, int64_t last, double* norms) {
  best([&](auto set) FASTCLIP_LAMBDA {
    for (int64_t t = first; t < last; ++t) norms[t] = square_above<decltype(set)>(x.row(t), x.columns);
    for (int64_t t = first; t < last; ++t) norms[t] = __builtin_sqrt(norms[t]);
  });
}

// norms[t] = sqrt(norms[t]) for rows first:last, from sums of squares in fp32 that are not below the exact ones where fp32 holds
// them; from the row where it does not.
template <class T>
void roots(const Rows<T>& x, int64_t first, int64_t last, double* norms) {
  best([&]() FASTCLIP_LAMBDA {
    bool fine = true;
    for (int64_t t = first; t < last; ++t) fine &= within_fp32(norms[t]);
    if (!fine)
      for (int64_t t = first; t < last; ++t)
        if (!within_fp32(norms[t])) norms[t] = square(x.row(t), x.columns) * (1 + 40 * 0x1p-24);
    for (int64_t t = first; t < last; ++t) norms[t] = __builtin_sqrt(norms[t]);
  });
}

}  // namespace fastclip
