//! Waiting until something is so.

use std::time::{Duration, Instant};

use crate::limits;
use crate::verdict::Verdict;

/// The longest time for a command by which a guest tells of all its tasks or symbols, on an emulated
/// processor.
pub const GATHERING: Duration = Duration::from_secs(300);

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(300);

/// Looks again and again until `look` returns a value.
///
/// # Errors
///
/// [`Verdict::Failure`] with what `look` said last, when `limit` (scaled to the host) has passed; and
/// at once what `look` fails with.
pub fn until<T>(
    limit: Duration,
    mut look: impl FnMut() -> Result<Result<T, String>, Verdict>,
) -> Result<T, Verdict> {
    let limit = limits::scaled(limit);
    let began = Instant::now();
    loop {
        match look()? {
            Ok(found) => return Ok(found),
            Err(why) if began.elapsed() >= limit => return Err(Verdict::failure(why)),
            Err(_) => std::thread::sleep(INTERVAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_ends_with_a_value_or_with_what_was_said_last() {
        let mut looks = 0;
        let found = until(Duration::from_secs(60), || {
            looks += 1;
            Ok(if looks == 2 {
                Ok(looks)
            } else {
                Err("not yet".to_owned())
            })
        });
        assert_eq!(found, Ok(2));
        let never = until(Duration::ZERO, || Ok(Err::<(), _>("still not".to_owned())));
        assert_eq!(never, Err(Verdict::failure("still not")));
        let broken = until(Duration::from_secs(60), || {
            Err::<Result<(), _>, _>(Verdict::skip("no"))
        });
        assert_eq!(broken, Err(Verdict::skip("no")));
    }
}
