//! Functions that the compiler has split: code that seldom runs is placed elsewhere, under a symbol
//! of its own (GCC's `-freorder-blocks-and-partition`).
//!
//! A thread in such a part is in the function, because it goes on in the main part.

/// What GCC appends to the function's name to name the part.
pub const SUFFIX: &str = ".cold";

/// Most parts believed of one function. Compilers make one, or two.
pub const PARTS_MAX: usize = 64;

/// Whether the symbol `part` names a part of the function `name`: `NAME.cold`, or `NAME.cold.N` as
/// GCC 8 has it.
#[must_use]
pub fn is_part(part: &str, name: &str) -> bool {
    let rest = part.strip_prefix(name);
    let rest = rest.and_then(|p| p.strip_prefix(SUFFIX));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The names of functions of which the symbol `part` may name a part: those for which [`is_part`] is true.
pub fn wholes(part: &str) -> impl Iterator<Item = &str> {
    part.match_indices(SUFFIX).filter_map(move |(at, _)| {
        let name = part.get(..at)?;
        is_part(part, name).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_told_from_another_function_and_its_parts() {
        for part in ["f.cold", "f.cold.12"] {
            assert!(is_part(part, "f"), "{part}");
        }
        for other in ["f", "f.isra.0.cold", "ff.cold", "f.coldest", "cold"] {
            assert!(!is_part(other, "f"), "{other}");
        }
        assert!(is_part("f.isra.0.cold", "f.isra.0"));
    }

    #[test]
    fn the_whole_of_a_part_is_known_by_its_name() {
        let of = |part| wholes(part).collect::<Vec<_>>();
        assert_eq!(of("f.cold"), ["f"]);
        assert_eq!(of("f.isra.0.cold.12"), ["f.isra.0"]);
        assert_eq!(of("f.cold.cold"), ["f", "f.cold"]);
        assert!(of("f").is_empty() && of("f.coldest").is_empty());
    }
}
