// LLM.int8() row quantisation and its inverse.
//
// A group of threads of a block takes a row: absmax over the elements below the threshold, then the codes,
// from registers where the row fits (kKept pieces a thread), else read again from cache. A block has as many
// groups as fit 512 threads, and there are as many blocks as run at once.
//
// Where a block has one row it has the registers of a multiprocessor. Few such blocks wait long for the
// launch in front to end: they go through their code once on numbers of their own meanwhile, as instructions
// come slowly while the product's first weights do.
//
// With a threshold an element at or above it has code 0 and marks its column: in the bits of the block, and
// when it has seen its last row it adds them to those of all; at once in those of all where it has one row.
// Who wants to know which they are launches a second kernel, which reads the bits: its last block makes the
// list of columns, the others zero the columns' codes in all rows; where there are none it ends at once.
//
// Rules to the letter (bitsandbytes): codes = rint(x * (127 / absmax)); an all-zero row gives zeros; a NaN
// gives 0.
#include "int8_rows.cuh"

#include <algorithm>

namespace halfbyte::cuda {
namespace {

constexpr int kThreads = 512, kKept = 8;
constexpr int64_t kBlockColumns = 1 << 17;  // more columns have no bits of their own in a block

/// The threads of a row meet.
__device__ __forceinline__ void group_barrier(int group, int threads) {
  if (threads == 32)
    __syncwarp();
  else
    asm volatile("bar.sync %0, %1;\n" ::"r"(group + 1), "r"(threads) : "memory");
}

/// N: elements of a piece; kHalf: rounded to float16 first; kAlone: a block has one row, all of it kept.
template <typename T, int N, bool kHalf, bool kThreshold, bool kAlone>
__global__ void __launch_bounds__(kThreads, kAlone ? 1 : 2)
    rows_kernel(const __grid_constant__ Int8Rows p, int threads, bool rehearse) {
  using W = std::conditional_t<kHalf, half_t, T>;
  using Part = Piece<W, N>;
  extern __shared__ uint32_t own_bits[];
  __shared__ float most_of[2][kThreads / 32];
  __shared__ uint32_t marked_set;
  let_next_start();
  int group = threadIdx.x / threads, at = threadIdx.x % threads;
  int groups = blockDim.x / threads;
  const int first_warp = group * threads / 32, warps = threads / 32;
  const int64_t step = static_cast<int64_t>(threads) * N, first = int64_t{at} * N;
  int pieces = static_cast<int>(first < p.cols ? (p.cols - first + step - 1) / step : 0);
  asm volatile("" : "+r"(group), "+r"(at), "+r"(groups), "+r"(pieces));  // divided before the wait
  // bits of the block's own, unless it has one row
  const bool own = !kAlone && p.cols <= kBlockColumns;
  if (kThreshold && own) {
    for (int i = threadIdx.x; i < (p.cols + 31) / 32; i += blockDim.x) own_bits[i] = 0;
    __syncthreads();
  }
  uint32_t set = 0, words[2] = {};

  const Threshold<W> threshold(p.threshold);
  const int64_t stride = gridDim.x * int64_t{groups};
  int turn = 0;
  bool live = !kAlone || !rehearse, waited = false;
#pragma unroll 1
  for (int64_t base = blockIdx.x * int64_t{groups}; base < p.rows; base += live ? stride : 0, live = true) {
    if (live && !waited) {
      waited = true;
      wait_for_results();
      if (p.zero && blockIdx.x == 0 && threadIdx.x == 0) *p.zero = 0;
      if (kThreshold && (threadIdx.x == 0 || !own)) set = p.marks->next;  // nobody waits for it here
      if (kThreshold && threadIdx.x == 0 && blockIdx.x == 0)
        words[0] = p.marks->words[0], words[1] = p.marks->words[1];
    }
    const int64_t row = base + group;
    const int mine = row < p.rows ? pieces : 0;
    const T* const in = static_cast<const T*>(p.x) + row * p.cols + first;
    int8_t* const to = p.codes + row * p.cols + first;
    const auto fetch = [&](int i) {
      const auto part = Piece<T, N>::load(in + i * step);
      if constexpr (kHalf)
        return part.halves();
      else
        return part;
    };
    const auto mark = [&](int i, unsigned outliers) {
      // a piece is in one word
      const int64_t column = first + i * step, word = column / 32;
      const uint32_t marks = outliers << (column % 32);
      if (own)
        atomicOr(own_bits + word, marks);
      else if (live)
        atomicOr(p.marks->bits[set] + word, marks);
    };
    Part kept[kKept];
    if (live) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        if (i < mine) kept[i] = fetch(i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kKept; ++i) kept[i] = Part::filled(threshold.word);
    }
    uint32_t found[2] = {};  // a byte for each of those kept
    bool cleaned = false;
    float most = look_at<kThreshold>(kept, mine, threshold, &cleaned, [&](int i, unsigned outliers) {
      found[i / 4] |= outliers << (i % 4 * 8);
    });
#pragma unroll
    for (int half = 0; half < 2 && kThreshold; ++half) {
#pragma unroll 1
      while (found[half]) {
        const int at = (__ffs(static_cast<int>(found[half])) - 1) & 24;
        mark(half * 4 + at / 8, found[half] >> at & 255);
        found[half] &= ~(255u << at);
      }
    }
#pragma unroll 1
    for (int i = kKept; i < mine; ++i) {
      Part part[1] = {fetch(i)};
      most = fmaxf(most, look_at<kThreshold>(part, 1, threshold, &cleaned,
                                             [&](int, unsigned outliers) { mark(i, outliers); }));
    }

    most = most_of_warp(most);
    if (warps > 1) {
      float* const shared = most_of[turn] + first_warp;
      turn ^= 1;
      if (at % 32 == 0) shared[at / 32] = most;
      group_barrier(group, threads);
      for (int w = 0; w < warps; ++w) most = fmaxf(most, shared[w]);
    }
    if (at == 0 && row < p.rows && live) p.absmax[row] = most;
    if (kThreshold && own && base + stride >= p.rows) {  // the block has seen its last row
      if (threadIdx.x == 0) marked_set = set;
      __syncthreads();
      for (int w = threadIdx.x; w < (p.cols + 31) / 32; w += blockDim.x) {
        if (const uint32_t bits = own_bits[w]) atomicOr(p.marks->bits[marked_set] + w, bits);
      }
    }

    const RowScale scale(most);
    const auto finish = [&](int i, Part& part) {
      part.forget();
      uint32_t codes[(N + 3) / 4];
      part.encode(scale, codes);
      if (!live) return;
      if constexpr (N == 1)
        to[i * step] = static_cast<int8_t>(codes[0]);
      else
        *reinterpret_cast<Vec<uint32_t, N / 4>*>(to + i * step) =
            *reinterpret_cast<const Vec<uint32_t, N / 4>*>(codes);
    };
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (i < mine) finish(i, kept[i]);
    }
#pragma unroll 1
    for (int i = kKept; i < mine; ++i) {
      Part part = fetch(i);
      part.template clean<kThreshold>(threshold);
      finish(i, part);
    }
  }
  if (kThreshold && blockIdx.x == 0 && threadIdx.x == 0) {
    p.marks->marked = set;
    p.marks->words[set] = max(set ? words[1] : words[0], static_cast<uint32_t>((p.cols + 31) / 32));
  }
}

