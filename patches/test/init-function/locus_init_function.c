// SPDX-License-Identifier: GPL-2.0-only
/*
 * Must be refused: the kernel has given back the memory of start_kernel(), which is __init.
 */

#include "../payload.h"

static void locus_start_kernel(void)
{
	pr_info("started\n");
}

PAYLOAD(REPLACE("start_kernel", locus_start_kernel));
MODULE_DESCRIPTION("Test: replaces an __init function");
