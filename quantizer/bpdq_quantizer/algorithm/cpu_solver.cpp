/* The loops that quantizing spends its time in, compiled for the machine; grid.py, equations.py and refine.py say
   the same in torch and are what the tests compare with.

   Rows of a weight are independent of each other. A tile is as many rows as a register has lanes, and a group's tile
   stays in the nearest cache through all starts, k-means, iterations and fits:

               16 rows = one AVX-512 register
              .------.------.---   ---.------.
     input t  | row  | +1   |   ...   | +15  |      t = 0 .. g-1, one array for W, one for each V x plane, ...
              '------'------'---   ---'------'

   Products with [g, g] matrices take a block of inputs at once, whose sums stay in registers. Sums over inputs are in
   order, in fp32, so that no result depends on the number of threads or on a row's neighbours. */

#include "cpu_solver_descent.h"
#include "cpu_solver_equations.h"
#include "cpu_solver_groups.h"

template <class T>
struct Type {
  using type = T;
};

/* call(Type<Levels<k>>), or of Trellis<k>, for k planes that are multiplied. */
template <class Call>
void with_grid(int k, bool trellis, Call call) {
  if (k == 1) call(Type<Levels<1>>());
  else if (k == 2) trellis ? call(Type<Trellis<2>>()) : call(Type<Levels<2>>());
  else if (k == 3) trellis ? call(Type<Trellis<3>>()) : call(Type<Levels<3>>());
  else trellis ? call(Type<Trellis<4>>()) : call(Type<Levels<4>>());
}

extern "C" {

/* grid.quantize_group for W [g, N]; all arrays are contiguous. */
void bpdq_quantize_group(int g, int64_t N, int k, int trellis, const float* W, const float* spread, const float* whiten,
                         const float* ones, const float* weight, int iterations, float alpha, int dtype,
                         const int* starts, int count, uint8_t* codes, float* c, float* E) {
  const Group group{g, iterations, alpha, (Dtype)dtype, spread, whiten, ones, weight};
  with_grid(k, trellis, [&](auto grid) {
    quantize_group<typename decltype(grid)::type>(group, W, N, (const Start*)starts, count, codes, c, E);
  });
}

/* refine.descend for `sweeps` sweeps: codes [K, N] in place, gain [N]: by how much the loss falls; V [N, K]: the gradient
   H (W - W_hat) of the codes that come, H [K, K] symmetric, c [ceil(K/G), k+1, N]; all arrays are contiguous. */
void bpdq_descend(int group_size, int K, int64_t N, int k, int trellis, int sweeps, const float* V, const float* H,
                  const float* c, uint8_t* codes, float* gain) {
  std::fill(gain, gain + N, 0.0f);
  with_grid(k, trellis, [&](auto grid) {
    descend<typename decltype(grid)::type>(group_size, K, N, sweeps, V, H, c, codes, gain);
  });
}

/* equations.solve_jointly: c [n, N], and for int8 steps [k+1, N], from codes [K, N], the symmetric H [K, K] and b
   [n, N]; all are contiguous. */
void bpdq_solve_jointly(int group_size, int K, int64_t N, int k, const uint8_t* codes, const float* H, const float* b,
                        float alpha, int dtype, float* c, float* steps) {
  const auto run = k == 1 ? solve_jointly<1> : k == 2 ? solve_jointly<2> : k == 3 ? solve_jointly<3> : solve_jointly<4>;
  run(group_size, K, N, codes, H, b, alpha, (Dtype)dtype, c, steps);
}
}
