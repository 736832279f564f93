//! Names that a `module_init` may refer to.

/// Functions that the `module_init` of a livepatch calls to enable it, and to log that.
pub(super) const ENABLING: [&str; 7] = [
    "__fentry__",
    "__x86_return_thunk",
    "klp_enable_patch",
    "klp_register_patch",
    "klp_unregister_patch",
    "_printk",
    "printk",
];

/// What else the `module_init` of kpatch-build refers to: allocation as kernels since 4.x name it, lists,
/// strings.
pub(super) const KPATCH_HOOK: [&str; 22] = [
    "__kmalloc",
    "__kmalloc_cache_noprof",
    "__kmalloc_large_noprof",
    "__kmalloc_noprof",
    "__list_add_valid",
    "__list_add_valid_or_report",
    "__list_del_entry_valid",
    "__list_del_entry_valid_or_report",
    "__stack_chk_fail",
    "kfree",
    "kmalloc_caches",
    "kmalloc_large",
    "kmalloc_order",
    "kmalloc_order_trace",
    "kmalloc_trace",
    "kmalloc_trace_noprof",
    "kmem_cache_alloc",
    "kmem_cache_alloc_noprof",
    "kmem_cache_alloc_trace",
    "memset",
    "random_kmalloc_seed",
    "strcmp",
];
