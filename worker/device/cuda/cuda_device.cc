#include "worker/device/cuda/cuda_device.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/device/cuda/blas.h"
#include "worker/device/cuda/cuda_conv2d.h"
#include "worker/device/cuda/cuda_dense.h"
#include "worker/device/cuda/cuda_lstm.h"
#include "worker/device/cuda/cuda_status.h"
#include "worker/device/cuda/cuda_stream.h"
#include "worker/device/cuda/dnn.h"
#include "worker/device/cuda/kernels.h"
#include "worker/device/cuda/own_products.h"
#include "worker/device/kernel_math.h"

namespace lockstep::device::cuda {
namespace {

class DeviceMemory : public Memory {
 public:
  DeviceMemory(void* data, size_t size) : data_(data), size_(size) {}
  ~DeviceMemory() override { cudaFree(data_); }
  void* data() override { return data_; }
  size_t size() const override { return size_; }

 private:
  void* const data_;
  const size_t size_;
};

class PinnedMemory : public Memory {
 public:
  PinnedMemory(void* data, size_t size) : data_(data), size_(size) {}
  ~PinnedMemory() override { cudaFreeHost(data_); }
  void* data() override { return data_; }
  size_t size() const override { return size_; }

 private:
  void* const data_;
  const size_t size_;
};

class Graph : public Recording {
 public:
  ~Graph() override {
    for (cudaGraphExec_t executable : executables_) cudaGraphExecDestroy(executable);
  }
  // `stream`: of the launches to come. Nothing is left for the first of them to allocate, which
  // might wait for other GPUs, whose steps wait for this one's.
  cudaError_t Instantiate(cudaGraph_t graph, cudaStream_t stream) {
    // A stream takes about 1,024 kernels that have not run; some are enqueued besides.
    constexpr size_t kMostCalls = 1000;
    size_t calls = 0;
    cudaError_t error = cudaGraphGetNodes(graph, nullptr, &calls);
    const auto ahead = static_cast<int>(kMostCalls / std::max<size_t>(calls, 1));
    most_ahead_ = std::clamp(ahead, kLeastAhead, kMostAhead);
    // Of one executable there is at most one launch at a time, for whose end the next may wait in
    // the driver: so each launch that may be ahead has its own, where there is memory for them.
    for (int i = 0; i < most_ahead_ && error == cudaSuccess; ++i) {
      cudaGraphExec_t executable = nullptr;
      error = cudaGraphInstantiate(&executable, graph, 0);
      if (error == cudaSuccess) error = cudaGraphUpload(executable, stream);
      if (error == cudaSuccess) {
        executables_.push_back(executable);
      } else if (executable != nullptr) {
        cudaGraphExecDestroy(executable);
      }
    }
    if (executables_.empty()) return error;
    if (error != cudaSuccess) cudaGetLastError();
    return cudaSuccess;
  }
  int most_ahead() const override { return most_ahead_; }
  void Replay(Stream& stream) override {
    static_cast<void>(cudaGraphLaunch(executables_[next_], QueueOf(stream).stream));
    next_ = (next_ + 1) % executables_.size();
  }

 private:
  std::vector<cudaGraphExec_t> executables_;  // launched in turn
  size_t next_ = 0;
  int most_ahead_ = kLeastAhead;
};

class CudaDevice : public Device {
 public:
  CudaDevice(int ordinal, std::string name, std::string fingerprint,
             std::shared_ptr<AlgorithmBook> book, std::unique_ptr<Blas> blas,
             std::unique_ptr<Dnn> dnn)
      : ordinal_(ordinal),
        name_(std::move(name)),
        fingerprint_(std::move(fingerprint)),
        book_(std::move(book)),
        blas_(std::move(blas)),
        dnn_(std::move(dnn)) {}

