//! The directory and records as bytes: whole, torn, changed, and of a newer version.

use self::newer::*;
use super::*;
use crate::error::{Class, ExitCode};

/// Copies of the directory as a newer build may write them.
pub(crate) mod newer {
    use super::*;

    fn renew_digest(copy: &mut [u8]) {
        let sum = digest(copy);
        copy[16..32].copy_from_slice(&sum[..16]);
    }

    pub(crate) fn of_next_version(copy: &mut [u8]) {
        copy[8..12].copy_from_slice(&(VERSION + 1).to_le_bytes());
        // What it has behind the generation is its own affair.
        copy[40..HEAD].fill(0xff);
        renew_digest(copy);
    }

    pub(crate) fn of_unknown_state(copy: &mut [u8]) {
        copy[HEAD..HEAD + 4].copy_from_slice(&UNKNOWN.to_le_bytes());
        renew_digest(copy);
    }

    pub(crate) fn of_many_slots(copy: &mut [u8]) {
        copy[40..44].copy_from_slice(&u32::MAX.to_le_bytes());
        renew_digest(copy);
    }

    /// No state that this version knows.
    const UNKNOWN: u32 = 1000;
}

fn sample(generation: u64) -> Directory {
    let slot = Slot {
        state: State::Applied,
        first: 1,
        pages: 3,
        applied_at: 1_700_000_000,
        record_offset: 4096,
        record_len: 512,
        record_sha256: [7; 32],
    };
    Directory {
        generation,
        slots: vec![
            slot.clone(),
            Slot {
                state: State::Parked,
                ..slot
            },
        ],
        frames: [generation, 2, 3, 1 << 63],
    }
}

fn put(page: &mut [u8], d: &Directory) {
    let (at, bytes) = d.encode();
    page[at..at + COPY].copy_from_slice(&bytes);
}

#[test]
fn the_newer_whole_copy_of_the_directory_counts() {
    let mut page = vec![0; 4096];
    let none = Directory::decode(&page).unwrap_err();
    assert_eq!(none.class(), Class::Uncertain, "{none}");
    put(&mut page, &sample(1));
    put(&mut page, &sample(2));
    assert_eq!(Directory::decode(&page).unwrap(), sample(2));
    page[100] ^= 1; // tears generation 2, which stands in the first half
    assert_eq!(Directory::decode(&page).unwrap(), sample(1));
}

#[test]
fn a_newer_copy_of_the_directory_is_never_taken_for_a_torn_one() {
    let mut page = vec![0; 4096];
    put(&mut page, &sample(1));
    for half in [0, COPY] {
        for make_newer in [of_next_version, of_unknown_state, of_many_slots] {
            let mut page = page.clone();
            put(&mut page, &sample(2));
            make_newer(&mut page[..COPY]);
            // Alone, too.
            page[COPY..COPY + half].fill(0);
            let error = Directory::decode(&page).unwrap_err();
            assert!(error.is_newer_format(), "{error}");
            assert_eq!(error.exit_code(), ExitCode::NotApplicable);
            page[200] ^= 1; // it is torn
            let found = Directory::decode(&page);
            assert_eq!(found.is_ok(), half == 0);
        }
    }
    // The newer build wrote this format again.
    put(&mut page, &sample(2));
    of_next_version(&mut page[..COPY]);
    put(&mut page, &sample(3));
    assert_eq!(Directory::decode(&page).unwrap(), sample(3));
}

#[test]
fn a_record_of_another_version_is_told_by_its_number() {
    let read = |json: &[u8]| {
        let slot = Slot {
            record_sha256: Sha256::digest(json).into(),
            ..sample(1).slots[0].clone()
        };
        Record::decode(json, &slot).unwrap_err()
    };
    let damaged = |json: &[u8], words: &str| match read(json) {
        Unread::Damaged(why) => assert!(why.contains(words), "{why}"),
        newer => panic!("{newer:?}"),
    };
    damaged(
        br#"{"schema": 1, "name": "x"}"#,
        "expected version 3, found 1",
    );
    damaged(b"{}", "missing field `schema`");
    // A newer one may have anything else, and what is shown of it is checked.
    let sum = "ab".repeat(32);
    for (json, name, sha256) in [
        (r#"{"schema": 4}"#.to_owned(), None, None),
        (r#"{"schema": 4, "name": {"a": 1}}"#.into(), None, None),
        (
            r#"{"schema": 4, "name": "../x", "sha256": "\n"}"#.into(),
            None,
            None,
        ),
        (
            format!(r#"{{"schema": 9, "sha256": "{sum}", "name": "fix"}}"#),
            Some("fix".to_owned()),
            Some(sum.clone()),
        ),
    ] {
        match read(json.as_bytes()) {
            Unread::Newer(head) => assert_eq!((head.name, head.sha256), (name, sha256), "{json}"),
            damaged => panic!("{damaged:?}"),
        }
    }
}

#[test]
fn words_that_no_payload_has_are_refused() {
    let json = |name: &str, cve: &str| {
        format!(
            r#"{{"schema":3,"name":"{name}","sha256":"","description":"","cves":["{cve}"],
            "functions":[],"text":[0,0],"code":{{"sha256":"","blocks":"","labels":[]}},
            "rodata_len":0,"rodata_sha256":"","module":0}}"#
        )
    };
    let read = |json: &str| {
        let slot = Slot {
            record_sha256: Sha256::digest(json).into(),
            ..sample(1).slots[0].clone()
        };
        Record::decode(json.as_bytes(), &slot)
    };
    read(&json("locus_test", "CVE-2000-0001")).unwrap();
    for name in ["", "../../1", "a/b", "a b", "\\u001b[2J"] {
        let error = format!("{:?}", read(&json(name, "")).unwrap_err());
        assert!(error.contains("which no module has"), "{name}: {error}");
    }
    let error = format!("{:?}", read(&json("locus_test", "\\u001b[2J")).unwrap_err());
    assert!(error.contains("control characters"), "{error}");
}

#[test]
fn no_flipped_bit_goes_unnoticed() {
    let mut page = vec![0; 4096];
    put(&mut page, &sample(2));
    for bit in 0..COPY * 8 {
        let mut bad = page.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        // Bytes 12..16 are padding. Another version is refused as such.
        let seen = Directory::decode(&bad);
        assert!(seen.is_err() || (12..16).contains(&(bit / 8)), "bit {bit}");
    }
}
