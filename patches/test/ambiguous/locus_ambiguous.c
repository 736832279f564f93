// SPDX-License-Identifier: GPL-2.0-only
/*
 * Must be refused: the kernel has two functions control_show(), and nothing says which is meant.
 */
#include <linux/device.h>
#include <linux/sysfs.h>

#include "../payload.h"

static ssize_t locus_control_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "locus\n");
}

PAYLOAD(REPLACE("control_show", locus_control_show));
MODULE_DESCRIPTION("Test: a name that several functions have");
