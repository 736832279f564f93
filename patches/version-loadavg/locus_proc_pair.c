// SPDX-License-Identifier: GPL-2.0-only
/*
 * Replace two functions of two source files in one step:
 * version_proc_show() (fs/proc/version.c) and loadavg_proc_show()
 * (fs/proc/loadavg.c). Each gives what the original gives, plus a marker.
 *
 * Both reach into parts of the kernel that are not exported: a constant
 * (linux_proc_banner), a variable (nr_threads) and functions (get_avenrun(),
 * nr_running()). The original of the first also reads the current task, which
 * is per-CPU data of the kernel.
 */
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/pid_namespace.h>
#include <linux/sched.h>
#include <linux/sched/loadavg.h>
#include <linux/sched/stat.h>
#include <linux/seq_file.h>
#include <linux/utsname.h>

/* The banner ends its line, so the marker is a line of its own. */
static int locus_version_proc_show(struct seq_file *m, void *v)
{
	seq_printf(m, linux_proc_banner,
		   utsname()->sysname,
		   utsname()->release,
		   utsname()->version);
	seq_puts(m, "locus=live\n");
	return 0;
}

/* The marker is a sixth field: readers of the first five are not disturbed. */
static int locus_loadavg_proc_show(struct seq_file *m, void *v)
{
	unsigned long avnrun[3];

	get_avenrun(avnrun, FIXED_1 / 200, 0);

	seq_printf(m, "%lu.%02lu %lu.%02lu %lu.%02lu %u/%d %d locus=live\n",
		   LOAD_INT(avnrun[0]), LOAD_FRAC(avnrun[0]),
		   LOAD_INT(avnrun[1]), LOAD_FRAC(avnrun[1]),
		   LOAD_INT(avnrun[2]), LOAD_FRAC(avnrun[2]),
		   nr_running(), nr_threads,
		   idr_get_cursor(&task_active_pid_ns(current)->idr) - 1);
	return 0;
}

static struct klp_func locus_proc_pair_funcs[] = {
	{
		.old_name = "version_proc_show",
		.new_func = locus_version_proc_show,
	},
	{
		.old_name = "loadavg_proc_show",
		.new_func = locus_loadavg_proc_show,
	},
	{ }
};

static struct klp_object locus_proc_pair_objs[] = {
	{
		.funcs = locus_proc_pair_funcs,
	},
	{ }
};

static struct klp_patch locus_proc_pair_patch = {
	.mod = THIS_MODULE,
	.objs = locus_proc_pair_objs,
};

static int __init locus_proc_pair_init(void)
{
	return klp_enable_patch(&locus_proc_pair_patch);
}

static void __exit locus_proc_pair_exit(void)
{
}

module_init(locus_proc_pair_init);
module_exit(locus_proc_pair_exit);
MODULE_DESCRIPTION("Append a marker to /proc/version and /proc/loadavg");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