  std::string name() const override { return name_; }
  std::string fingerprint(Precision precision) const override {
    if (precision == Precision::kFp32) return fingerprint_;
    return absl::StrCat(fingerprint_, precision == Precision::kTf32 ? " tf32" : " bf16 stored");
  }
  bool host_addressable() const override { return false; }
  bool stores_bf16() const override { return true; }
  absl::StatusOr<std::unique_ptr<Stream>> MakeStream() override {
    return CudaStream::Make(ordinal_, kWorkspaceBytes);
  }
  absl::StatusOr<std::unique_ptr<Stream>> MakeCopyStream() override {
    return CudaStream::Make(ordinal_, 0);
  }
  absl::StatusOr<std::unique_ptr<Memory>> Allocate(size_t bytes) override {
    UseGpu(ordinal_);
    void* data = nullptr;
    cudaError_t error = cudaMalloc(&data, bytes);
    if (error != cudaSuccess) {
      cudaGetLastError();  // it does not break the context, and is not the next launch's
      const Room left = room();
      return ToStatus(
          error, absl::StrCat("allocating ", bytes, " bytes on ", name_, ", of which ", left.free,
                              " of ", left.total, " are free (nvidia-smi shows who has the rest)"));
    }
    auto memory = std::make_unique<DeviceMemory>(data, bytes);
    error = cudaMemset(data, 0, bytes);
    // It runs on a stream that ours do not wait for.
    if (error == cudaSuccess) error = cudaStreamSynchronize(cudaStreamLegacy);
    if (error != cudaSuccess) return ToStatus(error, "clearing memory");
    return memory;
  }
  Room room() override {
    UseGpu(ordinal_);
    Room room;
    if (cudaMemGetInfo(&room.free, &room.total) != cudaSuccess) return {};
    return room;
  }
  size_t stream_bytes() const override { return kWorkspaceBytes; }
  absl::Status Check() override {
    cudaError_t error = UseGpu(ordinal_);
    if (error == cudaSuccess) error = cudaStreamQuery(cudaStreamLegacy);
    if (error == cudaErrorNotReady) {
      cudaGetLastError();  // else it were the next wait's
      return absl::OkStatus();
    }
    if (error == cudaSuccess) return absl::OkStatus();
    return absl::InternalError(
        absl::StrCat(name_, " is lost: ", cudaGetErrorString(error), " (", cudaGetErrorName(error),
                     "); nvidia-smi and the kernel's log (dmesg, Xid) say whether it is broken"));
  }
  absl::StatusOr<std::unique_ptr<Memory>> AllocateHostVisible(size_t bytes) override {
    UseGpu(ordinal_);
    void* data = nullptr;
    const cudaError_t error = cudaHostAlloc(&data, bytes, cudaHostAllocPortable);
    if (error != cudaSuccess) {
      cudaGetLastError();
      return ToStatus(error, absl::StrCat("allocating ", bytes, " bytes of pinned host memory"));
    }
    std::memset(data, 0, bytes);
    return std::make_unique<PinnedMemory>(data, bytes);
  }
  absl::StatusOr<std::unique_ptr<Memory>> MakeResident(const void* data, size_t bytes,
                                                       size_t spare) override {
    UseGpu(ordinal_);
    size_t free = 0, total = 0;
    cudaError_t error = cudaMemGetInfo(&free, &total);
    if (error != cudaSuccess) return ToStatus(error, "asking for free memory");
    if (free <= spare || bytes > (free - spare) / 4) return nullptr;
    void* copy = nullptr;
    error = cudaMalloc(&copy, bytes);
    if (error != cudaSuccess) {
      cudaGetLastError();
      return nullptr;
    }
    auto memory = std::make_unique<DeviceMemory>(copy, bytes);
    error = cudaMemcpy(copy, data, bytes, cudaMemcpyDefault);
    if (error == cudaSuccess) error = cudaStreamSynchronize(cudaStreamLegacy);
    if (error != cudaSuccess) return ToStatus(error, "copying the data set to the device");
    return memory;
  }
  void Follow(Stream& behind, Stream& ahead) override {
    const cudaError_t error =
        static_cast<CudaStream&>(behind).Follow(static_cast<CudaStream&>(ahead));
    if (error == cudaSuccess) return;
    Fail(QueueOf(behind), std::string(ToStatus(error, "ordering streams").message()));
  }
  void Copy(Stream& stream, const void* from, void* to, size_t bytes) override {
    if (bytes == 0) return;
    static_cast<void>(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, QueueOf(stream).stream));
  }
  void Zero(Stream& stream, void* to, size_t bytes) override {
    if (bytes == 0) return;
    static_cast<void>(cudaMemsetAsync(to, 0, bytes, QueueOf(stream).stream));
  }

