//! Tells systemd that the daemon serves requests (sd_notify(3)).

use std::env;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Name of the variable that says where the service manager listens.
const VARIABLE: &str = "NOTIFY_SOCKET";

/// Says that this service is ready; nothing without a service manager.
///
/// # Errors
/// It listens, and can't be told.
pub(super) fn ready() -> io::Result<()> {
    match env::var(VARIABLE) {
        Ok(at) => send(&at),
        Err(_) => Ok(()),
    }
}

fn send(at: &str) -> io::Result<()> {
    let address = match at.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(at)?,
    };
    UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_manager_hears_it_by_a_path_or_by_an_abstract_name() {
        let name = format!("xen-locus-notify-{}", std::process::id());
        let path = env::temp_dir().join(&name);
        let _ = std::fs::remove_file(&path);
        let by_name = SocketAddr::from_abstract_name(&name).unwrap();
        for (listener, at) in [
            (
                UnixDatagram::bind(&path).unwrap(),
                path.display().to_string(),
            ),
            (
                UnixDatagram::bind_addr(&by_name).unwrap(),
                format!("@{name}"),
            ),
        ] {
            send(&at).unwrap();
            let mut said = [0; 64];
            let len = listener.recv(&mut said).unwrap();
            assert_eq!(&said[..len], b"READY=1");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(send(&path.display().to_string()).is_err());
    }
}
