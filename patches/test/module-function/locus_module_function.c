// SPDX-License-Identifier: GPL-2.0-only
/*
 * Replace a function of a module: the files of /sys/fs/ext4/features say "locus" in the place of
 * "supported".
 */
#include <linux/kobject.h>
#include <linux/sysfs.h>

#include "../payload.h"

static ssize_t locus_attr_show(struct kobject *kobj, struct attribute *attr, char *buf)
{
	return sysfs_emit(buf, "locus %s\n", attr->name);
}

PAYLOAD_OF("ext4", REPLACE("ext4_attr_show", locus_attr_show));
MODULE_DESCRIPTION("Test: replace a function of a module");