  absl::StatusOr<std::unique_ptr<Recording>> Record(
      Stream& stream, absl::FunctionRef<absl::Status()> calls) override {
    cudaStream_t const on = QueueOf(stream).stream;
    cudaError_t error = cudaStreamBeginCapture(on, cudaStreamCaptureModeRelaxed);
    if (error != cudaSuccess) return ToStatus(error, "beginning to record a graph");
    const absl::Status called = calls();
    cudaGraph_t graph = nullptr;
    error = cudaStreamEndCapture(on, &graph);
    auto recording = std::make_unique<Graph>();
    if (error == cudaSuccess && called.ok()) error = recording->Instantiate(graph, on);
    if (graph != nullptr) cudaGraphDestroy(graph);
    if (!called.ok()) return called;
    if (error != cudaSuccess) {
      cudaGetLastError();
      const bool early = QueueOf(stream).early && error != cudaErrorMemoryAllocation;
      return ToStatus(error, early ? "recording a graph, with kernels that begin early "
                                     "(LOCKSTEP_CUDA_EARLY_LAUNCH=0 records none)"
                                   : "recording a graph");
    }
    return recording;
  }

  absl::StatusOr<std::unique_ptr<Dense>> MakeDense(const DenseShape& shape,
                                                   absl::Span<const int64_t> rows) override {
    return MakeCudaDense(*blas_, shape, rows);
  }
  absl::StatusOr<std::unique_ptr<Conv2d>> MakeConv2d(const Conv2dShape& shape,
                                                     absl::Span<const int64_t> rows) override {
    UseGpu(ordinal_);  // which kernels it takes depends on it
    return MakeCudaConv2d(*this, *dnn_, shape, rows);
  }
  absl::StatusOr<std::unique_ptr<Lstm>> MakeLstm(const LstmShape& shape,
                                                 absl::Span<const int64_t> rows) override {
    return MakeCudaLstm(*this, *blas_, shape, rows);
  }

  // Host memory on every device: what is merged comes from other members.
  void MergeMoments(Stream&, int64_t channels, int64_t count_a, const float* mean_a,
                    const float* m2_a, int64_t count_b, const float* mean_b, const float* m2_b,
                    float* mean, float* m2) override {
    if (count_a == 0 || count_b == 0) {  // an empty record says nothing, whatever it holds
      const size_t bytes = sizeof(float) * static_cast<size_t>(channels);
      std::memmove(mean, count_b == 0 ? mean_a : mean_b, bytes);
      std::memmove(m2, count_b == 0 ? m2_a : m2_b, bytes);
      return;
    }
    const double a = static_cast<double>(count_a), b = static_cast<double>(count_b);
    for (int64_t c = 0; c < channels; ++c) {
      MergeChannel(b / (a + b), a * b / (a + b), mean_a[c], m2_a[c], mean_b[c], m2_b[c], mean[c],
                   m2[c]);
    }
  }

