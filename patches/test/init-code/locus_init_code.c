// SPDX-License-Identifier: GPL-2.0-only
/*
 * Must be refused: the new function is itself __init, and so is never placed.
 */

#include "../payload.h"

static int __init locus_init_code_show(struct seq_file *m, void *v)
{
	seq_puts(m, "gone\n");
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_init_code_show));
MODULE_DESCRIPTION("Test: replacement code that is __init");