/// The bits become list and mask. All threads of one block.
__device__ void write_columns(const Int8Rows& p, const uint32_t* bits) {
  __shared__ int counts[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t words = (p.cols + 31) / 32, each = (words + warps - 1) / warps;
  const int64_t begin = warp * each, end = begin + each < words ? begin + each : words;
  const auto sum_of_warp = [](int x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  };
  int mine = 0;
  for (int64_t w = begin + lane; w < end; w += 32) mine += __popc(bits[w]);
  mine = sum_of_warp(mine);
  if (lane == 0) counts[warp] = mine;
  __syncthreads();
  int before = sum_of_warp(lane < warp ? counts[lane] : 0);
  if (p.list && threadIdx.x == blockDim.x - 1) p.list[0] = before + mine;
  for (int64_t w = begin; w < end; ++w) {
    const uint32_t word = bits[w];
    const bool marked = word >> lane & 1;
    const int64_t column = w * 32 + lane;
    if (p.mask && column < p.cols) p.mask[column] = marked;
    if (p.list && marked) p.list[1 + before + __popc(word & ((1u << lane) - 1))] = static_cast<int>(column);
    before += __popc(word);
  }
}

/// Lists outlier columns (the last block) and sets their codes to 0 (the others, a warp a row).
__global__ void __launch_bounds__(kThreads) columns_kernel(const __grid_constant__ Int8Rows p) {
  extern __shared__ uint32_t own_bits[];
  let_next_start();
  wait_for_results();
  const int64_t words = (p.cols + 31) / 32;
  const bool own = p.cols <= kBlockColumns;
  const uint32_t* const marked = p.marks->bits[p.marks->marked];
  const uint32_t* const bits = own ? own_bits : marked;
  uint32_t mine = 0;
  for (int64_t w = threadIdx.x; w < words; w += blockDim.x) {
    const uint32_t word = marked[w];
    if (own) own_bits[w] = word;
    mine |= word;
  }
  const bool any = __syncthreads_or(mine != 0);
  p.marks->clear_other(blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
  if (blockIdx.x == gridDim.x - 1) {
    if (any || p.mask)
      write_columns(p, bits);
    else if (p.list && threadIdx.x == 0)
      p.list[0] = 0;
  } else if (any) {
    const int lane = threadIdx.x % 32;
    const int64_t warps = (gridDim.x - 1) * int64_t{blockDim.x / 32};
    for (int64_t row = blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32; row < p.rows; row += warps) {
      for (int64_t w = lane; w < words; w += 32) {
        for (uint32_t word = bits[w]; word; word &= word - 1)
          p.codes[row * p.cols + w * 32 + __ffs(static_cast<int>(word)) - 1] = 0;
      }
    }
  }
}

template <typename T, int N, bool kHalf>
cudaError_t launch(const Launch& on, const Int8Rows& p) {
  const int64_t pieces = (p.cols + N - 1) / N;
  // as few pieces a thread as let all rows be taken at once
  int64_t each = 2;
  while (each < kKept && p.rows * ((pieces + each - 1) / each) > on.multiprocessors * int64_t{2 * kThreads})
    each *= 2;
  const int64_t wanted = ((pieces + each - 1) / each + 31) / 32 * 32;
  const int threads = static_cast<int>(std::max<int64_t>(std::min<int64_t>(wanted, kThreads), 32));
  const int64_t share = (p.rows + on.multiprocessors - 1) / on.multiprocessors;
  const int groups = static_cast<int>(std::min<int64_t>(share, kThreads / threads));
  LaunchShape shape;
  shape.grid = dim3(blocks_for(p.rows, groups, on.multiprocessors * int64_t{2}));
  shape.block = dim3(threads * groups);
  const bool alone = N > 1 && p.rows <= on.multiprocessors && p.cols <= int64_t{threads} * kKept * N;
  const bool rehearse = alone && on.early && 2 * p.rows <= on.multiprocessors;
  const auto run = [&](auto kernel) { return launch_kernel(on, shape, kernel, p, threads, rehearse); };
  constexpr bool kAlone = N > 1;
  if (!(p.threshold > 0.0f))
    return alone ? run(rows_kernel<T, N, kHalf, false, kAlone>) : run(rows_kernel<T, N, kHalf, false, false>);
  if (p.cols <= kBlockColumns && !alone) shape.shared = static_cast<size_t>((p.cols + 31) / 32 * 4);
  cudaError_t error =
      alone ? run(rows_kernel<T, N, kHalf, true, kAlone>) : run(rows_kernel<T, N, kHalf, true, false>);
  if (error != cudaSuccess || (!p.list && !p.mask)) return error;
  Launch next = on;
  next.early = on.arch >= 90;
  LaunchShape columns;
  columns.grid = dim3(blocks_for(p.rows, kThreads / 32, on.multiprocessors) + 1);
  columns.block = dim3(kThreads);
  if (p.cols <= kBlockColumns) columns.shared = static_cast<size_t>((p.cols + 31) / 32 * 4);
  error = launch_kernel(next, columns, columns_kernel, p);
  if (error != cudaSuccess) forget_marks(on, p.marks);
  return error;
}

template <typename T, int N>
__global__ void dequantize_kernel(T* y, const int8_t* codes, const float* scb, int64_t rows, int64_t cols) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float scale = scb[row];
    for (int64_t i = threadIdx.x * N; i < cols; i += static_cast<int64_t>(blockDim.x) * N) {
      const auto in = *reinterpret_cast<const Vec<int8_t, N>*>(codes + row * cols + i);
      Vec<T, N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) out.v[j] = from_float<T>(in.v[j] * scale * kInt8Scale);
      *reinterpret_cast<Vec<T, N>*>(y + row * cols + i) = out;
    }
  }
}

