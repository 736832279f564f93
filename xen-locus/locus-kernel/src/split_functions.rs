//! Parts of functions that seldom run, which the compiler put elsewhere (GCC's `-freorder-blocks-and-partition`). A thread
//! there is in the function: it goes on in the main part.

/// What is appended to the function's name.
pub const SUFFIX: &str = ".cold";

/// Whether a symbol called `part` is such a part of the function `name`: `NAME.cold`, or of GCC 8 `NAME.cold.N`.
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
