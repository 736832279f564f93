//! Types of the small guest, as data: what readers of tasks, modules and stacks ask the BTF for.

use std::collections::BTreeMap;

use super::frames::{INACTIVE, REGS};
use crate::btf::blob::Blob;
use crate::btf::TypeKind;

/// Size of its `task_struct`, in bytes.
pub(super) const TASK_LEN: usize = 256;
/// Offset of `tasks` in `task_struct`, in bytes.
pub const TASKS: usize = 16;
/// Offset of `thread_node` in `task_struct`, in bytes.
pub const THREAD_NODE: usize = 32;
/// Offsets of other members of `task_struct`, in bytes.
pub(super) const SIGNAL: usize = 48;
pub(super) const STACK: usize = 56;
pub(super) const PID: usize = 64;
pub(super) const ON_CPU: usize = 68;
pub(super) const START_TIME: usize = 72;
pub(super) const COMM: usize = 80;
pub(super) const TGID: usize = 96;
pub(super) const STATE: usize = 100;
const EXIT_STATE: usize = 104;
pub(super) const CPU: usize = 108;
/// Offset of `thread.sp`.
pub(super) const SP: usize = 128 + 24;
const SWITCHES: usize = 160;
/// Offset of `restart_block.fn` in `task_struct`, in bytes.
pub const RESTART: usize = 176 + 8;
/// Offset of `thread_head` in its `signal_struct`, in bytes.
pub(super) const THREAD_HEAD: usize = 16;

/// Offset of `pages` in `kprobe_insn_cache`, in bytes.
pub(super) const INSN_PAGES: usize = 16;

/// A member: its name, its type's name, its offset in bytes.
type Member = (&'static str, &'static str, usize);

