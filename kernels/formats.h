// Every number format of the library, and nothing else: dtypes, the 4-bit codebooks and their decision
// thresholds, the 8-bit dynamic maps, the constants of LLM.int8(). All formats are bitsandbytes' own, bit for
// bit, so that a checkpoint written by either loads in the other.
//
// 4-bit blocks   elements are taken from the row-major flattened tensor in runs of `blocksize`; a block has
// one fp32
//                absmax. Element 2i is the HIGH nibble of byte i, element 2i+1 the low one. An odd last
//                element has the code of 0.0 in its low nibble. value = codebook[nibble] * absmax[i /
//                blocksize].
// nested absmax  (double quantisation) absmax - offset is itself quantised to 8 bits by the signed dynamic
// map in
//                blocks of 256: absmax[b] = map[q[b]] * nested_absmax[b / 256] + offset.
// int8 rows      SCB[n] = max |w[n, :]| (not divided by 127); value = q * SCB[n] * (1 / 127).
#pragma once

#include <cstdint>
#include <cstring>

namespace halfbyte {

enum class DType : uint8_t { f32, f16, bf16, i8, u8, i32, i64 };

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::i64:
      return 8;
    case DType::i8:
    case DType::u8:
      return 1;
  }
  return 0;
}

constexpr bool is_float(DType dtype) {
  return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
}

constexpr const char* name_of(DType dtype) {
  constexpr const char* names[] = {"float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64"};
  return names[static_cast<int>(dtype)];
}

enum class QuantType : uint8_t { nf4, fp4 };

/// Block sizes that the 4-bit formats allow: powers of two from 32 to 4096.
constexpr bool is_blocksize(int64_t b) { return b >= 32 && b <= 4096 && (b & (b - 1)) == 0; }
constexpr int64_t kNestedBlocksize = 256;

/// How the codes and absmax of a 4-bit weight [N, K] lie in memory.
///   flat   bitsandbytes' own: row-major, two codes a byte, the even element in the high half; the absmax of
///          a block at element / blocksize
///   tiled  the same bytes in the order in which the tensor cores want them (blocksize 64, N % 16 = 0,
///          K % 64 = 0). A tile is 16 rows x 64 k: 512 bytes of codes and 16 absmax; tile (N / 16, K / 64) is
///          row-major. Lane l = 4 g + t of a warp has bytes 16 l .. 16 l + 15 of a tile, 4 for each step j of
///          16 k, which is the A fragment of mma.m16n8k16 with two weights in the place of each register:
///            row g, k 16 j + 2 t | row g + 8, same k | row g, k 16 j + 2 t + 8 | row g + 8, same k
///          absmax of row g + 8 h of a tile at 2 g + h. Nested statistics keep the order of the flat layout.
enum class Layout4 : uint8_t { flat, tiled };

#ifdef __CUDACC__
#define HALFBYTE_ANYWHERE __host__ __device__
#else
#define HALFBYTE_ANYWHERE
#endif
constexpr int64_t kTileRows = 16, kTileK = 64;
constexpr bool can_tile(int64_t n, int64_t k, int64_t blocksize) {
  return blocksize == kTileK && n % kTileRows == 0 && k % kTileK == 0;
}
/// Where byte `i` of row r (bytes of two k) of a flat weight goes.
HALFBYTE_ANYWHERE constexpr int64_t tiled_byte(int64_t r, int64_t i, int64_t k) {
  const int64_t tile = r / kTileRows * (k / kTileK) + i / 32, g = r % 8, h = r % 16 / 8;
  const int64_t j = i % 32 / 8, half = i % 8 / 4, t = i % 4;
  return tile * 512 + (4 * g + t) * 16 + 4 * j + 2 * half + h;
}
/// Where the absmax of block b of row r goes.
HALFBYTE_ANYWHERE constexpr int64_t tiled_block(int64_t r, int64_t b, int64_t k) {
  return (r / kTileRows * (k / kTileK) + b) * 16 + r % 8 * 2 + r % 16 / 8;
}

constexpr float kNf4[16] = {-1.0f,
                            -0.6961928009986877f,
                            -0.5250730514526367f,
                            -0.39491748809814453f,
                            -0.28444138169288635f,
                            -0.18477343022823334f,
                            -0.09105003625154495f,
                            0.0f,
                            0.07958029955625534f,
                            0.16093020141124725f,
                            0.24611230194568634f,
                            0.33791524171829224f,
                            0.44070982933044434f,
                            0.5626170039176941f,
                            0.7229568362236023f,
                            1.0f};

