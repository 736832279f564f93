//! Addresses of symbols: which table they are in, and in which encoding.

use locus_guest::addr::Gva;
use locus_guest::fetch;

use super::data::ReadOnlyData;
use super::names::{find_names, NamesTable};
use super::tokens::TokenTable;
use super::{Anchors, Symbols};
use crate::Error;

/// The symbols that these tokens lead to; `None` if no table before or behind them agrees with the anchors.
pub(super) fn decode(
    data: &mut ReadOnlyData<'_, '_>,
    tokens: &TokenTable,
    anchors: Anchors<'_>,
) -> Result<Option<Symbols>, Error> {
    let budget = data.space.budget();
    let Some(names) = find_names(data.bytes(), tokens.at, budget)? else {
        return Ok(None);
    };
    budget.spend(names.count as u64)?;
    let Some(mut symbols) = Symbols::of(data.bytes(), &names, tokens) else {
        return Ok(None);
    };
    let table = names.count * 4;
    let before = names.num_at.checked_sub(8 + table.next_multiple_of(8));
    let behind = Some(tokens.end);
    for (at, base_at) in [
        (before, names.num_at.wrapping_sub(8)),
        (behind, (tokens.end + table).next_multiple_of(8)),
    ] {
        let Some(at) = at else { continue };
        if !data.reach(base_at + 8)? {
            continue;
        }
        let bytes = data.bytes();
        let Some(base) = fetch::u64(bytes, base_at) else {
            continue;
        };
        for encoding in [
            AddressEncoding::PercpuAbsolute,
            AddressEncoding::BaseRelative,
            AddressEncoding::PlaceRelative,
        ] {
            let address = |i: usize| {
                let place = at + 4 * i;
                let word = fetch::u32(bytes, place)?;
                Some(encoding.address(word, base, data.start.plus(place as u64)))
            };
            if !text_is_there(&names, address, anchors) {
                continue;
            }
            budget.spend(names.count as u64)?;
            if symbols.set_addresses(address) && symbols.agrees(anchors) {
                let mut places = vec![("kallsyms_offsets", at)];
                if !matches!(encoding, AddressEncoding::PlaceRelative) {
                    places.push(("kallsyms_relative_base", base_at));
                }
                symbols.places = data.places(&names, tokens, &places);
                return Ok(Some(symbols));
            }
        }
    }
    // Before v4.6 and where base-relative tables were not chosen: plain 64-bit addresses.
    for at in [names.num_at.checked_sub(names.count * 8), behind] {
        let Some(at) = at else { continue };
        if !data.reach(at + names.count * 8)? {
            continue;
        }
        let address = |i: usize| fetch::u64(data.bytes(), at + 8 * i);
        budget.spend(names.count as u64)?;
        if symbols.set_addresses(address) && symbols.agrees(anchors) {
            symbols.places = data.places(&names, tokens, &[("kallsyms_addresses", at)]);
            return Ok(Some(symbols));
        }
    }
    Ok(None)
}

/// Whether some symbol is at `_text`. It is a quick check, before all addresses are decoded in a
/// wrong encoding.
fn text_is_there(
    names: &NamesTable,
    address: impl Fn(usize) -> Option<u64>,
    anchors: Anchors<'_>,
) -> bool {
    (0..names.count).any(|i| address(i) == Some(anchors.text_base.0))
}

/// How 32-bit words encode addresses (`kallsyms_sym_address`, kernel/kallsyms.c).
#[derive(Clone, Copy)]
enum AddressEncoding {
    /// Positive words are absolute (per-CPU offsets), negative ones count down from the base.
    PercpuAbsolute,
    /// Words are added to the base.
    BaseRelative,
    /// Words are relative to their own place.
    PlaceRelative,
}

impl AddressEncoding {
    fn address(self, word: u32, base: u64, place: Gva) -> u64 {
        let signed = i64::from(word.cast_signed());
        match self {
            AddressEncoding::PercpuAbsolute if signed >= 0 => u64::from(word),
            AddressEncoding::PercpuAbsolute => base.wrapping_sub(1).wrapping_add_signed(-signed),
            AddressEncoding::BaseRelative => base.wrapping_add(u64::from(word)),
            AddressEncoding::PlaceRelative => place.0.wrapping_add_signed(signed),
        }
    }
}
