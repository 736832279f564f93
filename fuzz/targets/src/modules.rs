//! The list of modules, with their symbols, build-ids and types.

use locus_guest::addr::{Gva, PAGE_LEN};
use locus_kernel::modules::sample::{blob, data, fixture, Age, DATA, LEN};

use super::look;
use super::stage::Stage;

const AGES: [Age; 2] = [Age::Old, Age::New];

fn stage(age: Age) -> Stage {
    Stage::new(fixture(age), Gva(DATA), LEN / PAGE_LEN)
}

thread_local! {
    static STAGES: [Stage; 2] = AGES.map(stage);
}

/// The first 8 bytes of `data` choose one of two layouts. The memory of the modules follows, and then the
/// kernel's types.
pub fn run(data: &[u8]) {
    let Some((age, data)) = data.split_at_checked(8) else {
        return;
    };
    STAGES.with(|stages| {
        let stage = &stages[usize::from(age[0] & 1)];
        stage.kernel(data).iter().for_each(look::modules);
    });
}

/// Two modules in each layout, with the types of the fixture, and with types in the input.
pub fn seeds() -> Vec<Vec<u8>> {
    let seeds = (0u64..).zip(AGES).flat_map(|(n, age)| {
        let head = n.to_le_bytes();
        let with = |types: &[u8]| [&head[..], &data(age).0, types].concat();
        [with(&[]), with(&blob(age).bytes())]
    });
    seeds.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use locus_kernel::modules::ModuleReader;

    #[test]
    fn the_seeds_have_modules_with_symbols_and_types() {
        for (age, seeds) in AGES.into_iter().zip(seeds().chunks(2)) {
            for seed in seeds {
                let kernel = stage(age).kernel(&seed[8..]).unwrap();
                let mut reader = ModuleReader::new(&kernel).unwrap();
                let all = reader.each(|reader, module| {
                    Ok((reader.symbols(module)?.len(), reader.btf(module)?.is_some()))
                });
                assert_eq!(all.unwrap(), [(2, true), (2, false)]);
            }
        }
    }
}