/// code(x) = number of thresholds t with x > t: ties go to the lower code, NaN to 0.
constexpr float kNf4Thresholds[15] = {-0.8480964004993439f,   -0.6106329262256622f,  -0.4599952697753906f,
                                      -0.33967943489551544f,  -0.23460740596055984f, -0.13791173323988914f,
                                      -0.045525018125772476f, 0.03979014977812767f,  0.1202552504837513f,
                                      0.2035212516784668f,    0.2920137718319893f,   0.3893125355243683f,
                                      0.5016634166240692f,    0.6427869200706482f,   0.8614784181118011f};

/// Bit 3 is the sign. Code 8 is -0.0 in arithmetic; the stored quant_map holds +0.0 there.
constexpr float kFp4[16] = {0.0f,         0.0052083335f, 0.6666667f,   1.0f,           0.33333334f, 0.5f,
                            0.16666667f,  0.25f,         0.0f,         -0.0052083335f, -0.6666667f, -1.0f,
                            -0.33333334f, -0.5f,         -0.16666667f, -0.25f};

/// FP4 magnitudes: |x| > threshold[i] (strict, largest first) gives code[i]; below all of them, 0. Sign = x <
/// 0. These are the published literals; they are NOT the exact midpoints.
constexpr uint32_t kFp4ThresholdBits[7] = {0x3f555555, 0x3f155550, 0x3ed55556, 0x3e955555,
                                           0x3e555555, 0x3db00000, 0x3b2aaab9};
constexpr uint8_t kFp4Codes[7] = {3, 2, 5, 4, 7, 6, 1};

constexpr const float* codebook(QuantType type) { return type == QuantType::nf4 ? kNf4 : kFp4; }

