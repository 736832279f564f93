//! Kernels of several releases of Debian: scenarios for each, and the guests that boot them.

use crate::guest::{GuestSpec, Kind};
use crate::suites::{Suite, BOOKWORM};

/// A list of scenarios that do the same with kernels of several releases, as several types of guest:
/// `kernel_scenarios!(run, SUMMARY, [("name", SUITE, Kind, PROFILE), …])`, where `run` takes the
/// machine, the release and the type.
macro_rules! kernel_scenarios {
    ($run:path, $summary:expr, [$(($name:literal, $suite:ident, $kind:ident, $profile:ident)),+ $(,)?]) => {
        &[$($crate::scenario::Scenario {
            name: $name,
            summary: $summary,
            profile: &$crate::profile::$profile,
            run: |ctx| $run(ctx, &$crate::suites::$suite, $crate::guest::Kind::$kind),
        }),+]
    };
}
pub(in crate::scenarios) use kernel_scenarios;

/// The guest with the kernel of a release. Debian 12's is the usual guest of its type; others are
/// larger, because their initramfs is.
pub fn spec(suite: &'static Suite, kind: Kind) -> GuestSpec {
    if *suite == BOOKWORM {
        return GuestSpec::new(kind.name(), kind);
    }
    GuestSpec::new(&format!("{}-{}", suite.name, kind.name()), kind)
        .suite(suite)
        .memory(256)
}