/// A type to add. Types refer to earlier ones by name; an array is called `TYPE[COUNT]`.
enum Item {
    Integer(&'static str, u32),
    Array(&'static str, u32),
    /// Name, size in bytes, members.
    Structure(&'static str, usize, &'static [Member]),
    /// A structure of words that follow each other.
    Words(&'static str, u64, &'static [&'static str]),
    /// A structure with bit fields: name, type, offset in bits, width or 0.
    BitFields(
        &'static str,
        u32,
        &'static [(&'static str, &'static str, u32, u32)],
    ),
    Enumeration(&'static str, &'static [(&'static str, i64)]),
}

use Item::{Array, BitFields, Enumeration, Integer, Structure, Words};

const LONG: &str = "long unsigned int";

/// What a reader of tasks asks for.
const TASK_TYPES: &[Item] = &[
    Integer("int", 4),
    Integer(LONG, 8),
    Integer("char", 1),
    Array("char", 16),
    Structure("list_head", 16, &[("next", LONG, 0), ("prev", LONG, 8)]),
    Structure(
        "restart_block",
        48,
        &[("arch_data", LONG, 0), ("fn", LONG, 8)],
    ),
    Structure("thread_struct", 64, &[("sp", LONG, 24)]),
    Structure(
        "task_struct",
        TASK_LEN,
        &[
            ("tasks", "list_head", TASKS),
            ("thread_node", "list_head", THREAD_NODE),
            ("signal", LONG, SIGNAL),
            ("stack", LONG, STACK),
            ("pid", "int", PID),
            ("on_cpu", "int", ON_CPU),
            ("start_time", LONG, START_TIME),
            ("comm", "char[16]", COMM),
            ("tgid", "int", TGID),
            ("__state", "int", STATE),
            ("exit_state", "int", EXIT_STATE),
            ("cpu", "int", CPU),
            ("thread", "thread_struct", SP - 24),
            ("nvcsw", LONG, SWITCHES),
            ("nivcsw", LONG, SWITCHES + 8),
            ("restart_block", "restart_block", RESTART - 8),
        ],
    ),
    Structure("arch_spinlock_t", 4, &[("val", "int", 0)]),
    Structure("raw_spinlock", 4, &[("raw_lock", "arch_spinlock_t", 0)]),
    Structure(
        "rq",
        16,
        &[
            ("nr_running", "int", 0),
            ("__lock", "raw_spinlock", 4),
            ("nr_switches", LONG, 8),
        ],
    ),
    Structure(
        "signal_struct",
        64,
        &[("thread_head", "list_head", THREAD_HEAD)],
    ),
];

/// What a reader of modules asks for. No module is loaded.
const MODULE_TYPES: &[Item] = &[
    Enumeration(
        "module_state",
        &[
            ("MODULE_STATE_LIVE", 0),
            ("MODULE_STATE_COMING", 1),
            ("MODULE_STATE_GOING", 2),
            ("MODULE_STATE_UNFORMED", 3),
        ],
    ),
    Array("char", 56),
    Words("rb_node", 24, &["__rb_parent_color", "rb_right", "rb_left"]),
    Structure("rb_root", 8, &[("rb_node", LONG, 0)]),
    Array("rb_node", 2),
    Array("rb_root", 2),
    Structure("latch_tree_node", 48, &[("node", "rb_node[2]", 0)]),
    Structure(
        "latch_tree_root",
        24,
        &[("seq", "int", 0), ("tree", "rb_root[2]", 8)],
    ),
    Structure(
        "mod_tree_root",
        40,
        &[
            ("root", "latch_tree_root", 0),
            ("addr_min", LONG, 24),
            ("addr_max", LONG, 32),
        ],
    ),
    Structure(
        "mod_tree_node",
        56,
        &[("mod", LONG, 0), ("node", "latch_tree_node", 8)],
    ),
    Structure(
        "module_layout",
        80,
        &[
            ("base", LONG, 0),
            ("size", "int", 8),
            ("text_size", "int", 12),
            ("ro_size", "int", 16),
            ("ro_after_init_size", "int", 20),
            ("mtn", "mod_tree_node", 24),
        ],
    ),
    Structure(
        "mod_arch_specific",
        24,
        &[
            ("num_orcs", "int", 0),
            ("orc_unwind_ip", LONG, 8),
            ("orc_unwind", LONG, 16),
        ],
    ),
    Structure("mutex", 32, &[("owner", LONG, 0)]),
    Structure("exception_table_entry", 12, &[("insn", "int", 0)]),
    Structure("bug_entry", 12, &[("bug_addr_disp", "int", 0)]),
    Structure(
        "module_use",
        48,
        &[
            ("source_list", "list_head", 0),
            ("target_list", "list_head", 16),
            ("source", LONG, 32),
            ("target", LONG, 40),
        ],
    ),
    Structure(
        "module",
        448,
        &[
            ("state", "int", 0),
            ("list", "list_head", 8),
            ("name", "char[56]", 24),
            ("taints", LONG, 80),
            ("core_layout", "module_layout", 88),
            ("init_layout", "module_layout", 168),
            ("kallsyms", LONG, 248),
            ("syms", LONG, 256),
            ("num_syms", "int", 264),
            ("num_exentries", "int", 268),
            ("extable", LONG, 272),
            ("arch", "mod_arch_specific", 280),
            ("num_bugs", "int", 304),
            ("bug_list", "list_head", 312),
            ("bug_table", LONG, 328),
            ("jump_entries", LONG, 336),
            ("num_jump_entries", "int", 344),
            ("source_list", "list_head", 352),
            ("target_list", "list_head", 368),
            ("refcnt", "int", 384),
            ("init", LONG, 392),
            ("exit", LONG, 400),
        ],
    ),
    Structure(
        "mod_kallsyms",
        32,
        &[
            ("symtab", LONG, 0),
            ("num_symtab", "int", 8),
            ("strtab", LONG, 16),
            ("typetab", LONG, 24),
        ],
    ),
    Structure(
        "kernel_symbol",
        12,
        &[
            ("value_offset", "int", 0),
            ("name_offset", "int", 4),
            ("namespace_offset", "int", 8),
        ],
    ),
];

/// What a reader of the processor's features asks for.
const CPU_TYPES: &[Item] = &[
    Array("int", 2),
    Structure("cpuinfo_x86", 16, &[("x86_capability", "int[2]", 8)]),
];

/// What a reader of kprobes asks for. None is registered.
const KPROBE_TYPES: &[Item] = &[
    Structure("hlist_node", 16, &[("next", LONG, 0), ("pprev", LONG, 8)]),
    Structure(
        "kprobe",
        64,
        &[("hlist", "hlist_node", 0), ("addr", LONG, 40)],
    ),
    Structure(
        "kprobe_insn_cache",
        32,
        &[("mutex", LONG, 0), ("pages", "list_head", INSN_PAGES)],
    ),
    Structure(
        "kprobe_insn_page",
        24,
        &[("list", "list_head", 0), ("insns", LONG, 16)],
    ),
];

/// What tells whether a page is in use.
const PAGE_TYPES: &[Item] = &[
    Structure("page", 64, &[("flags", LONG, 0)]),
    Enumeration("pageflags", &[("PG_locked", 0), ("PG_reserved", 12)]),
];

/// What a walk of a stack asks for.
const STACK_TYPES: &[Item] = &[
    Integer("short int", 2),
    BitFields(
        "orc_entry",
        6,
        &[
            ("sp_offset", "short int", 0, 0),
            ("bp_offset", "short int", 16, 0),
            ("sp_reg", "int", 32, 4),
            ("bp_reg", "int", 36, 4),
            ("type", "int", 40, 3),
            ("signal", "int", 43, 1),
        ],
    ),
    Words(
        "pt_regs",
        REGS,
        &[
            "r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx",
            "si", "di", "orig_ax", "ip", "cs", "flags", "sp", "ss",
        ],
    ),
    Words(
        "inactive_task_frame",
        INACTIVE,
        &["r15", "r14", "r13", "r12", "bx", "bp", "ret_addr"],
    ),
    Array("char", 4096),
    Structure("irq_stack", 4096, &[("stack", "char[4096]", 0)]),
    Structure("entry_stack", 512, &[("stack", "char", 0)]),
    Structure(
        "cea_exception_stacks",
        3 * 4096,
        &[
            ("DF_stack", "char[4096]", 0),
            ("NMI_stack", "char[4096]", 2 * 4096),
        ],
    ),
    Structure(
        "cpu_entry_area",
        5 * 4096,
        &[
            ("entry_stack_page", "char[4096]", 4096),
            ("estacks", "cea_exception_stacks", 2 * 4096),
        ],
    ),
];

/// Types being added, by name.
struct Types {
    blob: Blob,
    ids: BTreeMap<String, u32>,
}

impl Types {
    fn id(&self, name: &str) -> u32 {
        self.ids[name]
    }

    fn structure(&mut self, name: &str, size: usize, members: &[Member]) -> u32 {
        let members: Vec<_> = members
            .iter()
            .map(|&(n, ty, at)| (n, self.id(ty), at))
            .collect();
        self.blob.structure(name, size, &members)
    }

    fn add(&mut self, item: &Item) {
        let (name, id) = match *item {
            Integer(name, size) => (name.to_owned(), self.blob.int(name, size)),
            Array(of, count) => (
                format!("{of}[{count}]"),
                self.blob.array(self.id(of), count),
            ),
            Structure(name, size, members) => {
                (name.to_owned(), self.structure(name, size, members))
            }
            Words(name, size, words) => {
                let place = |(i, &word): (usize, &&'static str)| (word, LONG, 8 * i);
                let members: Vec<Member> = words.iter().enumerate().map(place).collect();
                (
                    name.to_owned(),
                    self.structure(name, size as usize, &members),
                )
            }
            BitFields(name, size, fields) => {
                let fields: Vec<_> = fields
                    .iter()
                    .map(|&(n, ty, bit, width)| (n, self.id(ty), bit, width))
                    .collect();
                let id = self.blob.fields(TypeKind::Struct, name, size, &fields);
                (name.to_owned(), id)
            }
            Enumeration(name, values) => (name.to_owned(), self.blob.enumeration(name, values)),
        };
        self.ids.insert(name, id);
    }
}

/// The guest's BTF.
pub(super) fn blob() -> Vec<u8> {
    let mut types = Types {
        blob: Blob::new(),
        ids: BTreeMap::new(),
    };
    let all = [
        TASK_TYPES,
        MODULE_TYPES,
        CPU_TYPES,
        KPROBE_TYPES,
        STACK_TYPES,
        PAGE_TYPES,
    ];
    for item in all.into_iter().flatten() {
        types.add(item);
    }
    types.blob.bytes()
}