// The 8-bit dynamic maps as fp32 bit patterns, ascending. Given by value: how they come about depends on the
// rounding of one particular linspace.
// clang-format off
constexpr uint32_t kDynamicSignedBits[256] = {
    0xbf7e3333, 0xbf7a999a, 0xbf770000, 0xbf736666, 0xbf6fcccd, 0xbf6c3333, 0xbf68999a, 0xbf650000,
    0xbf616666, 0xbf5dcccd, 0xbf5a3333, 0xbf56999a, 0xbf530000, 0xbf4f6666, 0xbf4bcccd, 0xbf483333,
    0xbf44999a, 0xbf410000, 0xbf3d6666, 0xbf39cccd, 0xbf363334, 0xbf32999a, 0xbf2f0000, 0xbf2b6666,
    0xbf27cccd, 0xbf243334, 0xbf20999a, 0xbf1d0000, 0xbf196666, 0xbf15cccd, 0xbf123334, 0xbf0e999a,
    0xbf0b0000, 0xbf076666, 0xbf03cccc, 0xbf003333, 0xbef93332, 0xbef20000, 0xbeeacccc, 0xbee3999a,
    0xbedc6666, 0xbed53333, 0xbece0000, 0xbec6cccc, 0xbebf999a, 0xbeb86666, 0xbeb13333, 0xbeaa0000,
    0xbea2cccc, 0xbe9b999a, 0xbe946666, 0xbe8d3334, 0xbe860000, 0xbe7d9999, 0xbe6f3333, 0xbe60cccd,
    0xbe526666, 0xbe440000, 0xbe35999a, 0xbe273333, 0xbe18cccd, 0xbe0a6666, 0xbdf80000, 0xbddb3334,
    0xbdc9eb85, 0xbdc428f7, 0xbdbe6667, 0xbdb8a3d7, 0xbdb2e148, 0xbdad1eb8, 0xbda75c2a, 0xbda1999a,
    0xbd9bd70a, 0xbd96147b, 0xbd9051eb, 0xbd8a8f5d, 0xbd84cccd, 0xbd7e147b, 0xbd728f5d, 0xbd670a3d,
    0xbd5b851f, 0xbd500000, 0xbd447ae1, 0xbd38f5c3, 0xbd2d70a3, 0xbd21eb85, 0xbd166667, 0xbd0ae148,
    0xbcfeb852, 0xbce7ae15, 0xbcd0a3d7, 0xbcb9999a, 0xbca28f5d, 0xbc8b851f, 0xbc68f5c3, 0xbc3ae148,
    0xbc1f3b64, 0xbc160418, 0xbc0ccccd, 0xbc039581, 0xbbf4bc6a, 0xbbe24dd3, 0xbbcfdf3b, 0xbbbd70a4,
    0xbbab020d, 0xbb989374, 0xbb8624dd, 0xbb676c8a, 0xbb428f5c, 0xbb1db22d, 0xbaf1a9fc, 0xbaa7ef9d,
    0xba7765ff, 0xba59e83e, 0xba3c6a80, 0xba1eecc1, 0xba016f01, 0xb9c7e283, 0xb98ce705, 0xb923d70b,
    0xb8ba1f4b, 0xb88aefb3, 0xb8378034, 0xb7b24206, 0xb70205ff, 0xb65a1a94, 0xb513a3b7, 0x00000000,
    0x3513a3b7, 0x365a1a94, 0x370205ff, 0x37b24206, 0x38378034, 0x388aefb3, 0x38ba1f4b, 0x3923d70b,
    0x398ce705, 0x39c7e283, 0x3a016f01, 0x3a1eecc1, 0x3a3c6a80, 0x3a59e83e, 0x3a7765ff, 0x3aa7ef9d,
    0x3af1a9fc, 0x3b1db22d, 0x3b428f5c, 0x3b676c8a, 0x3b8624dd, 0x3b989374, 0x3bab020d, 0x3bbd70a4,
    0x3bcfdf3b, 0x3be24dd3, 0x3bf4bc6a, 0x3c039581, 0x3c0ccccd, 0x3c160418, 0x3c1f3b64, 0x3c3ae148,
    0x3c68f5c3, 0x3c8b851f, 0x3ca28f5d, 0x3cb9999a, 0x3cd0a3d7, 0x3ce7ae15, 0x3cfeb852, 0x3d0ae148,
    0x3d166667, 0x3d21eb85, 0x3d2d70a3, 0x3d38f5c3, 0x3d447ae1, 0x3d500000, 0x3d5b851f, 0x3d670a3d,
    0x3d728f5d, 0x3d7e147b, 0x3d84cccd, 0x3d8a8f5d, 0x3d9051eb, 0x3d96147b, 0x3d9bd70a, 0x3da1999a,
    0x3da75c2a, 0x3dad1eb8, 0x3db2e148, 0x3db8a3d7, 0x3dbe6667, 0x3dc428f7, 0x3dc9eb85, 0x3ddb3334,
    0x3df80000, 0x3e0a6666, 0x3e18cccd, 0x3e273333, 0x3e35999a, 0x3e440000, 0x3e526666, 0x3e60cccd,
    0x3e6f3333, 0x3e7d9999, 0x3e860000, 0x3e8d3334, 0x3e946666, 0x3e9b999a, 0x3ea2cccc, 0x3eaa0000,
    0x3eb13333, 0x3eb86666, 0x3ebf999a, 0x3ec6cccc, 0x3ece0000, 0x3ed53333, 0x3edc6666, 0x3ee3999a,
    0x3eeacccc, 0x3ef20000, 0x3ef93332, 0x3f003333, 0x3f03cccc, 0x3f076666, 0x3f0b0000, 0x3f0e999a,
    0x3f123334, 0x3f15cccd, 0x3f196666, 0x3f1d0000, 0x3f20999a, 0x3f243334, 0x3f27cccd, 0x3f2b6666,
    0x3f2f0000, 0x3f32999a, 0x3f363334, 0x3f39cccd, 0x3f3d6666, 0x3f410000, 0x3f44999a, 0x3f483333,
    0x3f4bcccd, 0x3f4f6666, 0x3f530000, 0x3f56999a, 0x3f5a3333, 0x3f5dcccd, 0x3f616666, 0x3f650000,
    0x3f68999a, 0x3f6c3333, 0x3f6fcccd, 0x3f736666, 0x3f770000, 0x3f7a999a, 0x3f7e3333, 0x3f800000,
};
constexpr uint32_t kDynamicUnsignedBits[256] = {
    0x00000000, 0x34ae7baa, 0x35500998, 0x360e9b38, 0x3692ccf6, 0x36de4c51, 0x3714e5d5, 0x3783126e,
    0x37e171a0, 0x381fe868, 0x384f1800, 0x387e479a, 0x3896bb99, 0x38ae5364, 0x38c5eb31, 0x3906594b,
    0x394154ca, 0x397c5049, 0x399ba5e4, 0x39b923a2, 0x39d6a163, 0x39f41f22, 0x3a08ce71, 0x3a178d50,
    0x3a264c30, 0x3a350b10, 0x3a43c9ef, 0x3a5288d0, 0x3a6147af, 0x3a70068e, 0x3a7ec56e, 0x3a958106,
    0x3aba5e35, 0x3adf3b64, 0x3b020c4a, 0x3b147ae1, 0x3b26e978, 0x3b395810, 0x3b4bc6a7, 0x3b5e3540,
    0x3b70a3d7, 0x3b818937, 0x3b8ac082, 0x3b93f7cf, 0x3b9d2f1a, 0x3ba66666, 0x3baf9db2, 0x3bb8d4fd,
    0x3bc20c4a, 0x3bcb4395, 0x3bd47ae1, 0x3bddb22e, 0x3be6e978, 0x3bf020c5, 0x3bf9580f, 0x3c0147ae,
    0x3c05e354, 0x3c0a7ef9, 0x3c0f1aa0, 0x3c13b645, 0x3c1851eb, 0x3c1ced92, 0x3c218937, 0x3c2f5c2a,
    0x3c466667, 0x3c5d70a3, 0x3c747ae2, 0x3c85c28f, 0x3c9147af, 0x3c9ccccd, 0x3ca851eb, 0x3cb3d70b,
    0x3cbf5c29, 0x3ccae147, 0x3cd66667, 0x3ce1eb87, 0x3ced70a3, 0x3cf8f5c3, 0x3d023d70, 0x3d080000,
    0x3d0dc28f, 0x3d13851f, 0x3d1947af, 0x3d1f0a3d, 0x3d24cccd, 0x3d2a8f5c, 0x3d3051eb, 0x3d36147b,
    0x3d3bd70a, 0x3d41999a, 0x3d475c28, 0x3d4d1eb8, 0x3d52e147, 0x3d58a3d7, 0x3d5e6667, 0x3d6428f7,
    0x3d69eb87, 0x3d6fae15, 0x3d7570a3, 0x3d7b3333, 0x3d807ae2, 0x3d835c2a, 0x3d863d71, 0x3d891eb8,
    0x3d8c0000, 0x3d8ee148, 0x3d91c290, 0x3d94a3d7, 0x3d97851f, 0x3d9a6667, 0x3d9d47af, 0x3da028f6,
    0x3da30a3e, 0x3da5eb85, 0x3da8cccd, 0x3dabae15, 0x3dae8f5c, 0x3db170a4, 0x3db451eb, 0x3db73333,
    0x3dba147b, 0x3dbcf5c3, 0x3dbfd70b, 0x3dc2b852, 0x3dc5999a, 0x3dc87ae2, 0x3dcb5c29, 0x3dd40000,
    0x3de26666, 0x3df0cccd, 0x3dff3333, 0x3e06cccc, 0x3e0e0000, 0x3e153334, 0x3e1c6666, 0x3e23999a,
    0x3e2acccc, 0x3e320000, 0x3e393334, 0x3e406666, 0x3e47999a, 0x3e4ecccc, 0x3e560000, 0x3e5d3334,
    0x3e646666, 0x3e6b999a, 0x3e72cccc, 0x3e7a0000, 0x3e809999, 0x3e843333, 0x3e87cccd, 0x3e8b6666,
    0x3e8f0000, 0x3e92999a, 0x3e963333, 0x3e99cccc, 0x3e9d6666, 0x3ea10000, 0x3ea4999a, 0x3ea83333,
    0x3eabcccc, 0x3eaf6666, 0x3eb30000, 0x3eb6999a, 0x3eba3333, 0x3ebdcccc, 0x3ec16666, 0x3ec50000,
    0x3ec8999a, 0x3ecc3333, 0x3ecfcccc, 0x3ed36666, 0x3ed70000, 0x3eda999a, 0x3ede3333, 0x3ee1cccc,
    0x3ee56666, 0x3ee90000, 0x3eec999a, 0x3ef03333, 0x3ef3cccc, 0x3ef76666, 0x3efb0000, 0x3efe9999,
    0x3f01199a, 0x3f02e666, 0x3f04b333, 0x3f068000, 0x3f084ccc, 0x3f0a199a, 0x3f0be666, 0x3f0db334,
    0x3f0f8000, 0x3f114ccd, 0x3f13199a, 0x3f14e666, 0x3f16b334, 0x3f188000, 0x3f1a4ccd, 0x3f1c199a,
    0x3f1de666, 0x3f1fb334, 0x3f218000, 0x3f234ccd, 0x3f25199a, 0x3f26e666, 0x3f28b334, 0x3f2a8000,
    0x3f2c4ccd, 0x3f2e199a, 0x3f2fe666, 0x3f31b334, 0x3f338000, 0x3f354ccd, 0x3f37199a, 0x3f38e666,
    0x3f3ab334, 0x3f3c8000, 0x3f3e4ccd, 0x3f40199a, 0x3f41e666, 0x3f43b334, 0x3f458000, 0x3f474ccc,
    0x3f49199a, 0x3f4ae666, 0x3f4cb334, 0x3f4e8000, 0x3f504ccc, 0x3f52199a, 0x3f53e666, 0x3f55b334,
    0x3f578000, 0x3f594ccc, 0x3f5b199a, 0x3f5ce666, 0x3f5eb334, 0x3f608000, 0x3f624ccc, 0x3f64199a,
    0x3f65e666, 0x3f67b334, 0x3f698000, 0x3f6b4ccc, 0x3f6d199a, 0x3f6ee666, 0x3f70b334, 0x3f728000,
    0x3f744ccc, 0x3f76199a, 0x3f77e666, 0x3f79b334, 0x3f7b8000, 0x3f7d4ccc, 0x3f7f199a, 0x3f800000,
};
// clang-format on

