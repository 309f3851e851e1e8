// The limits of the CPU, measured off the event loop.
#pragma once

#include "convert.h"

namespace halfbyte {

/// A promise of [bytes read per second, fp32 operations per second].
napi_value cpu_peaks(Call& call);

}  // namespace halfbyte
