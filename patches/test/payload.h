/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the payloads of these tests have in common: each is a livepatch module whose new functions
 * write into a file of /proc what they found, one line for each thing.
 */
#ifndef LOCUS_TEST_PAYLOAD_H
#define LOCUS_TEST_PAYLOAD_H

#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>

/* One function of the kernel, and what comes in its place. */
#define REPLACE(old, new) { .old_name = (old), .new_func = (new) }
/* The n-th of several of that name, counted from 1 in the order of their addresses. */
#define REPLACE_NTH(old, pos, new) { .old_name = (old), .new_func = (new), .old_sympos = (pos) }

/* A livepatch module that replaces functions of one object: a module's name, or NULL (the kernel). */
#define PAYLOAD_OF(object, ...)						\
	static struct klp_func payload_funcs[] = { __VA_ARGS__, { } };	\
	static struct klp_object payload_objs[] = {			\
		{ .name = (object), .funcs = payload_funcs }, { }	\
	};								\
	PAYLOAD_WITH(payload_objs)

#define PAYLOAD(...) PAYLOAD_OF(NULL, __VA_ARGS__)

#define PAYLOAD_WITH(objects)						\
	static struct klp_patch payload = {				\
		.mod = THIS_MODULE,					\
		.objs = (objects),					\
	};								\
	static int __init payload_init(void)				\
	{								\
		return klp_enable_patch(&payload);			\
	}								\
	static void __exit payload_exit(void)				\
	{								\
	}								\
	module_init(payload_init);					\
	module_exit(payload_exit);					\
	MODULE_LICENSE("GPL");						\
	MODULE_INFO(livepatch, "Y")

/* A line that ends with "ok", or says what differed. */
static inline void tell(struct seq_file *m, const char *what, u64 found, u64 expected)
{
	if (found == expected)
		seq_printf(m, "%s: ok\n", what);
	else
		seq_printf(m, "%s: %#llx, expected %#llx\n", what, found, expected);
}

#endif
