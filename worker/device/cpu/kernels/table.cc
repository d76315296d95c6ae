#include "worker/device/cpu/kernels/kernel_functions.h"

namespace lockstep::device::LOCKSTEP_ISA {

const Kernels kKernels = {
    .gemm = Gemm,
    .dense_forward = DenseForward,
    .dense_weight_gradient = DenseWeightGradient,
    .pack_transposed = PackTransposed,
    .relu_forward = ReluForward,
    .relu_backward = ReluBackward,
    .tanh_forward = TanhForward,
    .tanh_backward = TanhBackward,
    .sigmoid_forward = SigmoidForward,
    .sigmoid_backward = SigmoidBackward,
    .add = Add,
    .dropout = Dropout,
    .max_pool_forward = MaxPoolForward,
    .max_pool_backward = MaxPoolBackward,
    .average_pool_forward = AveragePoolForward,
    .average_pool_backward = AveragePoolBackward,
    .global_average_pool_forward = GlobalAveragePoolForward,
    .global_average_pool_backward = GlobalAveragePoolBackward,
    .batch_norm_moments = BatchNormMoments,
    .merge_moments = MergeMoments,
    .batch_norm_forward = BatchNormForward,
    .batch_norm_backward_sums = BatchNormBackwardSums,
    .batch_norm_backward = BatchNormBackward,
    .update_running_averages = UpdateRunningAverages,
    .column_sums = ColumnSums,
    .batch_norm_add_forward = BatchNormAddForward,
    .batch_norm_gradient = BatchNormGradient,
    .copy_strided = CopyStrided,
    .softmax_cross_entropy = SoftmaxCrossEntropy,
    .mean_squared_error = MeanSquaredError,
    .count_correct = CountCorrect,
    .optimizer_update = OptimizerUpdate,
    .has_non_finite = HasNonFinite,
    .accumulate_digest = AccumulateDigest,
    .gather_sample = GatherSample,
};

}  // namespace lockstep::device::LOCKSTEP_ISA
