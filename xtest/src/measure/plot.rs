//! The plot of a report: an SVG file.
//!
//! It has a row for each type of guest, and a panel for each property in which points differ from the base. All
//! have the same logarithmic scale of microseconds.

use std::fmt::Write as _;

use super::pauses::Measured;
use super::points::{Asker, Point, BASE};
use super::report::{OfGuests, Report};
use super::stats::Samples;

const PANEL: f64 = 210.0;
const GAP: f64 = 24.0;
const LEFT: f64 = 64.0;
const TOP: f64 = 74.0;
const HEIGHT: f64 = 240.0;
const ROW: f64 = HEIGHT + 90.0;

const STYLE: &str = "text{font:12px sans-serif;fill:#333}\
    .title{font-size:15px;font-weight:bold}.axis{stroke:#888}.grid{stroke:#ddd}\
    .floor{stroke:#999;fill:#999}.pause{stroke:#1663a8;fill:#1663a8}.range{stroke-width:2}";

/// A panel: its title, and its points in order.
struct Panel<'r> {
    title: &'static str,
    columns: Vec<(String, &'r Measured)>,
}

/// Draws the plot of a report, as SVG.
pub fn svg(report: &Report) -> String {
    let rows: Vec<(&OfGuests, Vec<Panel<'_>>)> =
        report.guests.iter().map(|g| (g, panels(g))).collect();
    let scale = Scale::of(report);
    let widest = rows.iter().map(|(_, p)| p.len()).max().unwrap_or(0);
    let (mut width, mut height) = (LEFT + GAP, TOP + 30.0);
    for _ in 0..widest {
        width += PANEL + GAP;
    }
    for _ in &rows {
        height += ROW;
    }
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\"><style>{STYLE}</style>\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut y = 24.0;
    let base = format!(
        "Pauses in which xen-locus changes a guest; else {} threads, {} vCPUs, under load, 1 function",
        BASE.threads, BASE.vcpus
    );
    text(&mut out, LEFT, y, "title", &base);
    y += 22.0;
    let key = "blue: median (dot), p99 (bar), largest (end of line); grey: the same of the floor; \
               microseconds";
    let (clock, kernel) = (report.clock, &report.kernel);
    text(
        &mut out,
        LEFT,
        y,
        "",
        &format!("{key} {clock}; kernel {kernel}"),
    );
    y = TOP;
    for (guests, panels) in &rows {
        text(&mut out, LEFT, y, "title", &guests.kind.to_uppercase());
        let mut x = LEFT;
        for panel in panels {
            draw(&mut out, panel, x, y + 30.0, &scale);
            x += PANEL + GAP;
        }
        y += ROW;
    }
    out.push_str("</svg>\n");
    out
}

fn panels(guests: &OfGuests) -> Vec<Panel<'_>> {
    // Each panel shows the base too, in its place.
    let by = |title, of: fn(&Point) -> u32, same: fn(&Point) -> Point| {
        let mut found: Vec<&Measured> = guests
            .points
            .iter()
            .filter(|m| same(&m.point) == BASE)
            .collect();
        found.sort_by_key(|m| of(&m.point));
        Panel {
            title,
            columns: found
                .into_iter()
                .map(|m| (of(&m.point).to_string(), m))
                .collect(),
        }
    };
    let mut all = vec![
        by(
            "threads",
            |p| p.threads,
            |p| Point {
                threads: BASE.threads,
                ..*p
            },
        ),
        by(
            "vCPUs",
            |p| p.vcpus,
            |p| Point {
                vcpus: BASE.vcpus,
                ..*p
            },
        ),
        by(
            "functions",
            |p| p.functions,
            |p| Point {
                functions: BASE.functions,
                ..*p
            },
        ),
    ];
    let others = [
        (
            "idle",
            Point {
                load: false,
                ..BASE
            },
        ),
        ("base", BASE),
        (
            "one-shot",
            Point {
                asker: Asker::OneShot,
                ..BASE
            },
        ),
        ("busy dom0", Point { beside: 4, ..BASE }),
    ];
    let found = others
        .iter()
        .filter_map(|(name, point)| Some(((*name).to_owned(), guests.at(*point)?)));
    all.push(Panel {
        title: "load; one-shot commands; a busy dom0",
        columns: found.collect(),
    });
    all.retain(|panel| !panel.columns.is_empty());
    all
}

