// Pooling over NHWC, vectors over channels. Windows are walked in raster order.
#include "worker/device/cpu/kernels/kernel_functions.h"
#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {
namespace {

// The part of one output's window that lies inside the input, along one axis.
struct Window {
  int64_t origin;      // of place 0, may be outside
  int64_t begin, end;  // places inside
};

LOCKSTEP_SIMD Window WindowAt(int64_t output, int64_t size, const PoolShape& shape) {
  Window w;
  w.origin = output * shape.stride - shape.padding;
  w.begin = w.origin < 0 ? -w.origin : 0;
  w.end = size - w.origin < shape.kernel ? size - w.origin : shape.kernel;
  return w;
}

LOCKSTEP_SIMD int64_t OutSize(int64_t size, const PoolShape& shape) {
  return (size + 2 * shape.padding - shape.kernel) / shape.stride + 1;
}

LOCKSTEP_SIMD void Clear(int64_t n, float* x) {
  ForEachVector(n, [=](int64_t i, auto m) { Store(x + i, F16(0.0f), m); });
}

// Calls body(sample's first element of x, y row, y column, rows window, columns window) for every
// output in raster order.
template <class Body>
LOCKSTEP_SIMD void ForEachOutput(const PoolShape& shape, int64_t rows, Body body) {
  const int64_t out_height = OutSize(shape.height, shape), out_width = OutSize(shape.width, shape);
  int64_t output = 0;
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t sample = n * shape.height * shape.width * shape.channels;
    for (int64_t oh = 0; oh < out_height; ++oh) {
      const Window vertical = WindowAt(oh, shape.height, shape);
      for (int64_t ow = 0; ow < out_width; ++ow, ++output) {
        body(sample, output * shape.channels, vertical, WindowAt(ow, shape.width, shape));
      }
    }
  }
}

// The first element of a window's place.
LOCKSTEP_SIMD int64_t At(const PoolShape& shape, int64_t sample, const Window& vertical, int64_t kh,
                         const Window& horizontal, int64_t kw) {
  return sample + ((vertical.origin + kh) * shape.width + horizontal.origin + kw) * shape.channels;
}

}  // namespace

void MaxPoolForward(const PoolShape& shape, int64_t rows, const float* x, float* y,
                    uint8_t* argmax) {
  ForEachOutput(shape, rows, [&](int64_t sample, int64_t out, const Window& v, const Window& h) {
    ForEachVector(shape.channels, [&](int64_t c, auto m) {
      F16 best = Load(x + At(shape, sample, v, v.begin, h, h.begin) + c, m);
      I16 place(static_cast<int32_t>(v.begin * shape.kernel + h.begin));
      for (int64_t kh = v.begin; kh < v.end; ++kh) {
        for (int64_t kw = h.begin; kw < h.end; ++kw) {
          const F16 value = Load(x + At(shape, sample, v, kh, h, kw) + c, m);
          const Mask wins = Less(best, value) | IsNan(value);
          best = Select(wins, value, best);
          place = Select(wins, I16(static_cast<int32_t>(kh * shape.kernel + kw)), place);
        }
      }
      Store(y + out + c, best, m);
      StoreBytes(argmax + out + c, place, m);
    });
  });
}

void MaxPoolBackward(const PoolShape& shape, int64_t rows, const float* dy, const uint8_t* argmax,
                     float* dx) {
  Clear(rows * shape.height * shape.width * shape.channels, dx);
  ForEachOutput(shape, rows, [&](int64_t sample, int64_t out, const Window& v, const Window& h) {
    ForEachVector(shape.channels, [&](int64_t c, auto m) {
      const F16 gradient = Load(dy + out + c, m);
      const I16 winner = LoadBytes(argmax + out + c, m);
      for (int64_t kh = v.begin; kh < v.end; ++kh) {
        for (int64_t kw = h.begin; kw < h.end; ++kw) {
          float* to = dx + At(shape, sample, v, kh, h, kw) + c;
          const Mask won = Equal(winner, I16(static_cast<int32_t>(kh * shape.kernel + kw)));
          Store(to, Load(to, m) + Select(won, gradient, F16(0.0f)), m);
        }
      }
    });
  });
}

void AveragePoolForward(const PoolShape& shape, int64_t rows, const float* x, float* y) {
  const F16 share(1.0f / static_cast<float>(shape.kernel * shape.kernel));
  ForEachOutput(shape, rows, [&](int64_t sample, int64_t out, const Window& v, const Window& h) {
    ForEachVector(shape.channels, [&](int64_t c, auto m) {
      F16 sum(0.0f);
      for (int64_t kh = v.begin; kh < v.end; ++kh) {
        for (int64_t kw = h.begin; kw < h.end; ++kw) {
          sum = sum + Load(x + At(shape, sample, v, kh, h, kw) + c, m);
        }
      }
      Store(y + out + c, sum * share, m);
    });
  });
}

void AveragePoolBackward(const PoolShape& shape, int64_t rows, const float* dy, float* dx) {
  const F16 share(1.0f / static_cast<float>(shape.kernel * shape.kernel));
  Clear(rows * shape.height * shape.width * shape.channels, dx);
  ForEachOutput(shape, rows, [&](int64_t sample, int64_t out, const Window& v, const Window& h) {
    ForEachVector(shape.channels, [&](int64_t c, auto m) {
      const F16 gradient = Load(dy + out + c, m) * share;
      for (int64_t kh = v.begin; kh < v.end; ++kh) {
        for (int64_t kw = h.begin; kw < h.end; ++kw) {
          float* to = dx + At(shape, sample, v, kh, h, kw) + c;
          Store(to, Load(to, m) + gradient, m);
        }
      }
    });
  });
}

void GlobalAveragePoolForward(int64_t rows, int64_t spatial, int64_t channels, const float* x,
                              float* y) {
  const F16 share(1.0f / static_cast<float>(spatial));
  for (int64_t n = 0; n < rows; ++n) {
    float* out = y + n * channels;
    ColumnSums(spatial, channels, x + n * spatial * channels, out);
    ForEachVector(channels,
                  [=](int64_t c, auto m) { Store(out + c, Load(out + c, m) * share, m); });
  }
}

void GlobalAveragePoolBackward(int64_t rows, int64_t spatial, int64_t channels, const float* dy,
                               float* dx) {
  const F16 share(1.0f / static_cast<float>(spatial));
  for (int64_t n = 0; n < rows; ++n) {
    const float* from = dy + n * channels;
    for (int64_t s = 0; s < spatial; ++s, dx += channels) {
      ForEachVector(channels,
                    [=](int64_t c, auto m) { Store(dx + c, Load(from + c, m) * share, m); });
    }
  }
}

}  // namespace lockstep::device::LOCKSTEP_ISA
