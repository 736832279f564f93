//! `info --symbols`: symbols by name.

use locus_kernel::modules::Reader;
use locus_kernel::Kernel;
use serde_json::json;

use crate::cli::args::Output;
use crate::cli::subject::Subject;
use crate::cli::{out, Session};
use crate::error::Error;

/// Shows the symbols that match: the kernel's in its order, then those of its modules.
///
/// # Errors
/// The modules can't be read.
pub fn show(
    session: &Session,
    subject: &Subject,
    kernel: &Kernel<'_>,
    pattern: &str,
) -> Result<(), Error> {
    let wanted = |name: &str| matches(pattern.as_bytes(), name.as_bytes());
    let found = kernel.symbols.iter().filter(|s| wanted(&s.name));
    let of_modules = Reader::new(kernel)?.each(|reader, module| {
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
            out::object(subject.object(json!({
                "symbol_list": own.chain(of_modules).collect::<Vec<_>>(),
            })));
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

/// Whether `name` matches `pattern`, in which `*` stands for any run and `?` for any one byte. Goes
/// back to the last `*` only, so that its time is bounded by the product of the two lengths.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&c) if c == b'?' || name.get(n) == Some(&c) => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    p = at + 1;
                    n = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern
        .get(p..)
        .is_some_and(|rest| rest.iter().all(|&c| c == b'*'))
}

#[cfg(test)]
mod tests {
    use super::matches;

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
        ] {
            assert_eq!(
                matches(pattern.as_bytes(), name.as_bytes()),
                result,
                "{pattern} {name}"
            );
        }
    }
}
