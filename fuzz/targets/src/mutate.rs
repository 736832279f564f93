//! A short deterministic fuzzing of every target on stable Rust.

use std::hint::black_box;
use std::sync::OnceLock;
use std::time::Duration;

use locus_guest::addr::PAGE_LEN;
use locus_guest::budget;

use super::TARGETS;

/// Number of mutated inputs for each target.
const INPUTS: usize = 500;
/// Longest seed that is mutated here, in bytes. It takes too long to read a full arena so often: only libFuzzer mutates it.
const LONGEST: usize = 256 << 10;

/// Marsaglia's xorshift64: the same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// Numbers that tend to break counts, lengths and offsets.
const ODD: [u64; 8] = [
    0,
    1,
    0x7f,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 32,
    u64::MAX,
];

fn mutate(data: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(data.len());
        match random.below(6) {
            0 if !data.is_empty() => data[at] ^= 1 << random.below(8),
            1 if !data.is_empty() => data[at] = random.next() as u8,
            2 => data.truncate(at),
            3 => {
                let from = random.below(data.len());
                let part: Vec<u8> = data[from..].iter().take(64).copied().collect();
                for (to, byte) in data[at..].iter_mut().zip(part) {
                    *to = byte;
                }
            }
            _ => {
                // An aligned word of 4 or 8 bytes.
                let odd = ODD[random.below(ODD.len())].to_le_bytes();
                let (at, len) = (at & !7, 4 << random.below(2));
                for (to, byte) in data[at..].iter_mut().zip(&odd[..len]) {
                    *to = *byte;
                }
            }
        }
    }
}

/// Processor time that this thread has used.
pub(super) fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap())
}

/// Longest processor time that reading one guest may take here: four times what it takes to look at every byte
/// that a whole budget pays for.
pub(super) fn patience() -> Duration {
    const TIMES: u32 = 4;
    /// Only one part in so many is measured.
    const PART: u32 = 16;
    static TAKEN: OnceLock<Duration> = OnceLock::new();
    *TAKEN.get_or_init(|| {
        let page = [7u8; PAGE_LEN];
        let pages = budget::LIMIT * budget::BYTES_PER_UNIT / PAGE_LEN as u64 / u64::from(PART);
        let began = cpu_time();
        for _ in 0..pages {
            let page = black_box(&page);
            black_box(page.iter().filter(|b| **b == 0).count());
        }
        (cpu_time() - began) * PART * TIMES
    })
}

#[test]
fn mutated_seeds_of_every_target_do_no_harm() {
    for target in TARGETS {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut seeds = (target.seeds)();
        seeds.iter().for_each(|seed| (target.run)(seed));
        (target.run)(&[]);
        seeds.retain(|seed| seed.len() <= LONGEST);
        for round in 0..INPUTS {
            let mut data = seeds[round % seeds.len()].clone();
            mutate(&mut data, &mut random);
            let began = cpu_time();
            (target.run)(&data);
            let took = cpu_time() - began;
            let name = target.name;
            assert!(took < patience(), "{name}, input {round}: {took:?}");
        }
    }
}

#[test]
fn every_target_has_a_file_for_the_fuzzer_and_every_file_a_target() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz_targets");
    let mut files: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| path.file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    files.sort();
    let mut names: Vec<&str> = TARGETS.iter().map(|t| t.name).collect();
    names.sort_unstable();
    assert_eq!(files, names);
}
