// SPDX-License-Identifier: GPL-2.0-only
/*
 * Replace a function whose address nobody takes: a kernel that is built for IBT overwrites the
 * endbr64 at its entry at boot. /proc/meminfo gets the line "LocusSealed" in the place of "DirectMap...".
 */
#include "../payload.h"

static void locus_sealed_report(struct seq_file *m)
{
	seq_puts(m, "LocusSealed:           1 kB\n");
}

PAYLOAD(REPLACE("arch_report_meminfo", locus_sealed_report));
MODULE_DESCRIPTION("Test: replace a function whose endbr64 the kernel sealed");