  void BatchNormMoments(Stream& stream, const BatchNormShape& shape, const Leaves& leaves,
                        const void* x, float* mean, float* m2, int64_t stride) override {
    cuda::BatchNormMoments(QueueOf(stream), shape.channels, leaves, x, mean, m2, stride,
                           shape.type);
  }
  void BatchNormForward(Stream& stream, const BatchNormShape& shape, const Leaves& leaves,
                        const void* x, const Moments& moments, float epsilon, const float* weight,
                        const float* bias, const void* residual, void* y, uint8_t* above) override {
    cuda::BatchNormForward(QueueOf(stream), shape, leaves, x, moments, epsilon, weight, bias,
                           residual, y, above);
  }
  void BatchNormForwardOfLeaves(Stream& stream, const BatchNormShape& shape, const Leaves& leaves,
                                const void* x, float* mean, float* m2, int64_t stride,
                                float epsilon, const float* weight, const float* bias,
                                const void* residual, void* y, uint8_t* above) override {
    cuda::BatchNormForwardOfLeaves(QueueOf(stream), shape, leaves, x, mean, m2, stride, epsilon,
                                   weight, bias, residual, y, above);
  }
  void BatchNormBackwardOfLeaves(Stream& stream, const BatchNormShape& shape, const Leaves& leaves,
                                 const void* x, const void* y, const void* dy,
                                 const Moments& moments, float epsilon, const float* weight,
                                 float* sum_dy, float* sum_dy_xhat, int64_t stride,
                                 void* dx) override {
    cuda::BatchNormBackwardOfLeaves(QueueOf(stream), shape, leaves, x, y, dy, moments, epsilon,
                                    weight, sum_dy, sum_dy_xhat, stride, dx);
  }
  void BatchNormGradient(Stream& stream, const BatchNormShape& shape, const Leaves& leaves,
                         const void* x, const void* y, const void* dy, const void* more,
                         const Moments& moments, float epsilon, void* g, float* sum_dy,
                         float* sum_dy_xhat, int64_t stride, const float* weight, const float* bias,
                         const uint8_t* above) override {
    cuda::BatchNormGradient(QueueOf(stream), shape, leaves, x, y, dy, more, moments, epsilon, g,
                            sum_dy, sum_dy_xhat, stride, weight, bias, above);
  }
  void BatchNormBackward(Stream& stream, const BatchNormShape& shape, const Leaves& leaves,
                         const void* x, const void* y, const void* dy, const Moments& moments,
                         float epsilon, const float* weight, const float* sum_dy,
                         const float* sum_dy_xhat, int64_t stride, void* dx,
                         const float* bias) override {
    cuda::BatchNormBackward(QueueOf(stream), shape, leaves, x, y, dy, moments, epsilon, weight,
                            sum_dy, sum_dy_xhat, stride, dx, bias);
  }
  void LayerNormBackwardWeight(Stream& stream, const Leaves& leaves, int64_t features,
                               const float* x, const float* stats, const float* dy, float* dweight,
                               float* dbias, int64_t stride) override {
    cuda::LayerNormBackwardWeight(QueueOf(stream), leaves, features, x, stats, dy, dweight, dbias,
                                  stride);
  }
  void EmbeddingBackward(Stream& stream, const Leaves& leaves, int64_t vocabulary, int64_t features,
                         const float* x, const float* dy, float* dweight, int64_t stride) override {
    cuda::EmbeddingBackward(QueueOf(stream), leaves, vocabulary, features, x, dy, dweight, stride);
  }
  void SoftmaxCrossEntropy(Stream& stream, const Leaves& leaves, int64_t classes,
                           const float* logits, const int32_t* labels, float smoothing, float scale,
                           LeafResult* results, float* dlogits) override {
    cuda::SoftmaxCrossEntropy(QueueOf(stream), leaves, classes, logits, labels, smoothing, scale,
                              results, dlogits);
  }
  void SigmoidCrossEntropy(Stream& stream, const Leaves& leaves, int64_t features, const float* x,
                           const float* target, float scale, LeafResult* results,
                           float* dx) override {
    cuda::SigmoidCrossEntropy(QueueOf(stream), leaves, features, x, target, scale, results, dx);
  }
  void MeanSquaredError(Stream& stream, const Leaves& leaves, int64_t features, const float* y,
                        const float* target, float scale, LeafResult* results, float* dy) override {
    cuda::MeanSquaredError(QueueOf(stream), leaves, features, y, target, scale, results, dy);
  }
  void CountCorrect(Stream& stream, const Leaves& leaves, int64_t classes, const float* scores,
                    const int32_t* labels, LeafResult* results) override {
    cuda::CountCorrect(QueueOf(stream), leaves, classes, scores, labels, results);
  }
  void MergeLeafMoments(Stream& stream, int64_t channels, const Leaves& leaves, const float* mean,
                        const float* m2, int64_t stride, float* merged_mean,
                        float* merged_m2) override {
    cuda::MergeLeafMoments(QueueOf(stream), channels, leaves, mean, m2, stride, merged_mean,
                           merged_m2);
  }
  void MergeStatistics(Stream& stream, int64_t count, const StatisticsSlice* slices,
                       int64_t most_channels, const Leaves& leaves, const float* records,
                       int64_t stride, float* merged) override {
    cuda::MergeStatistics(QueueOf(stream), count, slices, most_channels, leaves, records, stride,
                          merged);
  }
  void UpdateStatistics(Stream& stream, int64_t count, const StatisticsSlice* slices,
                        int64_t most_channels, int64_t rows, const float* merged,
                        const StepScalars* scalars, float* statistics) override {
    cuda::UpdateStatistics(QueueOf(stream), count, slices, most_channels, rows, merged, scalars,
                           statistics);
  }
  void OptimizerUpdatePieces(Stream& stream, const OptimizerCoefficients& coefficients,
                             int64_t count, const UpdatePiece* pieces, const StepScalars* scalars,
                             const float* gradient, float* parameters, const OptimizerSlots& slots,
                             uint16_t* rounded) override {
    cuda::OptimizerUpdatePieces(QueueOf(stream), coefficients, count, pieces, scalars, gradient,
                                parameters, slots, rounded);
  }
  void SquaredNormsOf(Stream& stream, int64_t count, const NormBlock* blocks, const float* x,
                      double* sums) override {
    cuda::SquaredNormsOf(QueueOf(stream), count, blocks, x, sums);
  }
  void DigestPieces(Stream& stream, int64_t count, const DigestPiece* pieces, Digest* digests,
                    const StepScalars* scalars, int64_t ring) override {
    cuda::DigestPieces(QueueOf(stream), count, pieces, digests, scalars, ring);
  }
  void Gate(Stream& stream, const StepGate& gate, absl::Span<const float* const> parts,
            float* gradient) override {
    cuda::Gate(QueueOf(stream), gate, parts.data(), static_cast<int>(parts.size()), gradient);
  }
  void GatherSamples(Stream& stream, const SampleShape& shape, int64_t count, SampleType type,
                     const void* data, const int64_t* offsets, const float* mean,
                     const float* inv_std, const Augmentation& augmentation, uint64_t step,
                     uint64_t first_position, float* out, const int32_t* labels,
                     int32_t* labels_out) override {
    cuda::GatherSamples(QueueOf(stream), shape, count, type, data, offsets, mean, inv_std,
                        augmentation, step, first_position, out, labels, labels_out);
  }
  void TreeSum(Stream& stream, int64_t n, absl::Span<const float* const> parts,
               float* out) override {
    cuda::TreeSum(QueueOf(stream), n, parts.data(), static_cast<int>(parts.size()), out);
  }

