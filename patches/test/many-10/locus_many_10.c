// SPDX-License-Identifier: GPL-2.0-only
#define LOCUS_MANY 10
#include "../many.h"
