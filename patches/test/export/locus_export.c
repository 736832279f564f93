// SPDX-License-Identifier: GPL-2.0-only
/*
 * Must be refused: nobody in the guest learns of a symbol that it exports.
 */
#include <linux/export.h>

#include "../payload.h"

int locus_exported(void);

int locus_exported(void)
{
	return 1;
}
EXPORT_SYMBOL_GPL(locus_exported);

static int locus_export_show(struct seq_file *m, void *v)
{
	seq_printf(m, "%d\n", locus_exported());
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_export_show));
MODULE_DESCRIPTION("Test: an exported symbol");
