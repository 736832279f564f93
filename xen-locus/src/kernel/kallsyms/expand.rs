//! Tokens put together to names: a million of them in every run, so they are copied in whole blocks.

use super::{NAME_MAX, TOKEN_MAX};

/// Bytes of a block; hardly a token is longer.
const BLOCK: usize = 16;
/// Room that a name wants while it is put together.
pub(super) const ROOM: usize = NAME_MAX + TOKEN_MAX + BLOCK;

/// The 256 tokens.
pub(super) struct Pieces {
    all: [Piece; 256],
    /// Tokens longer than a block, whole; the others are empty here.
    long: Vec<Vec<u8>>,
}

#[derive(Clone, Copy, Default)]
struct Piece {
    len: usize,
    block: [u8; BLOCK],
}

impl Pieces {
    /// Prepares tokens, each at most [`TOKEN_MAX`] bytes long.
    pub(super) fn of(tokens: &[Vec<u8>]) -> Pieces {
        let mut all = [Piece::default(); 256];
        for (piece, token) in all.iter_mut().zip(tokens) {
            piece.len = token.len();
            let bytes = piece.block.iter_mut().zip(token);
            bytes.for_each(|(b, &t)| *b = t);
        }
        let is_long = |t: &Vec<u8>| t.len() > BLOCK;
        let long = tokens
            .iter()
            .map(|t| if is_long(t) { t.clone() } else { Vec::new() });
        Pieces {
            all,
            long: long.collect(),
        }
    }

    /// Writes the name that `compressed` stands for to `out`, and says how long it is; nothing if it
    /// is longer than [`NAME_MAX`]. What follows it in `out` is overwritten too.
    pub(super) fn expand(&self, compressed: &[u8], out: &mut [u8]) -> Option<usize> {
        let out: &mut [u8; ROOM] = out.get_mut(..ROOM)?.try_into().ok()?;
        let mut at = 0;
        for &token in compressed {
            let piece = self.all.get(usize::from(token))?;
            out.get_mut(at..at + BLOCK)?.copy_from_slice(&piece.block);
            if piece.len > BLOCK {
                let long = self.long.get(usize::from(token))?;
                out.get_mut(at..at + long.len())?.copy_from_slice(long);
            }
            at += piece.len;
            if at > NAME_MAX {
                return None;
            }
        }
        Some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_any_length_are_put_together() {
        let tokens: Vec<Vec<u8>> = (0..=TOKEN_MAX)
            .map(|n| vec![b'a' + u8::try_from(n % 26).unwrap(); n])
            .collect();
        let pieces = Pieces::of(&tokens);
        let mut out = vec![0; ROOM];
        for compressed in [&[3, 2, 1][..], &[0, 17, 16, 15, 128], &[100, 0, 1, 20], &[]] {
            let wanted: Vec<u8> = compressed
                .iter()
                .flat_map(|&t| tokens[usize::from(t)].clone())
                .collect();
            let len = pieces.expand(compressed, &mut out).unwrap();
            assert_eq!(out[..len], wanted);
        }
    }

    #[test]
    fn a_name_has_an_end() {
        let pieces = Pieces::of(&[vec![b'x'; TOKEN_MAX], vec![b'y']]);
        let mut out = vec![0; ROOM];
        let longest = vec![1; NAME_MAX];
        assert_eq!(pieces.expand(&longest, &mut out), Some(NAME_MAX));
        assert_eq!(pieces.expand(&[1; NAME_MAX + 1], &mut out), None);
        assert_eq!(pieces.expand(&[0; 5], &mut out), None);
        assert_eq!(pieces.expand(&[200], &mut out), Some(0));
        assert_eq!(pieces.expand(&[1], &mut out[..10]), None);
    }
}
