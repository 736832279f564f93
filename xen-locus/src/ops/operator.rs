//! Name of the operator who runs a command, for the audit log.

use crate::paths;

/// The user id of this process, the user id that logged in (pam_loginuid(8)), and the user of sudo.
#[must_use]
pub fn user() -> String {
    let uid = paths::own_uid().unwrap_or(0);
    let login = std::fs::read_to_string("/proc/self/loginuid").unwrap_or_default();
    let mut who = format!("uid {uid}");
    // Not set: -1.
    if let Some(login) = login.trim().parse().ok().filter(|&id: &u32| id != u32::MAX) {
        who.push_str(&format!(", logged in as uid {login}"));
    }
    if let Ok(name) = std::env::var("SUDO_USER") {
        who.push_str(&format!(", by sudo of {name}"));
    }
    who
}
