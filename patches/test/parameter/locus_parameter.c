// SPDX-License-Identifier: GPL-2.0-only
/*
 * Must be refused: a parameter is set and shown by the loader that runs in the guest.
 */

#include "../payload.h"

static int locus_number = 5;
module_param(locus_number, int, 0644);

static int locus_parameter_show(struct seq_file *m, void *v)
{
	seq_printf(m, "%d\n", locus_number);
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_parameter_show));
MODULE_DESCRIPTION("Test: a module parameter");
