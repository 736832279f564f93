/*
 * A PV guest that is no Linux: it tells Xen its entry points, which lie in low memory, and sleeps.
 * xen/include/public/elfnote.h, xen/include/public/arch-x86/xen-x86_64.h
 */
#define SCHED_OP 29
#define SET_CALLBACKS 4

	.section .note.Xen, "a", @note
	.macro note type, size, op:vararg
	.align 4
	.long 4, \size, \type
	.asciz "Xen"
	\op
	.align 4
	.endm
	note 1, 8, .quad start		/* ENTRY */
	note 2, 8, .quad hypercalls	/* HYPERCALL_PAGE */
	note 3, 8, .quad 0		/* VIRT_BASE */
	note 5, 8, .asciz "xen-3.0"	/* XEN_VERSION */
	note 6, 4, .asciz "odd"		/* GUEST_OS */
	note 8, 8, .asciz "generic"	/* LOADER */

	.text
	.globl start
start:
	lea	entry(%rip), %rdi	/* event */
	mov	%rdi, %rsi		/* failsafe */
	mov	%rdi, %rdx		/* syscall */
	call	hypercalls + 32 * SET_CALLBACKS
1:	mov	$1, %edi		/* SCHEDOP_block */
	xor	%esi, %esi
	call	hypercalls + 32 * SCHED_OP
	jmp	1b
entry:
	jmp	entry

	.align 4096
hypercalls:
	.skip 4096
