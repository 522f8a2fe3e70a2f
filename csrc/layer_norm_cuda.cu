// Which kernel of layer_norm_cuda.cuh runs, with how many threads.
#include "layer_norm_cuda.cuh"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace fastattn {
namespace {

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// Makes a device current, and then again the one that was.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&previous_));
    changed_ = device != previous_;
    if (changed_) check(cudaSetDevice(device));
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, const CudaQueue& queue,
            Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

int64_t ceil_div(int64_t numerator, int64_t denominator) {
  return (numerator + denominator - 1) / denominator;
}

// ---- How threads share rows.

// Thirty-two threads of a warp, `warps` to a row, own `vectors` groups of columns each.
struct Layout {
  int vectors = 0;  // 0: no row of so many columns stays in registers
  int warps = 0;
  int rows = 0;  // of a block
  int blocks = 0;  // of a multiprocessor

  dim3 block() const { return dim3(warps * kWarp, rows); }
};

// The layout of a row with the fewest idle lanes, then with the most groups a thread.
Layout layout_of(int64_t columns, std::initializer_list<Room> rooms) {
  Layout best;
  int vectors = 0;
  for (const Room& room : rooms) {
    ++vectors;
    const int64_t warps = ceil_div(columns, int64_t{kWarp} * kGroup * vectors);
    if (warps > room.row_warps) continue;
    if (best.vectors && warps * vectors > best.warps * best.vectors) continue;
    const int rows = std::max<int>(1, room.block_warps / int(warps));
    const int blocks = std::max<int>(1, room.resident_warps / int(warps * rows));
    best = {vectors, int(warps), rows, blocks};
  }
  return best;
}

Layout forward_layout(int64_t columns) {
  const Room room{kForwardWarps, 0, 0};  // blocks with several rows: see below
  Layout layout = layout_of(columns, {room, room, room, room});
  if (layout.warps == 1) layout.rows = kForwardWarps / 2;
  return layout;
}

Layout backward_layout(int64_t columns) {
  return layout_of(columns, {kBackwardRoom<1>, kBackwardRoom<2>, kBackwardRoom<3>});
}

Layout branch_layout(int64_t columns) {
  const int64_t warps = ceil_div(columns, int64_t{kWarp} * kGroup * kBranchVectors);
  if (warps > kBranchWarps) return {};
  return {kBranchVectors, int(warps), kBranchWarps / int(warps), 2};
}

constexpr int kWideBlocks = 2;  // of a multiprocessor

int64_t blocks_of(const Layout& layout, int64_t rows, const CudaQueue& queue) {
  return std::min(ceil_div(rows, layout.rows), int64_t{layout.blocks} * queue.multiprocessors);
}

// ---- What fits which kernel.

bool aligned(const Rows& rows) {
  const int64_t size = rows.type == Type::float32 ? 4 : 2;
  return !rows.data || (reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&
                        rows.stride * size % 16 == 0 && rows.stride <= INT32_MAX);
}

bool aligned(const Vector& vector) {
  return !vector.data || reinterpret_cast<uintptr_t>(vector.data) % 16 == 0;
}

template <typename... Tensors>
bool all_aligned(int64_t columns, const Tensors&... tensors) {
  return columns % kGroup == 0 && (aligned(tensors) && ...);
}

template <typename... T>
bool lists(Types<T...>, Type type) {
  return ((type == type_of(T{})) || ...);
}

// Whether those of the tensors that there are have types of the list.
template <typename List, typename... Tensors>
bool all_of(List types, const Tensors&... tensors) {
  return ((!tensors.data || lists(types, tensors.type)) && ...);
}

void check_supported(int64_t rows, std::initializer_list<Type> types) {
  if (rows > INT32_MAX) {
    throw std::runtime_error("CUDA kernels take fewer than 2^31 rows, but got " +
                             std::to_string(rows));
  }
  for (const Type type : types) {
    if (type == Type::float64) {
      throw std::runtime_error("CUDA kernels take float32, float16 and bfloat16, but got float64");
    }
  }
}

// Type of a tensor; float32 where there is none.
template <typename Tensor>
Type type_in(const Tensor& tensor) {
  return tensor.data ? tensor.type : Type::float32;
}

using ForwardKernel = void (*)(NormForward);
using BackwardKernel = void (*)(NormBackward);

template <typename X, typename S>
ForwardKernel forward_kernel(const NormForward& a, int vectors) {
  using Kinds = RowTypes<X>;
  const bool fits = all_of(Types<S>{}, a.residual) &&
                    all_of(typename Kinds::Vectors{}, a.x_bias, a.weight, a.bias) &&
                    all_of(typename Kinds::Results{}, a.out, a.copy);
  static constexpr ForwardKernel kKernels[] = {forward_rows<X, S, 1>, forward_rows<X, S, 2>,
                                               forward_rows<X, S, 3>, forward_rows<X, S, 4>};
  return fits ? kKernels[vectors - 1] : nullptr;
}

// The kernel for a row in registers, null if there is none for these types.
ForwardKernel forward_kernel(const NormForward& a, int vectors) {
  const Type x = a.x.type, sum = a.sum.type;
  const auto are = [&](auto first, auto second) {
    return x == type_of(first) && sum == type_of(second);
  };
  using Half = __half;
  using Bfloat = __nv_bfloat16;
  if (are(float{}, float{})) return forward_kernel<float, float>(a, vectors);
  if (are(Half{}, Half{})) return forward_kernel<Half, Half>(a, vectors);
  if (are(Bfloat{}, Bfloat{})) return forward_kernel<Bfloat, Bfloat>(a, vectors);
  if (are(Half{}, float{})) return forward_kernel<Half, float>(a, vectors);
  if (are(Bfloat{}, float{})) return forward_kernel<Bfloat, float>(a, vectors);
  return nullptr;
}

template <typename G, typename S, typename V = S>
BackwardKernel backward_kernel(const NormBackward& a, int vectors) {
  using Kinds = RowTypes<S>;
  const bool fits = all_of(Types<S>{}, a.grad_sum, a.d_sum) &&
                    all_of(typename RowTypes<G>::Copy{}, a.grad_copy) &&
                    all_of(typename Kinds::Branch{}, a.d_branch) &&
                    all_of(typename Kinds::Vectors{}, a.weight, a.bias);
  static constexpr BackwardKernel kKernels[] = {
      backward_rows<G, S, V, 1>, backward_rows<G, S, V, 2>, backward_rows<G, S, V, 3>};
  return fits ? kKernels[vectors - 1] : nullptr;
}

BackwardKernel backward_kernel(const NormBackward& a, int vectors) {
  const Type grad = a.grad_out.data ? a.grad_out.type : Type::float32;
  const auto are = [&](auto g, auto s, auto v) {
    return grad == type_of(g) && a.d_sum.type == type_of(s) && a.saved.type == type_of(v);
  };
  using F = float;
  using H = __half;
  using B = __nv_bfloat16;
  if (are(F{}, F{}, F{})) return backward_kernel<F, F>(a, vectors);
  if (are(H{}, H{}, H{})) return backward_kernel<H, H>(a, vectors);
  if (are(B{}, B{}, B{})) return backward_kernel<B, B>(a, vectors);
  if (are(H{}, F{}, F{})) return backward_kernel<H, F>(a, vectors);
  if (are(B{}, F{}, F{})) return backward_kernel<B, F>(a, vectors);
  if (are(F{}, H{}, H{})) return backward_kernel<F, H>(a, vectors);
  if (are(F{}, B{}, B{})) return backward_kernel<F, B>(a, vectors);
  // Kept is a result, or its copy, that is narrower than the sum.
  if (are(F{}, F{}, H{})) return backward_kernel<F, F, H>(a, vectors);
  if (are(F{}, F{}, B{})) return backward_kernel<F, F, B>(a, vectors);
  if (are(H{}, F{}, H{})) return backward_kernel<H, F, H>(a, vectors);
  if (are(B{}, F{}, B{})) return backward_kernel<B, F, B>(a, vectors);
  return nullptr;
}

template <typename S>
BackwardKernel branch_kernel(const NormBackward& a) {
  const bool fits =
      all_of(Types<S>{}, a.d_sum) && all_of(typename RowTypes<S>::Branch{}, a.d_branch);
  return fits ? branch_rows<S> : nullptr;
}

BackwardKernel branch_kernel(const NormBackward& a) {
  switch (a.grad_sum.type) {
    case Type::float32: return branch_kernel<float>(a);
    case Type::float16: return branch_kernel<__half>(a);
    case Type::bfloat16: return branch_kernel<__nv_bfloat16>(a);
    default: return nullptr;
  }
}

}  // namespace