/// A 16-bit float in memory, so that code can be written once for every float type.
struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

/// 1 / 127 and 1 / 127^2 as LLM.int8() rounds them.
constexpr float kInt8Scale = 7.874015718698502e-3f;
constexpr float kInt8ProductScale = 6.200012e-05f;

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

// What the GPU's reciprocal instruction adds to the correctly rounded one in units of the last place, 2 bits
// each (0, 1 or 3 for -1), by the ten leading bits of the mantissa. Measured; it does not depend on the
// exponent.
// clang-format off
constexpr uint64_t kReciprocalCorrections[32] = {
    0x0000011430403000, 0x3000000130000003, 0x0043f0000c003000, 0xf000000400050014,
    0x000401400010c000, 0x000000c300000003, 0x0cc0300401400000, 0x0100000000000014,
    0xc000003000000100, 0x0000000500110000, 0x0c10000000000c00, 0x0000004000000000,
    0xc005004c01400010, 0x0cc0400000040004, 0x003c004000101404, 0x0044001000010004,
    0x4000004100054000, 0x0000014030000040, 0x0000000000000000, 0x0000004000003000,
    0x0040000000514000, 0x0500000040000140, 0x0001010000000000, 0x00000000c0000000,
    0x00000454c0000000, 0x0000400004004400, 0x0000000000000000, 0x0400000011110000,
    0x0041000000000000, 0x0f30300100000001, 0x0140000000010c00, 0x0003003000000400,
};
// clang-format on

