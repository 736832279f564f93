//! Names as the kernel stores them, each byte a token. They are found without being decoded.
//!
//! A command asks for a few dozen of a hundred thousand names. So at first only the hash of each
//! name is computed, from the hashes of its tokens. A name is decoded when it is shown.

use locus_guest::budget::Budget;
use serde::{Deserialize, Serialize};

use super::names::name_at;
use crate::name_index::NameIndex;

/// Longest believed symbol name, in bytes (`KSYM_NAME_LEN` is 128, or 512 since v6.1).
const NAME_MAX: usize = 512;
/// Most bytes of all names together.
const TEXT_MAX: usize = 32 << 20;

/// All names, each with its type character before it, and how to find them.
///
/// Caches store the first four fields: their order and types are a file format.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "StoredNames")]
pub(super) struct CompressedNames {
    tokens: Vec<String>,
    #[serde(with = "serde_bytes")]
    bytes: Vec<u8>,
    count: usize,
    long: bool,
    /// Where each name begins in `bytes`, its length first; at last, where they end.
    #[serde(skip)]
    starts: Vec<u32>,
    #[serde(skip)]
    by_name: NameIndex,
}

/// What caches store of them.
#[derive(Deserialize)]
struct StoredNames {
    tokens: Vec<String>,
    #[serde(with = "serde_bytes")]
    bytes: Vec<u8>,
    count: usize,
    long: bool,
}

impl TryFrom<StoredNames> for CompressedNames {
    type Error = &'static str;

    fn try_from(stored: StoredNames) -> Result<CompressedNames, Self::Error> {
        CompressedNames::new(stored.tokens, stored.bytes, stored.count, stored.long)
            .ok_or("the names are not well-formed")
    }
}

impl CompressedNames {
    /// The first `count` names in `bytes`; `long` is as in [`NamesTable`](super::names::NamesTable).
    ///
    /// Nothing if they are not well-formed: 256 tokens of printable ASCII without spaces; each name has a type
    /// character and at most [`NAME_MAX`] characters, all of them together at most [`TEXT_MAX`]; not too many are alike
    /// ([`GROUP_MAX`](crate::name_index::GROUP_MAX)).
    pub(super) fn new(
        tokens: Vec<String>,
        bytes: Vec<u8>,
        count: usize,
        long: bool,
    ) -> Option<CompressedNames> {
        let hashes = TokenHashes::of(&tokens)?;
        let longest = hashes.lens.iter().max().map_or(0, |&len| usize::from(len));
        // Exact sums only where rough ones, which cost nothing, don't do.
        if bytes.len().saturating_mul(longest) > TEXT_MAX && hashes.len(&bytes) > TEXT_MAX {
            return None;
        }
        let mut starts = Vec::with_capacity(count.min(bytes.len()) + 1);
        let mut by_name = NameIndex::with_capacity(count.min(bytes.len()));
        let mut pos = 0;
        for _ in 0..count {
            let (len, start) = name_at(&bytes, pos, long)?;
            starts.push(u32::try_from(pos).ok()?);
            pos = start.checked_add(len)?;
            let name = bytes.get(start..pos)?;
            if name.len() * longest > NAME_MAX && hashes.len(name) > NAME_MAX {
                return None;
            }
            by_name.push(hashes.name(name)?);
        }
        if by_name.is_overfull() {
            return None;
        }
        starts.push(u32::try_from(pos).ok()?);
        Some(CompressedNames {
            tokens,
            bytes,
            count,
            long,
            starts,
            by_name,
        })
    }

    /// The tokens of name `i`, its type first; none if there are not so many names.
    fn tokens_of(&self, i: u32) -> impl DoubleEndedIterator<Item = &str> {
        let range = || {
            let pos = *self.starts.get(i as usize)? as usize;
            let (len, start) = name_at(&self.bytes, pos, self.long)?;
            self.bytes.get(start..start.checked_add(len)?)
        };
        let token = |&token: &u8| self.tokens.get(usize::from(token));
        // Absent is empty: a name that is not there has no tokens.
        let tokens = range().unwrap_or_default().iter().filter_map(token);
        tokens.map(String::as_str)
    }

    /// The type character of name `i`; `?` if there are not so many names.
    pub(super) fn kind(&self, i: u32) -> char {
        let first = self.tokens_of(i).next();
        first.and_then(|token| token.chars().next()).unwrap_or('?')
    }

    /// Name `i`, without the type character.
    pub(super) fn name(&self, i: u32) -> String {
        let mut text: String = self.tokens_of(i).collect();
        if !text.is_empty() {
            text.remove(0);
        }
        text
    }

