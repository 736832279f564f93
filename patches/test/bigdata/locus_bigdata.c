// SPDX-License-Identifier: GPL-2.0-only
/*
 * More data than a guest can take along when it is restored: refused on every type of guest.
 */
#include "../payload.h"

static u8 locus_room[1200 * 1024] = { 1 };

static int locus_bigdata_show(struct seq_file *m, void *v)
{
	locus_room[sizeof(locus_room) - 1]++;
	seq_printf(m, "first=%u\n", locus_room[0]);
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_bigdata_show));
MODULE_DESCRIPTION("Test: 1.2 MiB of data");
