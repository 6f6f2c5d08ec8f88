// The launchers that csrc/aten.h calls itself, beside those that torch calls: csrc/cpu has them for CPUs, csrc/cuda for GPUs.
// Shapes, dtypes and strides are the ops' (gpt_kernels/ops); what is handed in to be filled is contiguous.
#pragma once
#include "args/checks.h"

namespace gk {

void layer_norm_into(Tensor& y, Tensor& mean, Tensor& rstd, const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                     Matrix of, double eps);
std::tuple<Tensor, Tensor, Tensor> layer_norm_gradients(const Tensor& dy, const Tensor& x, const OptTensor& weight,
                                                        const Tensor& mean, const Tensor& rstd, bool has_bias);

void rms_norm_into(Tensor& y, Tensor& rstd, const Tensor& x, const OptTensor& weight, Matrix of, double eps);
std::tuple<Tensor, Tensor> rms_norm_gradients(const Tensor& dy, const Tensor& x, const OptTensor& weight, const Tensor& rstd);

// hidden: what a row has whose every element is -inf
Tensor softmax_of(const Tensor& x, const OptTensor& mask, double scale, bool causal, double hidden);
Tensor softmax_gradient(const Tensor& dy, const Tensor& y, double scale, bool causal);

Tensor gelu_of(const Tensor& x, const OptTensor& bias, bool tanh);
std::tuple<Tensor, Tensor> gelu_gradients(const Tensor& dy, const Tensor& x, const OptTensor& bias, bool tanh);

#ifndef GK_CUDA
// y = x mask scale, mask bool
void masked_into(Tensor& y, const Tensor& x, const Tensor& mask, double scale);
struct AttentionArgs;
// o: of q's shape but for v's head_dim, each head's rows contiguous; lse: (B, H, Tq)
void attention_into(Tensor& o, Tensor& lse, AttentionArgs s, const Tensor& q);
// in_tokens: the gradients lie as (B, T, H, D) however q, k and v do
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_gradients(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                               const Tensor& v, const Tensor& o, const Tensor& lse,
                                                               const OptTensor& bias, const OptTensor& alibi_slopes,
                                                               const OptTensor& rng_state, double scale, double softcap,
                                                               double dropout_p, int64_t causal_offset, int64_t window_left,
                                                               int64_t window_right, bool need_dbias, bool in_tokens);
#endif

}  // namespace gk
