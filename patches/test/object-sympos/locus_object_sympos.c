// SPDX-License-Identifier: GPL-2.0-only
/*
 * Replace the seventh function dummy_get_stats64 of the module dummy, which has one.
 */
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/netdevice.h>

static void locus_get_stats64(struct net_device *dev, struct rtnl_link_stats64 *stats)
{
	stats->rx_packets = 7;
}

static struct klp_func locus_funcs[] = {
	{
		.old_name = "dummy_get_stats64",
		.new_func = locus_get_stats64,
		.old_sympos = 7,
	},
	{ }
};

static struct klp_object locus_objs[] = {
	{
		.name = "dummy",
		.funcs = locus_funcs,
	},
	{ }
};

static struct klp_patch locus_patch = {
	.mod = THIS_MODULE,
	.objs = locus_objs,
};

static int __init locus_init(void)
{
	return klp_enable_patch(&locus_patch);
}

static void __exit locus_exit(void)
{
}

module_init(locus_init);
module_exit(locus_exit);
MODULE_DESCRIPTION("Replace a function that a module does not have");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
