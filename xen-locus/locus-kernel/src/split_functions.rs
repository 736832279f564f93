//! Functions that the compiler has split: code that seldom runs is placed elsewhere, under a symbol
//! of its own (GCC's `-freorder-blocks-and-partition`).
//!
//! A thread in such a part is in the function, because it goes on in the main part.

/// What GCC appends to the function's name to name the part.
pub const SUFFIX: &str = ".cold";

/// Whether the symbol `part` names a part of the function `name`: `NAME.cold`, or `NAME.cold.N` as
/// GCC 8 has it.
#[must_use]
pub fn is_part(part: &str, name: &str) -> bool {
    let rest = part.strip_prefix(name);
    let rest = rest.and_then(|p| p.strip_prefix(SUFFIX));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
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
}