  void MaxPoolForward(Stream& stream, const PoolShape& shape, int64_t rows, const void* x, void* y,
                      uint8_t* argmax) override {
    cuda::MaxPoolForward(QueueOf(stream), shape, rows, x, y, argmax);
  }
  void MaxPoolBackward(Stream& stream, const PoolShape& shape, int64_t rows, const void* dy,
                       const uint8_t* argmax, void* dx) override {
    cuda::MaxPoolBackward(QueueOf(stream), shape, rows, dy, argmax, dx);
  }
  void AveragePoolForward(Stream& stream, const PoolShape& shape, int64_t rows, const void* x,
                          void* y) override {
    cuda::AveragePoolForward(QueueOf(stream), shape, rows, x, y);
  }
  void AveragePoolBackward(Stream& stream, const PoolShape& shape, int64_t rows, const void* dy,
                           void* dx) override {
    cuda::AveragePoolBackward(QueueOf(stream), shape, rows, dy, dx);
  }
  void GlobalAveragePoolForward(Stream& stream, int64_t rows, int64_t spatial, int64_t channels,
                                const void* x, float* y, ElementType type) override {
    cuda::GlobalAveragePoolForward(QueueOf(stream), rows, spatial, channels, x, y, type);
  }
  void GlobalAveragePoolBackward(Stream& stream, int64_t rows, int64_t spatial, int64_t channels,
                                 const float* dy, void* dx, ElementType type) override {
    cuda::GlobalAveragePoolBackward(QueueOf(stream), rows, spatial, channels, dy, dx, type);
  }
  void UpdateRunningAverages(Stream& stream, int64_t channels, int64_t n, const float* mean,
                             const float* m2, float momentum, float* running_mean,
                             float* running_var) override {
    cuda::UpdateRunningAverages(QueueOf(stream), channels, n, mean, m2, momentum, running_mean,
                                running_var);
  }
  void CopyStrided(Stream& stream, const StridedCopy& copy, int64_t rows, const float* x,
                   float* y) override {
    cuda::CopyStrided(QueueOf(stream), copy, rows, x, y);
  }
  void ReluForward(Stream& stream, int64_t n, const void* x, void* y, ElementType type) override {
    cuda::ReluForward(QueueOf(stream), n, x, y, type);
  }
  void ReluBackward(Stream& stream, int64_t n, const void* y, const void* dy, void* dx,
                    ElementType type) override {
    cuda::ReluBackward(QueueOf(stream), n, y, dy, dx, type);
  }
  void TanhForward(Stream& stream, int64_t n, const float* x, float* y) override {
    cuda::TanhForward(QueueOf(stream), n, x, y);
  }
  void TanhBackward(Stream& stream, int64_t n, const float* y, const float* dy,
                    float* dx) override {
    cuda::TanhBackward(QueueOf(stream), n, y, dy, dx);
  }
  void SigmoidForward(Stream& stream, int64_t n, const float* x, float* y) override {
    cuda::SigmoidForward(QueueOf(stream), n, x, y);
  }
  void SigmoidBackward(Stream& stream, int64_t n, const float* y, const float* dy,
                       float* dx) override {
    cuda::SigmoidBackward(QueueOf(stream), n, y, dy, dx);
  }
  void LeakyReluForward(Stream& stream, int64_t n, float slope, const float* x, float* y) override {
    cuda::LeakyReluForward(QueueOf(stream), n, slope, x, y);
  }
  void LeakyReluBackward(Stream& stream, int64_t n, float slope, const float* y, const float* dy,
                         float* dx) override {
    cuda::LeakyReluBackward(QueueOf(stream), n, slope, y, dy, dx);
  }
  void EluForward(Stream& stream, int64_t n, float alpha, const float* x, float* y) override {
    cuda::EluForward(QueueOf(stream), n, alpha, x, y);
  }
  void EluBackward(Stream& stream, int64_t n, float alpha, const float* y, const float* dy,
                   float* dx) override {
    cuda::EluBackward(QueueOf(stream), n, alpha, y, dy, dx);
  }
  void SoftplusForward(Stream& stream, int64_t n, const float* x, float* y) override {
    cuda::SoftplusForward(QueueOf(stream), n, x, y);
  }
  void SoftplusBackward(Stream& stream, int64_t n, const float* x, const float* dy,
                        float* dx) override {
    cuda::SoftplusBackward(QueueOf(stream), n, x, dy, dx);
  }
  void Add(Stream& stream, int64_t n, const void* a, const void* b, void* out,
           ElementType type) override {
    cuda::Add(QueueOf(stream), n, a, b, out, type);
  }
  void Multiply(Stream& stream, int64_t n, const float* a, const float* b, float* out) override {
    cuda::Multiply(QueueOf(stream), n, a, b, out);
  }
  void Dropout(Stream& stream, int64_t n, const float* x, float rate, PhiloxKey key,
               const StepScalars* scalars, uint64_t first, float* y) override {
    cuda::Dropout(QueueOf(stream), n, x, rate, key, scalars, first, y);
  }
  void SoftmaxForward(Stream& stream, int64_t n, int64_t features, const float* x,
                      float* y) override {
    cuda::SoftmaxForward(QueueOf(stream), n, features, x, y);
  }
  void SoftmaxBackward(Stream& stream, int64_t n, int64_t features, const float* y, const float* dy,
                       float* dx) override {
    cuda::SoftmaxBackward(QueueOf(stream), n, features, y, dy, dx);
  }
  void LayerNormForward(Stream& stream, int64_t n, int64_t features, const float* x, float epsilon,
                        const float* weight, const float* bias, float* y, float* stats) override {
    cuda::LayerNormForward(QueueOf(stream), n, features, x, epsilon, weight, bias, y, stats);
  }
  void LayerNormBackward(Stream& stream, int64_t n, int64_t features, const float* x,
                         const float* stats, const float* weight, const float* dy,
                         float* dx) override {
    cuda::LayerNormBackward(QueueOf(stream), n, features, x, stats, weight, dy, dx);
  }
  void EmbeddingForward(Stream& stream, int64_t n, int64_t vocabulary, int64_t features,
                        const float* x, const float* weight, float* y) override {
    cuda::EmbeddingForward(QueueOf(stream), n, vocabulary, features, x, weight, y);
  }
  void OneHot(Stream& stream, int64_t rows, int64_t classes, const int32_t* labels,
              float* out) override {
    cuda::OneHot(QueueOf(stream), rows, classes, labels, out);
  }
  void OptimizerUpdate(Stream& stream, const OptimizerCoefficients& coefficients, int64_t n,
                       const StepScalars* scalars, const float* gradient, float* parameters,
                       const OptimizerSlots& slots, uint16_t* rounded) override {
    cuda::OptimizerUpdate(QueueOf(stream), coefficients, n, scalars, gradient, parameters, slots,
                          rounded);
  }
  void RoundToBf16(Stream& stream, int64_t n, const float* x, uint16_t* rounded) override {
    cuda::RoundToBf16(QueueOf(stream), n, x, rounded);
  }
  void SquaredNorms(Stream& stream, int64_t n, const float* x, double* sums) override {
    cuda::SquaredNorms(QueueOf(stream), n, x, sums);
  }
  void FlagNonFinite(Stream& stream, int64_t n, const void* x, uint32_t* flag,
                     ElementType type) override {
    cuda::FlagNonFinite(QueueOf(stream), n, x, flag, type);
  }
  void AccumulateDigest(Stream& stream, int64_t n, const float* x, uint64_t tensor_key,
                        uint64_t first_index, Digest* digest) override {
    cuda::AccumulateDigest(QueueOf(stream), n, x, tensor_key, first_index, digest);
  }
  Algorithms algorithms() const override { return book_->all(); }
  void UseAlgorithms(const Algorithms& algorithms) override { book_->Replace(algorithms); }

