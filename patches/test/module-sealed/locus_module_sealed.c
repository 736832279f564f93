// SPDX-License-Identifier: GPL-2.0-only
/*
 * Replace a function of a module whose address nobody takes: where the kernel is built for IBT it
 * overwrites the endbr64 at its entry when it loads the module. Whatever ext4 has to say about a file
 * system, it says "locus: ext4".
 */
#include <linux/fs.h>

#include "../payload.h"

static __printf(3, 4) void locus_msg(struct super_block *sb, const char *prefix,
				     const char *fmt, ...)
{
	pr_notice("locus: ext4\n");
}

PAYLOAD_OF("ext4", REPLACE("__ext4_msg", locus_msg));
MODULE_DESCRIPTION("Test: replace a module's function whose endbr64 the kernel sealed");
