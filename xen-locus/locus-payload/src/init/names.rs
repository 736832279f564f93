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

/// Of [`ENABLING`]: those that are given the address of `struct klp_patch`.
pub(super) const OF_PATCH: [&str; 3] = [
    "klp_enable_patch",
    "klp_register_patch",
    "klp_unregister_patch",
];

/// The function that functions begin with a call of, for tracing. It leaves all registers as they were.
pub(super) const MARK: &str = "__fentry__";

/// The function of the kernel that does not return.
pub(super) const ENDS: &str = "__stack_chk_fail";

/// Of [`KPATCH_HOOK`]: variables. All else are functions, which are called, and their addresses are not taken.
pub(super) const VARIABLES: [&str; 2] = ["kmalloc_caches", "random_kmalloc_seed"];

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
