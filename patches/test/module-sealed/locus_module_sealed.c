// SPDX-License-Identifier: GPL-2.0-only
/*
 * Replace a function of a module whose address nobody takes: where the kernel is built for IBT it
 * overwrites the endbr64 at its entry when it loads the module. Folders of ext4 look empty, because
 * each entry is called bad, and skipped.
 */
#include <linux/fs.h>

#include "../payload.h"

static int locus_bad_entry(const char *function, unsigned int line, struct inode *dir)
{
	return 1;
}

PAYLOAD_OF("ext4", REPLACE("__ext4_check_dir_entry", locus_bad_entry));
MODULE_DESCRIPTION("Test: replace a module's function whose endbr64 the kernel sealed");
