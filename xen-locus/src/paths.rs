//! Files and folders of this tool in dom0. `xtest` and the manuals name them too.

/// Folder of what is void after a reboot of dom0, because the guests are gone then: locks of guests, `UUID.lock`.
pub const RUN: &str = "/run/xen-locus";
/// Lock of the daemon: there is one daemon at a time.
pub const DAEMON_LOCK: &str = "/run/xen-locus/daemon.lock";
/// Folder of the guardians' files, `UUID.PID`.
pub const GUARDIANS: &str = "/run/xen-locus/guard";
/// Folder of the journals, one file for each guest, `UUID`.
pub const JOURNALS: &str = "/var/lib/xen-locus/journal";
/// The audit log.
pub const AUDIT_LOG: &str = "/var/log/xen-locus/audit.jsonl";
/// Number and hash of the audit log's last line.
pub const AUDIT_HEAD: &str = "/var/lib/xen-locus/audit-head.json";
/// Folder of the payloads that requests to the daemon name, unless it is told another.
pub const PAYLOADS: &str = "/var/lib/xen-locus/payloads";
/// Folder of the cache of guests' kernels, unless a command is told another.
pub const CACHE: &str = "/var/cache/xen-locus";
