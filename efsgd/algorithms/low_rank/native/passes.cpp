// The passes over memory of one step of PowerSGD, over the matrices of many parameters in one call.
//
// Source: Vogels, Karimireddy, Jaggi: "PowerSGD: Practical Low-Rank Gradient Compression for
// Distributed Optimization", NeurIPS 2019, arXiv 1905.13727. Lines are those of Algorithms 1 and 2.
//
// Legend, as in powersgd.py. Matrices of one shape are a batch, and lie one after the other:
//
//     D   [n, m]   Δ_w = e_w + g_w, later the next errors
//     Q   [R, m]   the paper's Q, transposed; R is the rank, fixed when this is compiled
//     P   [n, R]   with any strides; P̂ where its columns are orthonormal
//     x   [n, m]   the parameter, and w its momentum m
//
// Python is the specification; tests hold this against it. Results have the same bits on every
// machine, whatever compiler made the code and however many threads run it: how a number is summed
// up depends on its place in the matrix alone, and each fused multiplication and addition is
// spelled out; the compiler must not make others (-ffp-contract=off).
//
// Plain C functions without headers of torch: they compile in seconds, and serve every version.
#include <pthread.h>

#include "columns.h"

static const int R = RANK;
static const Int ROWS_OF_A_SUM = 512, COLUMNS_OF_A_SUM = 4096;  // sums of more are sums of sums
static const Int FLOATS_OF_A_THREAD = 1 << 17;  // fewer are not worth starting one for
static const Int MOST_THREADS = 256;

// The same columns of the rows to come: rows are too short for the processor to see it coming.
#define FETCH(place, floats) __builtin_prefetch((place) + (floats), 0, 2)

// ---- What Python hands over: structures of the same names there ---------------------------------

struct Batch {
  Int count, n, m, p_matrix, p_row, p_column;  // strides of P; D and Q are contiguous
  float *d;
  const float *e;       // null where there are no errors
  float *p, *q, *own;   // the last: line 6 sums here, and leaves Q in both
  void *const *g;       // of each matrix its gradient,
  void *const *x;       // its parameter, null to leave it out,
  void *const *w;       // and its momentum, null where there is none
  const Int *is_half;   // whether these three are of bfloat16
};
struct Rule {  // u = c P̂Q + decay x; w = lambda w + a u; x -= lr (u + t w)
  float c, decay, lambda, a, t, lr;
  int32_t begins;  // w = u, as there was none before
  int32_t mixes;   // otherwise x -= lr w, where w is u if there is no momentum
  int32_t writes;  // x = u is all
};

// ---- The passes: `run` takes B rows of matrix k, from row i on ----------------------------------

template <int B> struct Left {  // these rows of P, times a number
  float p[B][R];
  Left(const Batch &a, Int k, Int i, float c = 1) {
    const float *from = a.p + k * a.p_matrix + i * a.p_row;
    for (int b = 0; b < B; b++)
      for (int s = 0; s < R; s++) p[b][s] = c * from[b * a.p_row + s * a.p_column];
  }
  Floats times(const Floats (&q)[R], int b) const {
    Floats t = _mm256_mul_ps(_mm256_set1_ps(p[b][0]), q[0]);
    for (int s = 1; s < R; s++) t = _mm256_fmadd_ps(_mm256_set1_ps(p[b][s]), q[s], t);
    return t;
  }
};

// Algorithm 2, line 7, with Algorithm 1, line 3: D = e + scale g, P = D Q.
template <class Gradient> struct AddAndProject {
  static const int ROWS = 2;
  float scale;
  template <int B> void run(const Batch &a, Int k, Int i) const {
    const Int m = a.m, at = (k * a.n + i) * m;
    const Gradient *g = (const Gradient *)a.g[k] + i * m;
    const float *e = a.e ? a.e + at : 0, *q = a.q + k * R * m;
    float *d = a.d + at, *p = a.p + k * a.p_matrix + i * a.p_row, total[B][R] = {};
    const Floats factor = _mm256_set1_ps(scale);
    for (Int j = 0; j < m; j += COLUMNS_OF_A_SUM) {
      Floats own[B][R];
      for (int b = 0; b < B; b++)
        for (int s = 0; s < R; s++) own[b][s] = _mm256_setzero_ps();
      for_columns(j, least(m, j + COLUMNS_OF_A_SUM), [&](Int j, auto io) {
        Floats right[R];
        for (int s = 0; s < R; s++) right[s] = io.get(q + s * m + j);
        for (int b = 0; b < B; b++) {
          const Int here = b * m + j;
          Floats t = io.get(g + here);
          t = e ? _mm256_fmadd_ps(factor, t, io.get(e + here)) : _mm256_mul_ps(factor, t);
          io.put(d + here, t);
          FETCH(g + here, B * m), FETCH(d + here, B * m);
          if (e) FETCH(e + here, B * m);
          for (int s = 0; s < R; s++) own[b][s] = _mm256_fmadd_ps(t, right[s], own[b][s]);
        }
      });
      for (int b = 0; b < B; b++)
        for (int s = 0; s < R; s++) total[b][s] += sum(own[b][s]);
    }
    for (int b = 0; b < B; b++)
      for (int s = 0; s < R; s++) p[b * a.p_row + s * a.p_column] = total[b][s];
  }
};