CudaVersions cuda_versions() {
  CudaVersions versions{0, CUDART_VERSION};
  check(cudaDriverGetVersion(&versions.driver));
  return versions;
}

int64_t norm_partial_rows_cuda(int64_t rows, int64_t columns, const CudaQueue& queue) {
  if (columns == 0) return 0;
  const int64_t wide = std::min(rows, int64_t{kWideBlocks} * queue.multiprocessors);
  const Layout backward = backward_layout(columns), branch = branch_layout(columns);
  if (!backward.vectors) return wide;
  return std::max({blocks_of(backward, rows, queue), blocks_of(branch, rows, queue), wide});
}

void norm_forward_cuda(const NormForward& a, const CudaQueue& queue) {
  check_supported(a.rows, {a.x.type, a.sum.type, type_in(a.residual), type_in(a.out),
                           type_in(a.copy), type_in(a.x_bias), type_in(a.weight), type_in(a.bias)});
  if (a.rows == 0 || a.columns == 0) return;
  const CurrentDevice current(queue.device);
  const bool wide =
      all_aligned(a.columns, a.x, a.residual, a.sum, a.out, a.copy, a.x_bias, a.weight, a.bias);
  const Layout layout = forward_layout(a.columns);
  const ForwardKernel kernel =
      wide && layout.vectors ? forward_kernel(a, layout.vectors) : nullptr;
  if (kernel) {
    launch(kernel, dim3(ceil_div(a.rows, layout.rows)), layout.block(), queue, a);
  } else {
    launch(forward_wide, dim3(a.rows), dim3(kWideWarps * kWarp), queue, a, wide);
  }
}

