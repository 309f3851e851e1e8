#include "cublaslt.h"

#include <dlfcn.h>
#include <glob.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace halfbyte::cuda {
namespace {

// The library's C interface, as far as it is used. Values are its published ABI.
using Handle = void*;
using Desc = void*;
using Layout = void*;
using Preference = void*;
struct Algo {
  uint64_t data[8];
};
struct Heuristic {
  Algo algo;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
constexpr int kCompute32F = 68, kCompute32I = 72;
constexpr int kDescTransA = 3;
constexpr int kPreferenceWorkspace = 1;
constexpr int kTranspose = 1;

struct Library {
  std::string where;
  bool found = false;
  int (*create)(Handle*) = nullptr;
  int (*desc_create)(Desc*, int compute, cudaDataType_t scale) = nullptr;
  int (*desc_destroy)(Desc) = nullptr;
  int (*desc_set)(Desc, int attribute, const void*, size_t) = nullptr;
  int (*layout_create)(Layout*, cudaDataType_t, uint64_t rows, uint64_t cols, int64_t ld) = nullptr;
  int (*layout_destroy)(Layout) = nullptr;
  int (*preference_create)(Preference*) = nullptr;
  int (*preference_destroy)(Preference) = nullptr;
  int (*preference_set)(Preference, int attribute, const void*, size_t) = nullptr;
  int (*heuristic)(Handle, Desc, Layout a, Layout b, Layout c, Layout d, Preference, int wanted, Heuristic*,
                   int* found) = nullptr;
  int (*matmul)(Handle, Desc, const void* alpha, const void* a, Layout, const void* b, Layout,
                const void* beta, const void* c, Layout, void* d, Layout, const Algo*, void* workspace,
                size_t, cudaStream_t) = nullptr;
};

std::vector<std::string> candidates() {
  if (const char* named = std::getenv("HALFBYTE_CUBLASLT"); named && *named) {
    if (std::string(named) == "off") return {};
    return {named};
  }
  std::vector<std::string> paths;
  for (const char* version : {"13", "12"}) {
    const std::string file = std::string("libcublasLt.so.") + version;
    paths.push_back(file);
    paths.push_back("/usr/local/cuda/lib64/" + file);
    for (const char* pattern :
         {"/usr/lib/python3*/*-packages/nvidia/*/lib/", "/usr/local/lib/python3*/*-packages/nvidia/*/lib/",
          "/opt/*/lib/python3*/site-packages/nvidia/*/lib/"}) {
      glob_t matches{};
      if (glob((pattern + file).c_str(), 0, nullptr, &matches) == 0) {
        for (size_t i = 0; i < matches.gl_pathc; ++i) paths.emplace_back(matches.gl_pathv[i]);
      }
      globfree(&matches);
    }
  }
  return paths;
}

Library load() {
  Library lib;
  for (const std::string& path : candidates()) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
      lib.where += (lib.where.empty() ? "" : ", ") + path;
      continue;
    }
    bool whole = true;
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
      whole = whole && function;
    };
    find(lib.create, "cublasLtCreate");
    find(lib.desc_create, "cublasLtMatmulDescCreate");
    find(lib.desc_destroy, "cublasLtMatmulDescDestroy");
    find(lib.desc_set, "cublasLtMatmulDescSetAttribute");
    find(lib.layout_create, "cublasLtMatrixLayoutCreate");
    find(lib.layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(lib.preference_create, "cublasLtMatmulPreferenceCreate");
    find(lib.preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(lib.preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(lib.heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(lib.matmul, "cublasLtMatmul");
    if (whole) {
      lib.where = path;
      lib.found = true;
      return lib;
    }
    dlclose(handle);
  }
  return lib;
}

const Library& library() {
  static const Library lib = load();
  return lib;
}

/// A product's descriptors and chosen algorithm, kept for the next call of the same shape.
struct Plan {
  bool usable = false;
  Desc desc = nullptr;
  Layout a = nullptr, b = nullptr, c = nullptr;
  Algo algo{};
};

struct Device {
  Handle handle = nullptr;
  std::map<std::tuple<int, int, int64_t, int64_t, int64_t, int, size_t>, Plan> plans;
};

int alignment_of(const DenseProduct& p) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(p.a) | reinterpret_cast<uintptr_t>(p.b) |
                   reinterpret_cast<uintptr_t>(p.d) | reinterpret_cast<uintptr_t>(p.c);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

Plan make_plan(const Library& lib, Handle handle, const DenseProduct& p, size_t workspace_bytes) {
  Plan plan;
  const bool integer = p.type == CUDA_R_8I;
  // The library is column-major: our row-major D [M, N] is its D^T [N, M] = B^T' A', with B read transposed.
  if (lib.desc_create(&plan.desc, integer ? kCompute32I : kCompute32F, integer ? CUDA_R_32I : CUDA_R_32F))
    return plan;
  lib.desc_set(plan.desc, kDescTransA, &kTranspose, sizeof kTranspose);
  Preference preference = nullptr;
  if (lib.layout_create(&plan.a, p.type, p.k, p.n, p.k) ||
      lib.layout_create(&plan.b, p.type, p.k, p.m, p.k) ||
      lib.layout_create(&plan.c, p.result_type, p.n, p.m, p.n) || lib.preference_create(&preference)) {
    return plan;
  }
  lib.preference_set(preference, kPreferenceWorkspace, &workspace_bytes, sizeof workspace_bytes);
  // minimum alignments of A, B, C, D: attributes 5 .. 8
  const uint32_t alignment = static_cast<uint32_t>(alignment_of(p));
  for (int attribute = 5; attribute <= 8; ++attribute) {
    lib.preference_set(preference, attribute, &alignment, sizeof alignment);
  }
  Heuristic best{};
  int found = 0;
  if (lib.heuristic(handle, plan.desc, plan.a, plan.b, plan.c, plan.c, preference, 1, &best, &found) == 0 &&
      found > 0) {
    plan.algo = best.algo;
    plan.usable = best.workspace <= workspace_bytes;
  }
  lib.preference_destroy(preference);
  return plan;
}

}  // namespace

bool has_cublaslt(std::string* where) {
  if (where) *where = library().where;
  return library().found;
}

bool cublaslt_product(int device, cudaStream_t stream, const DenseProduct& p, void* workspace,
                      size_t workspace_bytes) {
  const Library& lib = library();
  if (!lib.found) return false;
  static std::mutex mutex;
  static std::map<int, Device> devices;
  std::lock_guard<std::mutex> lock(mutex);
  Device& state = devices[device];
  if (!state.handle && lib.create(&state.handle) != 0) return false;
  const auto key = std::make_tuple(static_cast<int>(p.type), static_cast<int>(p.result_type), p.m, p.n, p.k,
                                   alignment_of(p), workspace_bytes);
  auto found = state.plans.find(key);
  if (found == state.plans.end()) {
    // shapes of a prefill differ from call to call: keep the map small
    if (state.plans.size() >= 512) {
      for (auto& [unused, plan] : state.plans) {
        if (plan.desc) lib.desc_destroy(plan.desc);
        for (Layout layout : {plan.a, plan.b, plan.c}) {
          if (layout) lib.layout_destroy(layout);
        }
      }
      state.plans.clear();
    }
    found = state.plans.emplace(key, make_plan(lib, state.handle, p, workspace_bytes)).first;
  }
  const Plan& plan = found->second;
  if (!plan.usable) return false;
  const float one = 1.0f, beta = p.c ? 1.0f : 0.0f;
  const int32_t one_i = 1, beta_i = p.c ? 1 : 0;
  const bool integer = p.type == CUDA_R_8I;
  return lib.matmul(state.handle, plan.desc, integer ? static_cast<const void*>(&one_i) : &one, p.b, plan.a,
                    p.a, plan.b, integer ? static_cast<const void*>(&beta_i) : &beta, p.c ? p.c : p.d, plan.c,
                    p.d, plan.c, &plan.algo, workspace, workspace_bytes, stream) == 0;
}

}  // namespace halfbyte::cuda
