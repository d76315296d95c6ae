// Sums over the places (row, oh, ow) of each of several leaves, as a weight's gradient is one: a
// leaf is cut into chunks by its own rows and the shape, and chunks are added in their order, so
// that a leaf's sum has the bits that it has alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/launch.h"
#include "worker/device/kernel_types.h"

namespace lockstep::device::cuda {

struct Chunks {
  int count = 0;                   // of leaves
  int64_t begin[kMostLeaves + 1];  // rows
  int places[kMostLeaves];         // of a chunk
};

// What a block of {tiles, chunks, leaves} sums: of its leaf, which begins at first_row and has
// `all` places, those from first to end. Counted in whole `unit`s of a chunk's places, of which a
// row has of_row.
struct OwnChunk {
  int leaf, chunk;
  int64_t first_row;
  int all, first, end;
  bool is_none;  // the leaf has fewer chunks
};
__device__ __forceinline__ OwnChunk ChunkOfBlock(const Chunks& chunks, int of_row, int unit = 1) {
  OwnChunk own;
  own.leaf = static_cast<int>(blockIdx.z);
  own.chunk = static_cast<int>(blockIdx.y);
  own.first_row = chunks.begin[own.leaf];
  own.all = static_cast<int>(chunks.begin[own.leaf + 1] - own.first_row) * of_row;
  const int places = unit == 1 ? chunks.places[own.leaf] : chunks.places[own.leaf] / unit;
  const int64_t first = int64_t{own.chunk} * places;
  own.is_none = own.chunk > 0 && first >= own.all;
  own.first = static_cast<int>(first);
  own.end = own.all - own.first < places ? own.all : own.first + places;
  return own;
}

// Memory for the sums of chunks.
struct PartialSums {
  float* memory;
  int64_t floats;
  int64_t floats_of_leaf;  // at most
};

// dw of each leaf, `stride` floats apart, = its chunks' sums, of `elements` each, that lie at
// partial + leaf * leaf_stride + chunk * elements.
void SumChunks(const Queue& q, const Chunks& chunks, int64_t out_places, int64_t elements,
               const float* partial, int64_t leaf_stride, float* dw, int64_t stride);

inline int64_t RoundUp(int64_t n, int64_t to) { return CeilDiv(n, to) * to; }

// Calls multiply(leaves, chunks of the longest of them, results, leaf_stride), which is to write
// the sum of each chunk at results + leaf * leaf_stride + chunk * elements, for as many leaves at
// once as the memory takes. A chunk has about `wanted` places, a multiple of `depth`.
template <class Multiply>
void SumOverPlaces(const Queue& q, const Leaves& leaves, int64_t out_places, int64_t wanted,
                   int64_t depth, int64_t elements, const PartialSums& partial, float* dw,
                   int64_t stride, Multiply multiply) {
  const int64_t most_chunks = std::clamp<int64_t>(partial.floats_of_leaf / elements, 1, 4096);
  const auto places_of = [&](int leaf) {
    return (leaves.begin[leaf + 1] - leaves.begin[leaf]) * out_places;
  };
  for (int first = 0; first < leaves.count;) {
    Chunks part;
    int64_t chunks = 1;
    part.begin[0] = leaves.begin[first];
    for (int leaf = first; leaf < leaves.count; ++leaf) {
      const int64_t places =
          RoundUp(std::max(wanted, CeilDiv(places_of(leaf), most_chunks)), depth);
      const int64_t more = std::max(chunks, CeilDiv(places_of(leaf), places));
      if (part.count > 0 && more > 1 && (part.count + 1) * more * elements > partial.floats) break;
      chunks = more;
      part.places[part.count] = static_cast<int>(places);
      part.begin[++part.count] = leaves.begin[leaf + 1];
    }
    float* const leaf_dw = dw + first * stride;
    if (chunks == 1) {
      multiply(part, uint32_t{1}, leaf_dw, stride);
    } else {
      multiply(part, static_cast<uint32_t>(chunks), partial.memory, chunks * elements);
      SumChunks(q, part, out_places, elements, partial.memory, chunks * elements, leaf_dw, stride);
    }
    first += part.count;
  }
}

}  // namespace lockstep::device::cuda
