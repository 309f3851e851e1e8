// Parts of a workspace.
#pragma once

#include "backend.h"

namespace halfbyte {

/// Parts start where any access is aligned.
inline size_t round_up(size_t bytes) { return (bytes + 255) / 256 * 256; }

inline View part_of(const View& workspace, size_t from, size_t bytes) {
  View part = workspace;
  part.data = workspace.as<char>() + from;
  part.shape[0] = static_cast<int64_t>(bytes);
  return part;
}

}  // namespace halfbyte
