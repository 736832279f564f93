//! `xtest report`: the results that hold for the sources as they are, as a table, with what is missing.

use crate::results::{Results, PASSED};
use crate::scenario::Scenario;

/// Prints a line for each scenario, and the sum. Returns whether all have passed.
pub fn print(results: &Results, scenarios: &[Scenario]) -> bool {
    let (mut passed, mut seconds) = (0, 0.0);
    let (mut failed, mut gaps) = (Vec::new(), Vec::new());
    for scenario in scenarios {
        let name = scenario.name;
        let start = format!("{:<12}{name:<28}", scenario.profile.name);
        let Some(stored) = results.of(name) else {
            println!("{start}      -    missing");
            gaps.push(name);
            continue;
        };
        let last = &stored.last;
        seconds += last.seconds;
        match &*last.verdict {
            PASSED => passed += 1,
            "skipped" => gaps.push(name),
            _ => failed.push(name),
        }
        let mut notes = Vec::new();
        let lost = stored.earlier.iter().filter(|e| e.verdict != PASSED);
        for (count, what) in [
            (lost.count(), "did not pass before"),
            (usize::from(last.second_try), "second try"),
            (last.started_again as usize, "guests started again"),
            (last.excused, "stalls excused"),
        ] {
            if count > 0 {
                notes.push(format!("{count} {what}"));
            }
        }
        if last.verdict != PASSED {
            notes.push(last.why.lines().next().unwrap_or_default().to_owned());
        }
        let notes = notes.join("; ");
        let line = format!("{start} {:6.1} s  {}  {notes}", last.seconds, last.verdict);
        println!("{}", line.trim_end());
    }
    let all = scenarios.len();
    for (what, names) in [("failed", &failed), ("missing", &gaps)] {
        if !names.is_empty() {
            println!("{what}: {}", names.join(" "));
        }
    }
    println!(
        "{}: {passed} of {all} passed, {} failed, {} missing; {seconds:.0} s of machines",
        results.key,
        failed.len(),
        gaps.len()
    );
    passed == all
}
