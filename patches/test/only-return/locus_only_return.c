// SPDX-License-Identifier: GPL-2.0-only
/*
 * Replace a function that only returns: `ret`, or a jump to the return thunk where the processor
 * needs one. /proc/net/softnet_stat gets the line "locus" at its end.
 */
#include "../payload.h"

static void locus_only_return_stop(struct seq_file *m, void *v)
{
	seq_puts(m, "locus\n");
}

PAYLOAD(REPLACE("softnet_seq_stop", locus_only_return_stop));
MODULE_DESCRIPTION("Test: replace a function that only returns");