// Algorithm 1, line 6: Q = P̂ᵀ D; of some columns, by sums over some rows at a time.
struct BackProject {
  static const int ROWS = R <= 4 ? 8 : 4;
  static void columns(const Batch &a, Int k, Int j, Int end) {
    for (Int i = 0; i < a.n; i += ROWS_OF_A_SUM) {
      const Int last = least(a.n, i + ROWS_OF_A_SUM);
      Int row = i;
      for (; row + ROWS <= last; row += ROWS) run<ROWS>(a, k, row, j, end, row == i);
      for (; row < last; row++) run<1>(a, k, row, j, end, row == i);
      for (Int row = k * R; row < (k + 1) * R; row++)
        for_columns(row * a.m + j, row * a.m + end, [&](Int at, auto io) {
          Floats q = io.get(a.own + at);
          if (i) q = _mm256_add_ps(io.get(a.q + at), q);
          io.put(a.q + at, q);
          if (last == a.n) io.put(a.own + at, q);
        });
    }
  }
  template <int B>
  static void run(const Batch &a, Int k, Int i, Int j, Int end, bool is_first) {
    const float *d = a.d + (k * a.n + i) * a.m;
    float *own = a.own + k * R * a.m;
    const Int m = a.m;
    const Left<B> left(a, k, i);
    for_columns(j, end, [&](Int j, auto io) {
      Floats t[B];
      for (int b = 0; b < B; b++) t[b] = io.get(d + b * m + j), FETCH(d + b * m + j, B * m);
      for (int s = 0; s < R; s++) {
        Floats q = is_first ? _mm256_setzero_ps() : io.get(own + s * m + j);
        for (int b = 0; b < B; b++) q = _mm256_fmadd_ps(_mm256_set1_ps(left.p[b][s]), t[b], q);
        io.put(own + s * m + j, q);
      }
    });
  }
};

// Algorithm 2, line 9: D -= P̂ Q.
struct Subtract {
  static const int ROWS = R <= 4 ? 8 : 4;
  template <int B> void run(const Batch &a, Int k, Int i) const {
    const Int m = a.m;
    const float *q = a.q + k * R * m;
    float *d = a.d + (k * a.n + i) * m;
    const Left<B> left(a, k, i);
    for_columns(0, m, [&](Int j, auto io) {
      Floats right[R];
      for (int s = 0; s < R; s++) right[s] = io.get(q + s * m + j);
      for (int b = 0; b < B; b++) {
        float *to = d + b * m + j;
        io.put(to, _mm256_sub_ps(io.get(to), left.times(right, b)));
        FETCH(to, B * m);
      }
    });
  }
};

