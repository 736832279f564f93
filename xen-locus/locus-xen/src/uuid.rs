//! UUIDs of domains as text.
//!
//! Everywhere in this project a domain's UUID is text: 36 characters, lower case, with hyphens, as XenStore and `xl`
//! have it. File names have it too, so there is no other form of the same UUID.

use uuid::Uuid;

/// The text of a domain's UUID; `bytes` as Xen has them (`handle` in `struct xen_domctl_getdomaininfo`,
/// xen/include/public/domctl.h).
#[must_use]
pub fn to_text(bytes: &[u8; 16]) -> String {
    Uuid::from_bytes(*bytes).hyphenated().to_string()
}

/// Whether `text` is a UUID as [`to_text`] writes it. Other forms of UUIDs (upper case, in braces, without hyphens) are
/// not.
#[must_use]
pub fn is_text(text: &str) -> bool {
    parse(text).is_some()
}

/// Whether `text` is a UUID that says which domain it is. All zeroes is the UUID of each domain that was made without
/// one.
#[must_use]
pub fn is_unique(text: &str) -> bool {
    parse(text).is_some_and(|uuid| !uuid.is_nil())
}

fn parse(text: &str) -> Option<Uuid> {
    let uuid = Uuid::try_parse(text).ok()?;
    let mut own = Uuid::encode_buffer();
    (uuid.hyphenated().encode_lower(&mut own) == text).then_some(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "01234567-89ab-cdef-0123-456789abcdef";

    #[test]
    fn the_text_has_the_bytes_in_their_order() {
        let bytes = [
            0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0x01, 0x23, 0x45, 0x67, 0x89, 0xab,
            0xcd, 0xef,
        ];
        assert_eq!(to_text(&bytes), TEXT);
        assert!(is_text(TEXT) && is_unique(TEXT));
    }

    #[test]
    fn only_the_one_form_is_a_uuid() {
        for other in [
            "",
            &TEXT.to_uppercase(),
            &TEXT.replace('-', ""),
            &format!("{{{TEXT}}}"),
            &format!("urn:uuid:{TEXT}"),
            &format!("{TEXT}0"),
            &TEXT.replace('f', "g"),
            "0123456789ab-cdef-0123-456789abcdef--",
            "------------------------------------",
            "../../../../../../../../../../etc/pa",
        ] {
            assert!(!is_text(other) && !is_unique(other), "{other}");
        }
        let none = to_text(&[0; 16]);
        assert!(is_text(&none) && !is_unique(&none));
    }
}
