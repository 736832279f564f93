// SPDX-License-Identifier: GPL-2.0-only
/*
 * The same as ../sleeper, and says so: a thread may go on sleeping in either version.
 */
#include "../sleeper/locus_sleeper.c"

MODULE_INFO(entry_only, "Y");
