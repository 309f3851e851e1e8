#pragma once

#include <string>

#include "convert.h"

namespace halfbyte {

void define_file_class(Environment& self);
napi_value make_file(Environment& self, const std::string& path);

}  // namespace halfbyte