 private:
  const int ordinal_;
  const std::string name_, fingerprint_;
  const std::shared_ptr<AlgorithmBook> book_;
  const std::unique_ptr<Blas> blas_;
  const std::unique_ptr<Dnn> dnn_;
};

}  // namespace

absl::StatusOr<int> CountGpus() {
  const auto text = [](int version) {
    return absl::StrCat(version / 1000, ".", version % 1000 / 10);
  };
  int driver = 0, runtime = 0, count = 0;
  const bool has_driver = cudaDriverGetVersion(&driver) == cudaSuccess && driver != 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (!has_driver) {
    return absl::FailedPreconditionError(
        "there is no NVIDIA driver; install one (nvidia-smi shows it), or in a container start it "
        "with its GPUs");
  }
  if (error == cudaErrorInsufficientDriver && cudaRuntimeGetVersion(&runtime) == cudaSuccess) {
    return absl::FailedPreconditionError(absl::StrCat("the driver is too old: it serves CUDA ",
                                                      text(driver), ", needed is ", text(runtime),
                                                      " or later; update the driver"));
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    return absl::FailedPreconditionError(
        "the driver shows no GPU; see CUDA_VISIBLE_DEVICES and nvidia-smi");
  }
  if (error != cudaSuccess) return ToStatus(error, "looking for GPUs");
  return count;
}

