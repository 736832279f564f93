// SPDX-License-Identifier: GPL-2.0-only
/*
 * Replace a function that is nothing but a jump to another one, in the way the compiler makes a
 * function of another with the same code. /sys/devices/system/cpu/cpu0/topology/core_cpus_list says
 * "locus", and thread_siblings_list, to whose function it jumped, says what it said.
 */
#include <linux/fs.h>
#include <linux/kobject.h>
#include <linux/string.h>

#include "../payload.h"

static ssize_t locus_tail_call_read(struct file *file, struct kobject *kobj, void *attr,
				    char *buf, loff_t off, size_t count)
{
	static const char text[] = "locus\n";

	return memory_read_from_buffer(buf, count, &off, text, sizeof(text) - 1);
}

PAYLOAD(REPLACE("core_cpus_list_read", locus_tail_call_read));
MODULE_DESCRIPTION("Test: replace a function that begins with a tail call");
