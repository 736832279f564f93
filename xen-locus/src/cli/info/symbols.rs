//! `info --symbols`: symbols by name.

use locus_kernel::modules::ModuleReader;
use locus_kernel::Kernel;
use serde_json::json;
use wildmatch::WildMatch;

use crate::cli::args::Output;
use crate::cli::guest::Guest;
use crate::cli::{out, Session};
use crate::error::Error;

/// Shows the symbols that match: the kernel's in its order, then those of its modules.
///
/// # Errors
/// The modules can't be read.
pub fn show(
    session: &Session,
    guest: &Guest,
    kernel: &Kernel<'_>,
    pattern: &str,
) -> Result<(), Error> {
    // It goes back to the last `*` only: its time is at most the product of the two lengths, whatever names a
    // guest has.
    let pattern = WildMatch::new(pattern);
    let wanted = |name: &str| pattern.matches(name);
    let found = kernel.symbols.iter().filter(|s| wanted(&s.name));
    let of_modules = ModuleReader::new(kernel)?.each(|reader, module| {
        let mut symbols = reader.symbols(module)?;
        symbols.retain(|s| wanted(&s.name));
        Ok((module.name.clone(), symbols))
    })?;
    match session.output {
        Output::Json => {
            let own = found.map(|s| {
                json!({
                    "name": s.name,
                    "type": s.kind,
                    "address": out::address(s.addr.0),
                })
            });
            let of_modules = of_modules.iter().flat_map(|(module, symbols)| {
                symbols.iter().map(move |s| {
                    json!({
                        "name": s.name,
                        "type": s.kind,
                        "address": out::address(s.addr.0),
                        "module": module,
                    })
                })
            });
            let all = own.chain(of_modules).collect();
            out::object(guest.object(out::list("symbol_list", all)));
        }
        Output::Table => {
            let mut text = String::new();
            for s in found {
                text.push_str(&format!("{:016x} {} {}\n", s.addr.0, s.kind, s.name));
            }
            for (module, symbols) in of_modules {
                for s in symbols {
                    text.push_str(&format!(
                        "{:016x} {} {}\t[{module}]\n",
                        s.addr.0, s.kind, s.name
                    ));
                }
            }
            out::text(&text);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use wildmatch::WildMatch;

    #[test]
    fn patterns_match_as_a_shell_matches() {
        for (pattern, name, result) in [
            ("*", "", true),
            ("*", "schedule", true),
            ("schedule", "schedule", true),
            ("schedule", "schedule_timeout", false),
            ("sched*out", "schedule_timeout", true),
            ("*_time*", "schedule_timeout", true),
            ("s?h*", "schedule", true),
            ("?", "", false),
            ("a*b*c", "aXbXbXc", true),
            ("a*b*c", "aXbXbX", false),
            ("Sched*", "schedule", false),
            ("[s]*", "schedule", false),
            ("a*c", "a/b/c", true),
        ] {
            let matches = WildMatch::new(pattern).matches(name);
            assert_eq!(matches, result, "{pattern} {name}");
        }
    }

    #[test]
    fn names_of_a_hostile_guest_cost_no_more_than_the_product_of_the_lengths() {
        let pattern = WildMatch::new(&"*a".repeat(200));
        let name = "a".repeat(510) + "b";
        let began = Instant::now();
        for _ in 0..100 {
            assert!(!pattern.matches(&name));
        }
        assert!(began.elapsed() < Duration::from_secs(10));
    }
}
