// SPDX-License-Identifier: GPL-2.0-only
#define LOCUS_MANY 1
#include "../many.h"