unsigned threads_for(int64_t steps) {
  const int64_t wanted = (steps / 2 + 31) / 32 * 32;  // two vectors a thread
  return static_cast<unsigned>(wanted > 512 ? 512 : wanted < 32 ? 32 : wanted);
}

}  // namespace

cudaError_t int8_rows(const Launch& on, const Int8Rows& p) {
  return with_float_type(p.dtype, [&](auto* pointer) {
    using T = std::remove_pointer_t<decltype(pointer)>;
    constexpr int N = 16 / sizeof(T);
    constexpr bool is_half = std::is_same_v<T, half_t>;
    if (p.cols % N == 0 && is_aligned(p.x, 16) && is_aligned(p.codes, N))
      return p.fp16_input && !is_half ? launch<T, N, !is_half>(on, p) : launch<T, N, false>(on, p);
    return p.fp16_input && !is_half ? launch<T, 1, !is_half>(on, p) : launch<T, 1, false>(on, p);
  });
}

Status CudaBackend::int8_quantize_rows(Queue queue, View codes, View row_absmax, View outlier_mask, View x,
                                       float threshold, bool fp16_input) {
  if (Status status = enter(); !status.ok()) return status;
  Launch on = launch_;  // not early: the next op may take the codes for a weight, and read it at once
  on.stream = stream(queue);
  const int64_t rows = x.rows(), cols = x.cols();
  if (!is_float(x.dtype) || codes.dtype != DType::i8 || row_absmax.dtype != DType::f32) {
    return refuse_dtype("int8_quantize_rows", "x must be float, codes int8, row_absmax float32");
  }
  if (codes.size() != x.size() || row_absmax.size() < rows || !x.is_contiguous() || !codes.is_contiguous()) {
    return refuse("int8_quantize_rows", "codes or row_absmax do not fit x");
  }
  if (threshold > 0.0f && (!outlier_mask || outlier_mask.dtype != DType::u8 || outlier_mask.size() != cols ||
                           !outlier_mask.is_contiguous())) {
    return refuse("int8_quantize_rows", "a threshold needs an outlier mask uint8 [K]");
  }
  if (threshold > 0.0f && cols > ColumnMarks::kMostColumns) {
    return refuse("int8_quantize_rows", "with a threshold x may have at most " +
                                            std::to_string(ColumnMarks::kMostColumns) + " columns, not " +
                                            std::to_string(cols));
  }
  if (rows == 0) {
    return threshold > 0.0f && cols > 0
               ? check(cudaMemsetAsync(outlier_mask.data, 0, cols, on.stream), "int8_quantize_rows")
               : Status{};
  }
  const Int8Rows work{x.data,
                      x.dtype,
                      rows,
                      cols,
                      fp16_input,
                      codes.as<int8_t>(),
                      row_absmax.as<float>(),
                      threshold,
                      marks(queue),
                      nullptr,
                      threshold > 0.0f ? outlier_mask.as<uint8_t>() : nullptr,
                      nullptr};
  return check(int8_rows(on, work), "int8_quantize_rows");
}

