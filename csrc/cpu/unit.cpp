// The table of one instruction set's kernels.
#include "kernels.h"

#define MTLFAST_TEXT_(name) #name
#define MTLFAST_TEXT(name) MTLFAST_TEXT_(name)

namespace mtlfast::MTLFAST_ISA {

void gram(const TaskView&, int64_t, int64_t, int64_t, bool, void*, double*);
void square_sums(const TaskView&, int64_t, int64_t, void*, double*);
int64_t gram_scratch(int64_t, DType);
void combine(const TaskView&, int64_t, int64_t, const double*, int64_t, DType, bool, void*, void* const*);
int64_t combine_scratch(int64_t, int64_t);
void grad_drop(const TaskView&, int64_t, int64_t, const Dropping&, void*, void* const*);
int64_t grad_drop_scratch(int64_t);
void trimmed_mean(const TaskView&, int64_t, int64_t, int64_t, void*, void* const*);
int64_t trimmed_mean_scratch(int64_t);
void flatten(const TaskView&, int64_t, int64_t, DType, int64_t, void*);
uint32_t read(const TaskView&, int64_t, int64_t, int64_t);
void scale(const TaskView&, int64_t, int64_t, const double*);
void advance(const TaskView&, const TaskView&, int64_t, int64_t, const double*, bool, DType, void* const*);
void excess_risks(const TaskView&, const TaskView&, int64_t, int64_t, double, const double*, double*);

extern const CpuKernels kernels;
// Each kernel is assigned by the name of its field, so that one that is missing or out of order does not compile.
const CpuKernels kernels = {
    .isa = MTLFAST_TEXT(MTLFAST_ISA),
    .gram = gram,
    .square_sums = square_sums,
    .gram_scratch = gram_scratch,
    .combine = combine,
    .combine_scratch = combine_scratch,
    .grad_drop = grad_drop,
    .grad_drop_scratch = grad_drop_scratch,
    .trimmed_mean = trimmed_mean,
    .trimmed_mean_scratch = trimmed_mean_scratch,
    .flatten = flatten,
    .scale = scale,
    .advance = advance,
    .excess_risks = excess_risks,
    .read = read,
};

}  // namespace mtlfast::MTLFAST_ISA