absl::StatusOr<std::unique_ptr<Device>> MakeCudaDevice(int ordinal) {
  ASSIGN_OR_RETURN(const int count, CountGpus());
  if (ordinal < 0 || ordinal >= count) {
    return absl::NotFoundError(absl::StrCat("there is no GPU ", ordinal, "; GPUs here: ", count));
  }
  cudaError_t error = UseGpu(ordinal);
  if (error != cudaSuccess) return ToStatus(error, absl::StrCat("using GPU ", ordinal));
  cudaDeviceProp properties;
  error = cudaGetDeviceProperties(&properties, ordinal);
  if (error != cudaSuccess) return ToStatus(error, absl::StrCat("asking about GPU ", ordinal));
  // What the driver waits for itself, it should sleep for; where it cannot, that is no failure.
  if (cudaSetDeviceFlags(cudaDeviceScheduleBlockingSync) != cudaSuccess) cudaGetLastError();
  const std::string name = absl::StrCat("GPU ", ordinal, " (", properties.name, ")");
  constexpr int kOldestMajor = 8;
  if (properties.major < kOldestMajor) {
    return absl::FailedPreconditionError(absl::StrCat(name, " has compute capability ",
                                                      properties.major, ".", properties.minor,
                                                      "; needed: 8.0 (Ampere) or later"));
  }
  auto book = std::make_shared<AlgorithmBook>();
  ASSIGN_OR_RETURN(auto blas, MakeBlas(book));
  ASSIGN_OR_RETURN(auto dnn, MakeDnn(book));
  std::string fingerprint = absl::StrCat("cuda sm_", properties.major, properties.minor, " ",
                                         blas->version(), " ", dnn->version());
  return std::make_unique<CudaDevice>(ordinal, name, std::move(fingerprint), std::move(book),
                                      WithOwnProducts(std::move(blas)), std::move(dnn));
}

}  // namespace lockstep::device::cuda