void norm_backward_cuda(const NormBackward& a, const CudaQueue& queue) {
  check_supported(a.rows,
                  {type_in(a.grad_out), type_in(a.grad_copy), type_in(a.grad_sum),
                   type_in(a.saved), type_in(a.weight), type_in(a.bias), type_in(a.d_sum),
                   type_in(a.d_branch), type_in(a.d_weight), type_in(a.d_bias),
                   type_in(a.d_x_bias)});
  if (a.columns == 0) return;
  const CurrentDevice current(queue.device);
  const bool norm = a.grad_out.data || a.grad_copy.data;
  const bool sums = a.d_weight.data || a.d_bias.data || a.d_x_bias.data;
  int64_t blocks = 0;
  if (a.rows > 0) {
    const bool wide = all_aligned(a.columns, a.grad_out, a.grad_copy, a.grad_sum, a.saved, a.d_sum,
                                  a.d_branch, a.weight, a.bias);
    const Layout layout = norm ? backward_layout(a.columns) : branch_layout(a.columns);
    BackwardKernel kernel = nullptr;
    if (wide && layout.vectors) {
      kernel = norm ? backward_kernel(a, layout.vectors) : branch_kernel(a);
    }
    blocks = kernel ? blocks_of(layout, a.rows, queue)
                    : std::min(a.rows, int64_t{kWideBlocks} * queue.multiprocessors);
    if (sums) blocks = std::min(blocks, a.partial_rows);
    if (kernel) {
      launch(kernel, dim3(blocks), layout.block(), queue, a);
    } else {
      launch(backward_wide, dim3(blocks), dim3(kWideWarps * kWarp), queue, a, wide);
    }
  }
  if (sums) {
    const int first = norm ? 0 : 2;  // without a norm the sums before d_x_bias are zero
    launch(column_sums, dim3(ceil_div(a.columns, kWarp), 3), dim3(kWarp, kWarp), queue, a, blocks,
           first);
  }
}

}  // namespace fastattn
