// SPDX-License-Identifier: GPL-2.0-only
/*
 * Must be refused: it says that it was made for a kernel of another build, though vermagic fits.
 */
#include <linux/utsname.h>

#include "../payload.h"

static int locus_version_show(struct seq_file *m, void *v)
{
	seq_printf(m, "%s locus\n", utsname()->release);
	return 0;
}

PAYLOAD(REPLACE("version_proc_show", locus_version_show));
MODULE_INFO(target_build_id, "0123456789abcdef0123456789abcdef01234567");
MODULE_DESCRIPTION("Test: a payload for another build of the kernel");
