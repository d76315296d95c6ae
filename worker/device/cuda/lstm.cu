// The cells of a step of an LSTM, a thread per unit.
#include "worker/device/cuda/divisor.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/lanes.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

constexpr int kThreads = 128;  // the arithmetic of a cell is long and its rows are few

__global__ void __launch_bounds__(kThreads)
    ForwardCells(uint32_t threads, int hidden, Divisor by_hidden, float* __restrict__ gates,
                 int64_t gates_row, const float* c_before, float* c, float* __restrict__ tanh_c,
                 int64_t state_row, float* __restrict__ h, int64_t h_row,
                 uint16_t* __restrict__ h16) {
  WaitForPrevious();
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= threads) return;
  uint32_t row = index;
  const uint32_t unit = by_hidden.TakeRemainder(row);
  float* const gate = gates + row * gates_row + unit;
  const int64_t state = row * state_row + unit;
  float i = gate[0], f = gate[hidden], g = gate[2 * hidden], o = gate[3 * hidden];
  const float before = c_before != nullptr ? c_before[state] : 0.0f;
  float cell, tanh_cell, output;
  LstmCell(i, f, g, o, before, cell, tanh_cell, output);
  gate[0] = i;
  gate[hidden] = f;
  gate[2 * hidden] = g;
  gate[3 * hidden] = o;
  c[state] = cell;
  tanh_c[state] = tanh_cell;
  h[row * h_row + unit] = output;
  if (h16 != nullptr) h16[index] = static_cast<uint16_t>(Bf16Of(output));
}

__global__ void __launch_bounds__(kThreads)
    BackwardCells(uint32_t threads, int hidden, Divisor by_hidden, float* __restrict__ gates,
                  int64_t gates_row, const float* __restrict__ c_before,
                  const float* __restrict__ tanh_c, int64_t state_row, const float* __restrict__ dh,
                  int64_t dh_row, const float* __restrict__ dh_after, bool last,
                  float* __restrict__ dc, uint16_t* __restrict__ gates16) {
  WaitForPrevious();
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= threads) return;
  uint32_t row = index;
  const uint32_t unit = by_hidden.TakeRemainder(row);
  const int64_t at = row * gates_row + unit, state = row * state_row + unit;
  float* const gate = gates + at;
  float i = gate[0], f = gate[hidden], g = gate[2 * hidden], o = gate[3 * hidden];
  const float before = c_before != nullptr ? c_before[state] : 0.0f;
  float gradient = dh != nullptr ? dh[row * dh_row + unit] : 0.0f;
  if (dh_after != nullptr) gradient = gradient + dh_after[index];
  float cell_gradient = last ? 0.0f : dc[index];
  LstmCellGradient(i, f, g, o, before, tanh_c[state], gradient, cell_gradient);
  gate[0] = i;
  gate[hidden] = f;
  gate[2 * hidden] = g;
  gate[3 * hidden] = o;
  dc[index] = cell_gradient;
  if (gates16 == nullptr) return;
  gates16[at] = static_cast<uint16_t>(Bf16Of(i));
  gates16[at + hidden] = static_cast<uint16_t>(Bf16Of(f));
  gates16[at + 2 * hidden] = static_cast<uint16_t>(Bf16Of(g));
  gates16[at + 3 * hidden] = static_cast<uint16_t>(Bf16Of(o));
}

}  // namespace

void LstmForwardStep(const Queue& q, int64_t rows, int64_t hidden, float* gates, int64_t gates_row,
                     const float* c_before, float* c, float* tanh_c, int64_t state_row, float* h,
                     int64_t h_row, uint16_t* h16) {
  const Divisor by_hidden(hidden);
  ForEachPart(rows, hidden, [&](int64_t first, int64_t count) {
    const auto threads = static_cast<uint32_t>(count * hidden);
    const int64_t state = first * state_row;
    Launch(q, dim3(static_cast<unsigned>(CeilDiv(threads, kThreads))), dim3(kThreads), 0,
           ForwardCells, threads, hidden, by_hidden, gates + first * gates_row, gates_row,
           c_before == nullptr ? nullptr : c_before + state, c + state, tanh_c + state, state_row,
           h + first * h_row, h_row, h16 == nullptr ? nullptr : h16 + first * hidden);
  });
}

void LstmBackwardStep(const Queue& q, int64_t rows, int64_t hidden, float* gates, int64_t gates_row,
                      const float* c_before, const float* tanh_c, int64_t state_row,
                      const float* dh, int64_t dh_row, const float* dh_after, bool last, float* dc,
                      uint16_t* gates16) {
  const Divisor by_hidden(hidden);
  ForEachPart(rows, hidden, [&](int64_t first, int64_t count) {
    const auto threads = static_cast<uint32_t>(count * hidden);
    const int64_t state = first * state_row, packed = first * hidden;
    Launch(q, dim3(static_cast<unsigned>(CeilDiv(threads, kThreads))), dim3(kThreads), 0,
           BackwardCells, threads, hidden, by_hidden, gates + first * gates_row, gates_row,
           c_before == nullptr ? nullptr : c_before + state, tanh_c + state, state_row,
           dh == nullptr ? nullptr : dh + first * dh_row, dh_row,
           dh_after == nullptr ? nullptr : dh_after + packed, last, dc + packed,
           gates16 == nullptr ? nullptr : gates16 + first * gates_row);
  });
}

}  // namespace lockstep::device::cuda