/// 1 / x as bitsandbytes' kernels compute it on a GPU (rcp.approx.ftz), for x normal and positive. Bit for
/// bit when x has at most ten mantissa bits, that is for every float16 and bfloat16 value; within one unit of
/// the last place otherwise.
inline float approximate_reciprocal(float x) {
  const uint32_t bits = float_to_bits(x);
  const float rounded = 1.0f / x;
  if (bits & 0x1fffu) return rounded;
  const uint32_t index = (bits >> 13) & 1023u;
  const uint32_t correction = (kReciprocalCorrections[index / 32] >> (2 * (index % 32))) & 3u;
  return bits_to_float(float_to_bits(rounded) + (correction == 3u ? 0xffffffffu : correction));
}

inline float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

/// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
  const uint32_t bits = float_to_bits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest >= 0x0400u) return bits_to_float(sign | ((rest << 13) + 0x38000000u));
  // subnormal: rest * 2^-24 is exact in fp32
  const float f = static_cast<float>(rest) * 5.9604644775390625e-8f;
  return bits_to_float(sign | float_to_bits(f));
}

/// Round to nearest even, subnormals included; overflow gives infinity.
inline uint16_t float_to_f16(float f) {
  const uint32_t bits = float_to_bits(f);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t mag = bits & 0x7fffffffu;
  if (mag > 0x7f800000u) return sign | 0x7e00u;
  if (mag >= 0x477ff000u) return sign | 0x7c00u;
  if (mag < 0x38800000u) {
    // adding 0.5 aligns the mantissa so that the FPU does the rounding at 2^-24
    const float shifted = bits_to_float(mag) + 0.5f;
    return sign | static_cast<uint16_t>(float_to_bits(shifted) - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13);
}

inline float to_float(float x) { return x; }
inline float to_float(F16 x) { return f16_to_float(x.bits); }
inline float to_float(BF16 x) { return bf16_to_float(x.bits); }
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, F16* out) { out->bits = float_to_f16(x); }
inline void from_float(float x, BF16* out) { out->bits = float_to_bf16(x); }

}  // namespace halfbyte