    /// Whether name `i` is `name`.
    fn is(&self, i: u32, name: &str) -> bool {
        let mut rest = name;
        let mut skip = 1;
        for token in self.tokens_of(i) {
            let Some(more) = token.get(skip..).and_then(|t| rest.strip_prefix(t)) else {
                return false;
            };
            rest = more;
            skip = 0;
        }
        rest.is_empty()
    }

    /// Whether name `i` ends in `end`, which is not empty.
    fn ends_in(&self, i: u32, end: &str) -> bool {
        let mut rest = end;
        for token in self.tokens_of(i).rev() {
            match rest.strip_suffix(token) {
                Some("") => return self.name(i).ends_with(end), // seldom
                Some(more) => rest = more,
                None => return token.ends_with(rest) && self.name(i).ends_with(end),
            }
        }
        false
    }

    /// Numbers of all names that are `name`, rising. Those that are compared are paid from `budget`.
    pub(super) fn all<'a>(
        &'a self,
        name: &'a str,
        budget: &Budget,
    ) -> impl Iterator<Item = u32> + 'a {
        let hash = finish(append(0, name.as_bytes()));
        let candidates = self.by_name.candidates(hash, budget);
        candidates.into_iter().filter(move |&i| self.is(i, name))
    }

    /// Numbers of all names that end in `end`, which is not empty, rising.
    pub(super) fn ending<'a>(&'a self, end: &'a str) -> impl Iterator<Item = u32> + 'a {
        // Most names are told by their last token.
        let may_end = |t: &String| end.ends_with(t.as_str()) || t.ends_with(end);
        let last: Vec<bool> = self.tokens.iter().map(may_end).collect();
        let ends = self.starts.iter().skip(1);
        let likely = ends.zip(0..).filter(move |(&end, _)| {
            let token = self.bytes.get((end as usize).wrapping_sub(1));
            token.is_some_and(|&token| last.get(usize::from(token)) == Some(&true))
        });
        likely
            .map(|(_, i)| i)
            .filter(move |&i| self.ends_in(i, end))
    }
}

/// Any odd number of many bits.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// A hash that can be put together as names are: of a text to which `bytes` were appended, from that
/// of the text. It is a polynomial of [`FACTOR`].
fn append(hash: u64, bytes: &[u8]) -> u64 {
    let add = |h: u64, &b: &u8| h.wrapping_mul(FACTOR).wrapping_add(b.into());
    bytes.iter().fold(hash, add)
}

/// The same for the index, in which the upper bits count.
#[allow(clippy::cast_possible_truncation)] // the upper half
fn finish(hash: u64) -> u32 {
    ((hash ^ (hash >> 32)).wrapping_mul(FACTOR) >> 32) as u32
}

/// What appending a token does to a hash.
#[derive(Clone, Copy)]
struct HashStep {
    times: u64,
    plus: u64,
}

impl HashStep {
    fn of(bytes: &[u8]) -> HashStep {
        HashStep {
            times: bytes.iter().fold(1, |f: u64, _| f.wrapping_mul(FACTOR)),
            plus: append(0, bytes),
        }
    }
}

/// What hashing names takes.
struct TokenHashes {
    steps: [HashStep; 256],
    /// Hashes of the tokens without their first characters: names begin with the type.
    firsts: [Option<u64>; 256],
    lens: [u8; 256],
}

impl TokenHashes {
    /// Nothing if there are not 256 tokens of printable ASCII without spaces: no symbol has others, and a name goes to
    /// terminals and logs.
    fn of(tokens: &[String]) -> Option<TokenHashes> {
        let mut hashes = TokenHashes {
            steps: [HashStep { times: 1, plus: 0 }; 256],
            firsts: [None; 256],
            lens: [0; 256],
        };
        let steps = hashes.steps.iter_mut().zip(&mut hashes.firsts);
        let mut places = steps.zip(&mut hashes.lens);
        for token in tokens {
            let ((step, first), len) = places.next()?;
            if !token.bytes().all(|b| b.is_ascii_graphic()) {
                return None;
            }
            *step = HashStep::of(token.as_bytes());
            *first = token.as_bytes().get(1..).map(|rest| append(0, rest));
            *len = u8::try_from(token.len()).ok()?;
        }
        places.next().is_none().then_some(hashes)
    }

    /// The hash of a name without its type; nothing if it has none.
    fn name(&self, tokens: &[u8]) -> Option<u32> {
        let (&first, rest) = tokens.split_first()?;
        let first = (*self.firsts.get(usize::from(first))?)?;
        let append = |hash: u64, &token: &u8| {
            self.steps.get(usize::from(token)).map_or(hash, |step| {
                hash.wrapping_mul(step.times).wrapping_add(step.plus)
            })
        };
        Some(finish(rest.iter().fold(first, append)))
    }

