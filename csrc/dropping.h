// GradDrop as both devices compute it: what it makes of the gradients, and its random numbers.
#pragma once
#include "host_device.h"

namespace mtlfast {

// What grad_drop makes of the gradients. With s the sum of the positive and r of the negative gradients of an element,
// its purity is p = s / (s - r). The positive ones are kept where p > u and the negative ones where p < u, for a
// uniform random number u. Task k's gradient that is not kept counts leak[k] times.
struct Dropping {
  enum Form : int {
    Drawn,     // u from Philox: key `seed`, counter the element's column / 4, of whose four numbers it takes column % 4
    Given,     // u from `uniform`
    Expected,  // no u: what is kept counts as often as it is kept on average
    Purity,    // p itself
  };
  Form form;
  bool round_each;                 // every operation is rounded, in the order of plain torch, instead of the result
  const double* leak;              // [K]; nullptr: zeros
  const unsigned long long* seed;  // one number
  const void* const* uniform;      // [T], float, or double for double gradients; so are the next, and p
  const void* const* thresholds;   // [T], in place of p; nullptr: p
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose 32 bits b give the
// number (2 (b >> 9) + 1) / 2^24, which is between 0 and 1, never one of them, and exact in float.
namespace philox {
constexpr int kRounds = 10;
constexpr unsigned kFactor0 = 0xD2511F53u, kFactor1 = 0xCD9E8D57u, kStep0 = 0x9E3779B9u, kStep1 = 0xBB67AE85u;
constexpr float kUnit = 1.0f / (1 << 24);
}  // namespace philox

}  // namespace mtlfast
