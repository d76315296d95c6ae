// How fast products of small layers are, ours and the vendor's, for gpu_floor.
#pragma once

namespace lockstep::device::cuda {

// Prints a line of JSON for each product, `seconds` at most:
//   {"what": "small product", "name": "fp32 forward 128x784x500", "us": 4.1, "vendor_us": 17.3}
// of kernels that follow each other in a CUDA graph, as in a step. The vendor's in bf16 with the
// rounding of activations, which ours do on the way. Returns how many failed.
int PrintSmallProducts(double seconds);

}  // namespace lockstep::device::cuda
