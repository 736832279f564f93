//! The request server that runs in dom0. Each request has a thread of its own, so that a scenario can act while
//! a command runs, and can kill it.

mod console;
mod exec;
mod guestcmd;
mod port;
mod pty;
mod server;
mod xenstore;

pub use guestcmd::guest_command;
pub use server::serve;
