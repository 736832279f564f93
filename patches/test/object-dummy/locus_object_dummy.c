// SPDX-License-Identifier: GPL-2.0-only
/*
 * Replace a function of the module dummy: its devices have received as many packets as the CRC of
 * "locus" says, which a function of the module crc-itu-t computes.
 */
#include <linux/crc-itu-t.h>
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/netdevice.h>

static void locus_get_stats64(struct net_device *dev, struct rtnl_link_stats64 *stats)
{
	dev_lstats_read(dev, &stats->tx_packets, &stats->tx_bytes);
	stats->rx_packets = crc_itu_t(0, "locus", 5);
}

static struct klp_func locus_funcs[] = {
	{
		.old_name = "dummy_get_stats64",
		.new_func = locus_get_stats64,
		.old_sympos = 1,
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
MODULE_DESCRIPTION("Replace a function of a module, with the help of another module");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
