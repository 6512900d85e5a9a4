"""Weight gradients added to the FP32 buffer of data parallelism as they are computed.

megatron-core's linear layers do this through a CUDA module of apex, `fused_weight_gradient_mlp_cuda`, and refuse to
where it is not installed. `patches` puts its meaning in torch's terms in that place: no gradient of a weight is held
beside the buffer, nor read and written once more to add it.
"""

from torch import Tensor


def wgrad_gemm_accum_fp32(inputs: Tensor, output_gradient: Tensor, main_grad: Tensor) -> None:
    """Add output_gradient.T @ inputs to `main_grad`, in place.

    Shapes: inputs (num_tokens, in_features), output_gradient (num_tokens, out_features), both of the weight's type;
    main_grad (out_features, in_features) float32. A 16-bit product is rounded once before it is added, as it is where
    data parallelism adds it.
    """
    if output_gradient.dtype == main_grad.dtype:
        main_grad.addmm_(output_gradient.t(), inputs)
    else:
        main_grad.add_(output_gradient.t() @ inputs)


class FusedWeightGradient:
    """What megatron-core calls of apex's module; our gradients are always summed in FP32."""

    wgrad_gemm_accum_fp32 = staticmethod(wgrad_gemm_accum_fp32)
