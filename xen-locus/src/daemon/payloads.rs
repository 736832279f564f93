//! The payloads that requests name: files in one folder, which only this user can have written.

use std::io;
use std::path::Path;

use locus_payload::Payload;

use crate::error::{Error, Result};
use crate::paths;

/// Reads the payload of this name in a folder. If a SHA-256 is given, its file must have it.
///
/// # Errors
/// Another user could have written the file or the folder; or it is no payload of this name and SHA-256.
pub(super) fn named(folder: &Path, name: &str, sha256: Option<&str>) -> Result<Payload> {
    let path = folder.join(format!("{name}.ko"));
    for place in [folder, &path] {
        match paths::check_own(place) {
            // That is said below.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            checked => checked.map_err(|error| {
                Error::failed(format!("payload {name} is not applied: {error}"))
            })?,
        }
    }
    let payload = Payload::read(&path)?;
    if payload.name != name {
        return Err(Error::failed(format!(
            "the payload in {name}.ko calls itself {}; name the file after it",
            payload.name
        )));
    }
    let found = hex::encode(payload.sha256);
    if let Some(wanted) = sha256.filter(|s| *s != found) {
        return Err(Error::failed(format!(
            "payload {name} has SHA-256 {found}, and {wanted} is asked for: copy the file that is meant to {}, or ask for \
             the one that is there",
            path.display()
        )));
    }
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_payload_that_another_user_could_have_written_is_not_applied() {
        let folder = std::env::temp_dir().join(format!("xen-locus-named-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/payload.ko");
        let name = Payload::read(&golden).unwrap().name;
        let file = folder.join(format!("{name}.ko"));
        fs::copy(&golden, &file).unwrap();
        for (of_folder, of_file, is_own) in [
            (0o755, 0o644, true),
            (0o777, 0o644, false),
            (0o755, 0o666, false),
            (0o755, 0o664, false),
        ] {
            fs::set_permissions(&folder, Permissions::from_mode(of_folder)).unwrap();
            fs::set_permissions(&file, Permissions::from_mode(of_file)).unwrap();
            match named(&folder, &name, None) {
                Ok(payload) => assert!(is_own && payload.name == name),
                Err(error) => {
                    let said = error.to_string();
                    assert!(
                        !is_own && said.contains("another user may have written it"),
                        "{said}"
                    );
                }
            }
        }
        let other = named(&folder, &name, Some("00")).unwrap_err().to_string();
        assert!(other.contains("another user"), "{other}");
        fs::remove_dir_all(&folder).unwrap();
    }
}
