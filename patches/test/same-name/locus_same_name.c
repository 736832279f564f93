// SPDX-License-Identifier: GPL-2.0-only
/*
 * Two files of the kernel have a function control_show(): kernel/cpu.c, for
 * /sys/devices/system/cpu/smt/control, and behind it drivers/base/power/sysfs.c, for power/control of
 * every device. The second is replaced.
 */
#include <linux/device.h>
#include <linux/sysfs.h>

#include "../payload.h"

static ssize_t locus_control_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "locus\n");
}

PAYLOAD(REPLACE_NTH("control_show", 2, locus_control_show));
MODULE_DESCRIPTION("Test: one of two functions of the same name");
