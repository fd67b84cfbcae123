// The solver list: one line per method. Launcher, schema, fake kernel and binding exist once and read it.
#pragma once
#include "aligned_mtl.h"
#include "cagrad.h"
#include "conflict_free.h"
#include "dual_cone.h"
#include "fairgrad.h"
#include "gradvac.h"
#include "imtlg.h"
#include "krum.h"
#include "mgda.h"
#include "modo.h"
#include "nash_mtl.h"
#include "norm_balance.h"
#include "pcd.h"
#include "pcgrad.h"
#include "sdmgrad.h"

namespace mtlfast::solvers {

template <class... Methods>
struct SolverList {
  // Calls use(Method{}) with each of them.
  template <class Use>
  static void for_each(Use use) {
    (use(Methods{}), ...);
  }

  // Calls use(Method{}) with the one of that name, or returns false.
  template <class Use>
  static bool visit(const char* name, Use use) {
    const auto same = [](const char* a, const char* b) {
      while (*a && *a == *b) ++a, ++b;
      return *a == *b;
    };
    return ((same(Methods::name, name) && (use(Methods{}), true)) || ...);
  }
};

using Solvers = SolverList<PCGrad,              //
                           PCGradCoefficients,  //
                           GradVac,             //
                           MGDA,                //
                           CAGrad,              //
                           UPGrad,              //
                           DualProj,            //
                           PCD,                 //
                           Krum,                //
                           AlignedMTL,          //
                           IMTLG,               //
                           ConFIG,              //
                           NashMTL,             //
                           FairGrad,            //
                           NormBalance,         //
                           ClipNorm,            //
                           CrossNorm,           //
                           InverseNorm,         //
                           MoDo,                //
                           SDMGrad>;

}  // namespace mtlfast::solvers