// Algorithm 2, lines 11 to 13, and torch.optim.SGD's rule: see `Rule`.
template <class Number> struct Descend {
  static const int ROWS = 4;
  Rule o;
  template <int B> void run(const Batch &a, Int k, Int i) const {
    const Int m = a.m;
    const float *q = a.q + k * R * m;
    Number *x = (Number *)a.x[k] + i * m, *w = a.w[k] ? (Number *)a.w[k] + i * m : 0;
    const Left<B> left(a, k, i, o.c);
    const Floats decay = _mm256_set1_ps(o.decay), lambda = _mm256_set1_ps(o.lambda);
    const Floats some = _mm256_set1_ps(o.a), mix = _mm256_set1_ps(o.t), lr = _mm256_set1_ps(o.lr);
    for_columns(0, m, [&](Int j, auto io) {
      Floats right[R];
      for (int s = 0; s < R; s++) right[s] = io.get(q + s * m + j);
      for (int b = 0; b < B; b++) {
        Number *to = x + b * m + j;
        Floats u = left.times(right, b);
        FETCH(to, B * m);
        if (o.writes) {
          io.put(to, u);
          continue;
        }
        const Floats y = io.get(to);
        if (o.decay != 0) u = _mm256_fmadd_ps(decay, y, u);
        Floats v = u;
        if (w) {
          Number *momentum = w + b * m + j;
          FETCH(momentum, B * m);
          if (!o.begins) v = _mm256_fmadd_ps(some, u, _mm256_mul_ps(lambda, io.get(momentum)));
          io.put(momentum, v);
          v = as_kept(v, momentum);
        }
        if (o.mixes) v = _mm256_fmadd_ps(mix, v, u);
        io.put(to, _mm256_fnmadd_ps(lr, v, y));
      }
    });
  }
};

// ---- All matrices, by several threads -----------------------------------------------------------

template <class Work> struct Share {
  const Work *work;
  Int number;
  pthread_t thread;
  bool is_started;
  static void *run(void *share) {
    (*((Share *)share)->work)(((Share *)share)->number);
    return 0;
  }
};
// Rows of all matrices, or columns, are shared out: range(batch, matrix, first, end). Threads live
// for one call, so that nothing is left that a fork could break. Sixteen columns are a cache line.
template <bool ByColumns, class Range>
static void share_out(const Batch *a, Int count, Int threads, const Range &range) {
  Int floats = 0;
  for (Int c = 0; c < count; c++) floats += a[c].count * a[c].n * a[c].m;
  threads = least(least(threads, MOST_THREADS), floats / FLOATS_OF_A_THREAD);
  if (threads < 1) threads = 1;
  const auto work = [&](Int number) {
    const Int low = floats / threads * number;
    const Int high = number + 1 < threads ? low + floats / threads : floats;
    Int at = 0;
    for (Int c = 0; c < count; c++) {
      const Int step = ByColumns ? 16 : 1, length = ByColumns ? a[c].m : a[c].n;
      const Int each = step * (ByColumns ? a[c].n : a[c].m);
      for (Int k = 0; k < a[c].count; k++, at += a[c].n * a[c].m) {
        const Int first = low <= at ? 0 : least(length, (low - at + each - 1) / each * step);
        const Int end = high <= at ? 0 : least(length, (high - at + each - 1) / each * step);
        if (first < end) range(a[c], k, first, end);
      }
    }
  };
  Share<decltype(work)> shares[MOST_THREADS];
  for (Int t = 1; t < threads; t++) {
    shares[t].work = &work, shares[t].number = t;
    shares[t].is_started = !pthread_create(&shares[t].thread, 0, shares[t].run, &shares[t]);
  }
  work(0);
  for (Int t = 1; t < threads; t++) {
    if (shares[t].is_started) pthread_join(shares[t].thread, 0);
    else work(t);
  }
}
template <class Pass> static void by_rows(const Pass &pass, const Batch &a, Int k, Int i, Int end) {
  for (; i + Pass::ROWS <= end; i += Pass::ROWS) pass.template run<Pass::ROWS>(a, k, i);
  for (; i < end; i++) pass.template run<1>(a, k, i);
}

#pragma GCC visibility push(default)
extern "C" {
void add_and_project(const Batch *a, Int count, Int threads, float scale) {
  share_out<false>(a, count, threads, [=](const Batch &a, Int k, Int i, Int end) {
    if (a.is_half[k]) by_rows(AddAndProject<Half>{scale}, a, k, i, end);
    else by_rows(AddAndProject<float>{scale}, a, k, i, end);
  });
}
void back_project(const Batch *a, Int count, Int threads) {
  share_out<true>(a, count, threads, BackProject::columns);
}
void subtract(const Batch *a, Int count, Int threads) {
  share_out<false>(a, count, threads, [](const Batch &a, Int k, Int i, Int end) {
    by_rows(Subtract(), a, k, i, end);
  });
}
void descend(const Batch *a, Int count, Int threads, const Rule *rule) {
  share_out<false>(a, count, threads, [=](const Batch &a, Int k, Int i, Int end) {
    if (a.x[k] && a.is_half[k]) by_rows(Descend<Half>{*rule}, a, k, i, end);
    else if (a.x[k]) by_rows(Descend<float>{*rule}, a, k, i, end);
  });
}
}
