// SPDX-License-Identifier: GPL-2.0-only
#define LOCUS_MANY 100
#include "../many.h"
