// Which instruction set runs: the best the processor has, unless the caller forces another.
#pragma once

#include <string>
#include <vector>

#include "rows.h"

namespace fastloss {

// Best first. Only what this processor can execute.
std::vector<std::string> available_isas();
const std::string& current_isa();
// Throws std::invalid_argument unless `isa` is available.
void use_isa(const std::string& isa);

const Kernels& kernels(DType dtype);

}  // namespace fastloss