Status CudaBackend::int8_dequantize_rows(Queue queue, View y, View codes, View scb) {
  if (Status status = enter(); !status.ok()) return status;
  const int64_t rows = codes.rows(), cols = codes.cols();
  if (!is_float(y.dtype) || codes.dtype != DType::i8 || scb.dtype != DType::f32) {
    return refuse_dtype("int8_dequantize_rows", "y must be float, codes int8, scb float32");
  }
  if (y.size() != codes.size() || scb.size() < rows || !y.is_contiguous() || !codes.is_contiguous()) {
    return refuse("int8_dequantize_rows", "y or scb do not fit codes");
  }
  if (y.size() == 0) return {};
  with_float_type(y.dtype, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    constexpr int N = 16 / sizeof(T);
    const auto run = [&](auto kernel, int64_t steps) {
      kernel<<<blocks_for(rows, 1, 1 << 16), threads_for(steps), 0, stream(queue)>>>(
          y.as<T>(), codes.as<const int8_t>(), scb.as<const float>(), rows, cols);
    };
    if (cols % N == 0 && is_aligned(y.data, 16) && is_aligned(codes.data, N))
      run(dequantize_kernel<T, N>, cols / N);
    else
      run(dequantize_kernel<T, 1>, cols);
  });
  return check(cudaGetLastError(), "int8_dequantize_rows");
}

}  // namespace halfbyte::cuda
