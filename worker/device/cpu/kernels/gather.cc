// Samples of a data set: normalized, cropped, mirrored and cut out in one pass over the output.
// An element's bits are those of its own pixel, wherever it lies.
#include "worker/device/cpu/kernels/kernel_functions.h"
#include "worker/device/cpu/simd.h"

namespace lockstep::device::LOCKSTEP_ISA {
namespace {

constexpr int64_t kMostTabled = 16;

// Mean and scale of each channel; with few channels also in tables that repeat them, so that a
// vector that begins at channel c finds its lanes' values at c.
struct Scaling {
  int64_t channels;
  const float *mean, *inv_std;
  int64_t stride;  // from a vector's first channel to the next one's, modulo channels
  bool tabled;
  float means[kMostTabled + kLanes], scales[kMostTabled + kLanes];
};

// b / 255 as the division rounds it (so for each of the 256 values), in less than half its time:
// the product with the rounded reciprocal, and one correction by what is left.
template <class Lanes>
LOCKSTEP_SIMD F16 LoadElements(const uint8_t* p, Lanes m) {
  const F16 reciprocal(1.0f / 255.0f), byte = ToFloat(LoadBytes(p, m));
  const F16 quotient = byte * reciprocal;
  return Fma(Fma(quotient, F16(-255.0f), byte), reciprocal, quotient);
}
template <class Lanes>
LOCKSTEP_SIMD F16 LoadElements(const float* p, Lanes m) {
  return Load(p, m);
}

template <class T>
LOCKSTEP_SIMD void NormalizePixels(const Scaling& s, const T* in, int64_t pixels, float* out) {
  if (s.tabled) {
    int64_t channel = 0;
    ForEachVector(pixels * s.channels, [&](int64_t i, auto m) {
      const F16 centred = LoadElements(in + i, m) - Load(s.means + channel, All());
      Store(out + i, centred * Load(s.scales + channel, All()), m);
      channel += s.stride;
      if (channel >= s.channels) channel -= s.channels;
    });
    return;
  }
  for (int64_t pixel = 0; pixel < pixels; ++pixel, in += s.channels, out += s.channels) {
    ForEachVector(s.channels, [&](int64_t c, auto m) {
      Store(out + c, (LoadElements(in + c, m) - Load(s.mean + c, m)) * Load(s.inv_std + c, m), m);
    });
  }
}

// The same with the last pixel first.
template <class T>
LOCKSTEP_SIMD void MirrorPixels(const Scaling& s, const T* in, int64_t pixels, float* out) {
  constexpr int64_t kBlock = 512;
  T block[kBlock];
  const int64_t most = s.tabled ? kBlock / s.channels : 1;
  for (int64_t first = 0; first < pixels; first += most) {
    const int64_t count = pixels - first < most ? pixels - first : most;
    const T* from = in + (pixels - first - 1) * s.channels;
    if (!s.tabled) {
      NormalizePixels(s, from, 1, out + first * s.channels);
      continue;
    }
    T* to = block;
    for (int64_t pixel = 0; pixel < count; ++pixel, from -= s.channels) {
      for (int64_t c = 0; c < s.channels; ++c) *to++ = from[c];
    }
    NormalizePixels(s, block, count, out + first * s.channels);
  }
}

LOCKSTEP_SIMD void Clear(float* out, int64_t n) {
  ForEachVector(n, [&](int64_t i, auto m) { Store(out + i, F16(0.0f), m); });
}

template <class T>
void Gather(const SampleShape& shape, const T* sample, const SampleChange& change, const Scaling& s,
            float* out) {
  const int64_t height = shape.height, width = shape.width, channels = shape.channels;
  if (change.shift_y == 0 && change.shift_x == 0 && !change.flip) {
    NormalizePixels(s, sample, height * width, out);
  } else {
    // The columns of the crop that lie on the sample.
    const int64_t begin = change.shift_x < 0 ? -change.shift_x : 0;
    const int64_t end = change.shift_x > 0 ? width - change.shift_x : width;
    const int64_t left = change.flip ? width - end : begin;
    for (int64_t y = 0; y < height; ++y) {
      float* row = out + y * width * channels;
      const int64_t from = y + change.shift_y;
      if (from < 0 || from >= height) {
        Clear(row, width * channels);
        continue;
      }
      const T* in = sample + (from * width + begin + change.shift_x) * channels;
      Clear(row, left * channels);
      if (change.flip) {
        MirrorPixels(s, in, end - begin, row + left * channels);
      } else {
        NormalizePixels(s, in, end - begin, row + left * channels);
      }
      const int64_t right = left + end - begin;
      Clear(row + right * channels, (width - right) * channels);
    }
  }
  for (int64_t y = change.cut_top; y < change.cut_bottom; ++y) {
    Clear(out + (y * width + change.cut_left) * channels,
          (change.cut_right - change.cut_left) * channels);
  }
}

}  // namespace

void GatherSample(const SampleShape& shape, SampleType type, const void* sample,
                  const SampleChange& change, const float* mean, const float* inv_std, float* out) {
  Scaling s;
  s.channels = shape.channels;
  s.mean = mean;
  s.inv_std = inv_std;
  s.stride = kLanes % s.channels;
  s.tabled = shape.channels <= kMostTabled;
  for (int64_t i = 0, channel = 0; s.tabled && i < s.channels + kLanes; ++i) {
    s.means[i] = mean[channel];
    s.scales[i] = inv_std[channel];
    if (++channel == s.channels) channel = 0;
  }
  if (type == SampleType::kUint8) {
    Gather(shape, static_cast<const uint8_t*>(sample), change, s, out);
  } else {
    Gather(shape, static_cast<const float*>(sample), change, s, out);
  }
}

}  // namespace lockstep::device::LOCKSTEP_ISA
