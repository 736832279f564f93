// SPDX-License-Identifier: GPL-2.0-only
/*
 * The payload's own instructions touch user memory: where there is some, and where there is none. A
 * fault leads to the fixup of the payload's own exception table, or kills the kernel.
 */
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/uaccess.h>
#include <asm/asm.h>

#include "../payload.h"

/* Below the lowest address that can be mapped. */
#define NOWHERE ((unsigned long __user *)0x1000)

static noinline int locus_read(const unsigned long __user *from, unsigned long *value)
{
	if (!user_access_begin(from, sizeof(*from)))
		return -EPERM;
	unsafe_get_user(*value, from, fault);
	user_access_end();
	return 0;
fault:
	user_access_end();
	return -EFAULT;
}

static noinline int locus_write(unsigned long __user *to, unsigned long value)
{
	if (!user_access_begin(to, sizeof(*to)))
		return -EPERM;
	unsafe_put_user(value, to, fault);
	user_access_end();
	return 0;
fault:
	user_access_end();
	return -EFAULT;
}

/* The fixup's plainest form, at an address of the kernel's half that nothing is mapped at. */
static noinline unsigned long locus_kernel_read(const unsigned long *from)
{
	unsigned long value = 0x5a5a;

	asm volatile("1: movq (%1), %0\n"
		     "2:\n"
		     _ASM_EXTABLE(1b, 2b)
		     : "+r" (value) : "r" (from));
	return value;
}

static int locus_uaccess_show(struct seq_file *m, void *v)
{
	unsigned long __user *good = (void __user *)(current->mm->arg_start & ~7ul);
	unsigned long value = 0, again = 0, here = 0x1234;
	char bytes[16];
	u32 word = 0;

	tell(m, "read", locus_read(good, &value), 0);
	tell(m, "get_user", get_user(again, good), 0);
	tell(m, "both the same", value == again && value, 1);
	tell(m, "write", locus_write(good, value), 0);
	tell(m, "put_user", put_user(value, good), 0);
	tell(m, "copy_from_user", copy_from_user(bytes, good, sizeof(bytes)), 0);
	tell(m, "copied", *(unsigned long *)bytes, value);
	tell(m, "bad read", locus_read(NOWHERE, &value), -EFAULT);
	tell(m, "bad write", locus_write(NOWHERE, value), -EFAULT);
	tell(m, "bad get_user", get_user(word, (u32 __user *)NOWHERE), -EFAULT);
	tell(m, "bad put_user", put_user(word, (u32 __user *)NOWHERE), -EFAULT);
	tell(m, "bad copy_from_user", copy_from_user(bytes, NOWHERE, sizeof(bytes)),
	     sizeof(bytes));
	tell(m, "bad copy_to_user", copy_to_user(NOWHERE, bytes, sizeof(bytes)), sizeof(bytes));
	tell(m, "kernel read", locus_kernel_read(&here), 0x1234);
	tell(m, "bad kernel read", locus_kernel_read((void *)0xffffffff70000000ul), 0x5a5a);
	return 0;
}

PAYLOAD(REPLACE("cmdline_proc_show", locus_uaccess_show));
MODULE_DESCRIPTION("Test: faults on user memory in replacement code");