    /// How many characters `tokens` stand for.
    fn len(&self, tokens: &[u8]) -> usize {
        let len = |&token: &u8| self.lens.get(usize::from(token)).map_or(0, |&n| n.into());
        tokens.iter().map(len).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens: every printable character for itself, and some longer ones.
    fn tokens() -> Vec<String> {
        let mut all: Vec<String> = (0..=255u8)
            .map(|c| {
                if c.is_ascii_graphic() {
                    char::from(c).to_string()
                } else {
                    String::new()
                }
            })
            .collect();
        all[1] = "Tsched".into();
        all[2] = "ule".into();
        all[3] = "_mitiga".into();
        all[4] = "tion".into();
        all[200] = "x".repeat(100);
        all
    }

    fn compressed(names: &[&[u8]]) -> Option<CompressedNames> {
        let mut bytes = Vec::new();
        for name in names {
            bytes.push(u8::try_from(name.len()).unwrap());
            bytes.extend(*name);
        }
        CompressedNames::new(tokens(), bytes, names.len(), false)
    }

    #[test]
    fn a_name_is_found_however_it_is_put_together() {
        let names: [&[u8]; 6] = [
            b"Tschedule",
            b"\x01\x02",
            b"tschedule",
            b"Tsched\x02",
            b"T",
            b"d\xc8\xc8\x01",
        ];
        let all = compressed(&names).unwrap();
        assert_eq!(
            all.all("schedule", &Budget::default()).collect::<Vec<_>>(),
            [0, 1, 2, 3]
        );
        assert_eq!(all.kind(1), 'T');
        assert_eq!(all.kind(2), 't');
        assert_eq!(all.name(1), "schedule");
        assert_eq!(all.all("", &Budget::default()).collect::<Vec<_>>(), [4]);
        assert_eq!(
            all.all(&all.name(5), &Budget::default())
                .collect::<Vec<_>>(),
            [5]
        );
        assert_eq!(all.name(5).len(), 206);
        assert_eq!(
            all.all("schedul", &Budget::default()).count()
                + all.all("schedulex", &Budget::default()).count(),
            0
        );
        assert_eq!(all.name(6), "");
    }

    #[test]
    fn names_are_found_by_their_ends() {
        let names: [&[u8]; 6] = [
            b"da\x03\x04",
            b"db_mitigation",
            b"dc_mitigations",
            b"dmitigation",
            b"d\x03\x04",
            b"d\x04",
        ];
        let all = compressed(&names).unwrap();
        let ending: Vec<String> = all.ending("_mitigation").map(|i| all.name(i)).collect();
        assert_eq!(ending, ["a_mitigation", "b_mitigation", "_mitigation"]);
        assert_eq!(all.ending("n").count(), 5);
        assert_eq!(all.ending("db").count(), 0, "the type is no part of a name");
    }

    #[test]
    fn names_that_are_not_well_formed_are_refused() {
        assert!(compressed(&[b"dx", b""]).is_none(), "no type");
        assert!(compressed(&[b"dx", b"\x00x"]).is_none(), "no type");
        assert!(compressed(&[&[200; 5]]).is_some());
        assert!(compressed(&[&[200; 6]]).is_none(), "600 characters");
        let mut long = [b'x'; 113];
        long[..4].fill(200);
        assert!(compressed(&[&long]).is_some(), "509 characters");
        assert!(
            CompressedNames::new(tokens(), vec![1, b'd', 2, b'd'], 2, false).is_none(),
            "cut short"
        );
        for bad in ["é", " ", "a b", "\n", "\t", "\x1b[2J", "\x7f"] {
            let mut odd = tokens();
            odd[7] = bad.into();
            let read = CompressedNames::new(odd, vec![], 0, false);
            assert!(read.is_none(), "{bad:?}");
        }
        assert!(CompressedNames::new(tokens()[..255].to_vec(), vec![], 0, false).is_none());
    }

    #[test]
    fn too_many_names_alike_are_refused() {
        let most = crate::name_index::GROUP_MAX as usize;
        let alike = |count| CompressedNames::new(tokens(), b"\x02dx".repeat(count), count, false);
        assert!(alike(most).is_some());
        assert!(alike(most + 1).is_none());
    }

    #[test]
    fn all_names_together_have_a_bound() {
        // Each is 500 characters and three more, and no two are alike.
        let digit = |n: usize| b'a' + u8::try_from(n % 26).unwrap();
        let name = |n: usize| {
            [
                8,
                digit(n / 26 / 26 / 26),
                200,
                200,
                200,
                200,
                200,
                digit(n / 26 / 26),
                digit(n / 26),
            ]
        };
        let names = |count: usize| -> Option<CompressedNames> {
            let bytes: Vec<u8> = (0..count).flat_map(name).collect();
            CompressedNames::new(tokens(), bytes, count, false)
        };
        assert!(names(TEXT_MAX / 503 - 10).is_some());
        assert!(names(TEXT_MAX / 503 + 10).is_none());
    }
}