/// The vertical scale: decades of microseconds, from bottom to top.
struct Scale {
    first: i32,
    last: i32,
}

impl Scale {
    fn of(report: &Report) -> Self {
        let all = report.guests.iter().flat_map(|g| &g.points);
        let values = all.flat_map(|m| {
            [
                m.floor_us.p50,
                m.pause_us.p50,
                m.floor_us.max,
                m.pause_us.max,
            ]
        });
        let values: Vec<u64> = values.filter(|&v| v > 0).collect();
        let digits = |v: u64| i32::try_from(v.ilog10()).unwrap_or(0);
        let least = values.iter().copied().min().map_or(0, digits);
        let most = values.iter().copied().max().map_or(0, digits);
        Self {
            first: least,
            last: most + 1,
        }
    }

    /// The distance of a value from `top`, downwards.
    fn y(&self, top: f64, value: u64) -> f64 {
        #[allow(clippy::cast_precision_loss)] // microseconds
        let log = (value.max(1) as f64).log10();
        let part = (log - f64::from(self.first)) / f64::from((self.last - self.first).max(1));
        top + HEIGHT * (1.0 - part.clamp(0.0, 1.0))
    }
}

fn draw(out: &mut String, panel: &Panel<'_>, x: f64, top: f64, scale: &Scale) {
    let (right, bottom) = (x + PANEL, top + HEIGHT);
    text(out, x, top - 10.0, "", panel.title);
    for decade in scale.first..=scale.last {
        let value = 10u64.pow(u32::try_from(decade).unwrap_or(0));
        let y = scale.y(top, value);
        line(out, "grid", (x, y), (right, y));
        if x <= LEFT {
            text(out, 8.0, y + 4.0, "", &value.to_string());
        }
    }
    line(out, "axis", (x, top), (x, bottom));
    line(out, "axis", (x, bottom), (right, bottom));
    let mut count = 0.0;
    for _ in &panel.columns {
        count += 1.0;
    }
    let step = PANEL / count;
    let mut middle = x + step / 2.0;
    for (name, m) in &panel.columns {
        samples(out, "floor", middle - 7.0, top, scale, &m.floor_us);
        samples(out, "pause", middle + 7.0, top, scale, &m.pause_us);
        let _ = writeln!(
            out,
            "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{name}</text>",
            bottom + 17.0
        );
        middle += step;
    }
}

fn samples(out: &mut String, class: &str, x: f64, top: f64, scale: &Scale, s: &Samples) {
    if s.count == 0 {
        return;
    }
    let y = |value| scale.y(top, value);
    let _ = writeln!(
        out,
        "<g class=\"{class}\"><title>{class}: n {}, median {}, p99 {}, max {} us</title>",
        s.count, s.p50, s.p99, s.max
    );
    line(out, "range", (x, y(s.p50)), (x, y(s.max)));
    line(out, "range", (x - 5.0, y(s.p99)), (x + 5.0, y(s.p99)));
    let _ = writeln!(
        out,
        "<circle cx=\"{x:.1}\" cy=\"{:.1}\" r=\"4\"/></g>",
        y(s.p50)
    );
}

fn line(out: &mut String, class: &str, from: (f64, f64), to: (f64, f64)) {
    let _ = writeln!(
        out,
        "<line class=\"{class}\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>",
        from.0, from.1, to.0, to.1
    );
}

fn text(out: &mut String, x: f64, y: f64, class: &str, what: &str) {
    let what = what.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(
        out,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{what}</text>"
    );
}
