//! ORC tables, which the unwinder uses: those of the kernel and of a module.

use locus_guest::addr::{Range, PAGE_LEN};
use locus_guest::fetch;
use locus_kernel::fixture::{Fixture, TEXT, TEXT_LEN};
use locus_kernel::orc::sample::{btf, frame, ALL};
use locus_kernel::orc::{OrcFormat, OrcRows, FORMAT_HASHES};
use locus_kernel::Kernel;

use super::guest::DATA;
use super::look;
use super::stage::Stage;

/// Number of rows in the table.
const ROWS: u64 = 64;
// Offsets in the page that is the input: the addresses, the rows, the hash of the format, the
// number of rows of a module.
const IPS_AT: u64 = 0;
const ROWS_AT: u64 = 0x200;
const HASH_AT: u64 = 0x400;
const COUNT_AT: usize = 0x440;

/// A kernel with or without `.orc_header`.
fn stage(header: bool) -> Stage {
    let mut fixture = Fixture::new();
    let mut symbol = |name: &str, at: u64| {
        fixture.symbols.push((at, 'R', name.to_owned()));
    };
    symbol("_etext", TEXT.0 + TEXT_LEN as u64);
    symbol("__start_orc_unwind_ip", DATA.0 + IPS_AT);
    symbol("__stop_orc_unwind_ip", DATA.0 + IPS_AT + 4 * ROWS);
    symbol("__start_orc_unwind", DATA.0 + ROWS_AT);
    symbol("__stop_orc_unwind", DATA.0 + ROWS_AT + 6 * ROWS);
    if header {
        symbol("__start_orc_header", DATA.0 + HASH_AT);
    }
    fixture
        .constants
        .push(("__start_BTF", btf(OrcFormat::Typed)));
    fixture.constants.push(("__stop_BTF", vec![0; 8]));
    Stage::new(fixture, DATA, 1)
}

thread_local! {
    static STAGES: [Stage; 2] = [true, false].map(stage);
}

/// `data` is the page with the tables, and then the kernel's types.
pub fn run(data: &[u8]) {
    STAGES.with(|stages| {
        for kernel in stages.iter().filter_map(|stage| stage.kernel(data)) {
            look::orc(&kernel);
            of_module(&kernel, data);
        }
    });
}

/// Reads the same tables as those of a module.
fn of_module(kernel: &Kernel<'_>, data: &[u8]) {
    let count = fetch::u64(data, COUNT_AT).unwrap_or(0) as usize;
    let text = vec![Range::new(TEXT, TEXT_LEN as u64)];
    let tables = (DATA.plus(IPS_AT), DATA.plus(ROWS_AT), count);
    if let Ok(orc) = OrcRows::of_module(kernel, &kernel.space, tables, text) {
        look::rows(&orc);
    }
}

fn page(format: OrcFormat) -> Vec<u8> {
    let mut page = vec![0; PAGE_LEN];
    let mut put = |at: u64, bytes: &[u8]| {
        page[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    };
    for i in 0..ROWS {
        let ip = TEXT.0 + i / 2 * 0x100;
        let place = DATA.0 + IPS_AT + 4 * i;
        put(
            IPS_AT + 4 * i,
            &(ip.wrapping_sub(place) as u32).to_le_bytes(),
        );
        put(ROWS_AT + 6 * i, &frame(format, 8 * i as i16));
    }
    if let Some((_, hash)) = FORMAT_HASHES.iter().find(|(f, _)| *f == format) {
        put(HASH_AT, hash);
    }
    put(COUNT_AT as u64, &ROWS.to_le_bytes());
    page
}

/// One table in each format that kernels have used.
pub fn seeds() -> Vec<Vec<u8>> {
    ALL.map(|format| [page(format), btf(format)].concat())
        .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_have_tables() {
        for (format, seed) in ALL.into_iter().zip(seeds()) {
            // The oldest format is older than the header.
            let stage = stage(format != OrcFormat::End);
            let orc = OrcRows::read(&stage.kernel(&seed).unwrap()).unwrap();
            assert_eq!((orc.len() as u64, orc.format()), (ROWS, format));
            assert_eq!(orc.row(TEXT).unwrap().sp.offset, 8);
        }
    }
}
