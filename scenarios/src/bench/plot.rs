//! Results as a picture.

use anyhow::{Context as _, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::draw::{BLUE, Canvas, FAINT, GREEN, GREY, GRID, INK, ORANGE, dashes, pixel, text};
use super::table::grouped;
use super::{Distribution, LARGE, Method, Results};

const SIZE: (u32, u32) = (960, 560);
const LEFT: f64 = 80.0;
const RIGHT: f64 = 770.0;
const TOP: f64 = 112.0;
const BOTTOM: f64 = 492.0;
/// What two labels must be apart to be read.
const LABEL_HEIGHT: f64 = 19.0;

/// A logarithmic axis.
#[derive(Clone, Copy, Debug)]
struct Axis {
    low: f64,
    high: f64,
    /// Where the two are, in pixels.
    from: f64,
    to: f64,
}

/// One line: the times to the Southbound by number of VMs.
struct Line {
    name: &'static str,
    color: RGBColor,
    points: Vec<(u32, Distribution)>,
    /// How far to the right its ticks are, so that none hides another's.
    aside: f64,
    /// Whether it is only there for comparison.
    reference: bool,
}

/// The times to the Southbound by number of VMs, a line per method, as SVG.
pub fn plot(results: &Results) -> Result<String> {
    let mut svg = String::new();
    draw(results, &mut svg).context("draw the plot")?;
    Ok(svg)
}

fn draw(results: &Results, svg: &mut String) -> Result<()> {
    let lines = lines(results);
    let Some((x, y)) = axes(&lines) else {
        return Ok(());
    };
    let canvas = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    canvas.fill(&WHITE)?;
    draw_heading(&canvas, results)?;
    draw_grid(&canvas, &lines, x, y)?;
    for line in &lines {
        draw_line(&canvas, line, x, y)?;
    }
    draw_names(&canvas, &lines, y)?;
    canvas.present()?;
    Ok(())
}

fn lines(results: &Results) -> Vec<Line> {
    let nothing = results.sizes.iter();
    let nothing = nothing.map(|size| (size.vms, size.nothing.sb_ms));
    let of = |method: Method| Line {
        name: method.as_str(),
        color: match method {
            Method::AddressSet => GREEN,
            Method::Lsp => BLUE,
            Method::StaticRoute => ORANGE,
        },
        points: results
            .rows
            .iter()
            .filter(|row| row.method == method)
            .map(|row| (row.vms, row.figures.sb_ms))
            .collect(),
        aside: match method {
            Method::AddressSet => -4.0,
            Method::Lsp => 4.0,
            Method::StaticRoute => 0.0,
        },
        reference: false,
    };
    let mut lines = vec![Line {
        name: "(nothing)",
        color: GREY,
        points: nothing.collect(),
        aside: 0.0,
        reference: true,
    }];
    lines.extend(Method::ALL.map(of));
    lines.retain(|line| !line.points.is_empty());
    lines
}

/// The axes that hold all of it, the vertical one from and to a power of ten; `None` where there is nothing.
fn axes(lines: &[Line]) -> Option<(Axis, Axis)> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let vms = || points().map(|(vms, _)| f64::from(*vms));
    let (least, most) = (vms().reduce(f64::min)?, vms().reduce(f64::max)?);
    // A single number of VMs stands in the middle.
    let margin = if least < most { 1.0 } else { 2.0 };
    let x = Axis {
        low: least / margin,
        high: most * margin,
        from: LEFT + 30.0,
        to: RIGHT - 20.0,
    };
    let shortest = points().map(|(_, time)| time.p50).reduce(f64::min)?;
    let longest = points().map(|(_, time)| time.p99).reduce(f64::max)?;
    let low = 10f64.powf(shortest.max(0.001).log10().floor());
    let high = 10f64
        .powf(longest.max(0.001).log10().ceil())
        .max(low * 10.0);
    let y = Axis {
        low,
        high,
        from: BOTTOM,
        to: TOP,
    };
    Some((x, y))
}

fn draw_heading(canvas: &Canvas<'_>, results: &Results) -> Result<()> {
    let heading = "How long OVN takes to follow one VM that has moved";
    text(canvas, heading, (LEFT, 34.0), 22, INK, HPos::Left, true)?;
    let flips = results.rows.iter().map(|row| row.figures.flips);
    let flips = match (flips.clone().min(), flips.max()) {
        (Some(least), Some(most)) if least < most => format!("{least} to {most} flips each"),
        (_, most) => format!("{} flips each", most.unwrap_or_default()),
    };
    let what = format!(
        "From the commit in the Northbound to an up-to-date Southbound, {flips}. Dot: median; tick: 99th percentile."
    );
    text(canvas, &what, (LEFT, 60.0), 14, FAINT, HPos::Left, false)?;
    let median = |method| results.figures(LARGE, method).map(|row| row.sb_ms.p50);
    if let Some((edit, moved)) = median(Method::StaticRoute).zip(median(Method::AddressSet)) {
        let line = format!(
            "With {} VMs, editing the route takes {} times as long as moving the address to another set.",
            grouped(LARGE.into()),
            significant(edit / moved)
        );
        text(canvas, &line, (LEFT, 81.0), 14, INK, HPos::Left, false)?;
    }
    Ok(())
}

fn draw_grid(canvas: &Canvas<'_>, lines: &[Line], x: Axis, y: Axis) -> Result<()> {
    let mut time = y.low;
    while time <= y.high * 1.001 {
        let at = y.at(time);
        let ends = vec![pixel(LEFT, at), pixel(RIGHT, at)];
        canvas.draw(&PathElement::new(ends, GRID))?;
        text(
            canvas,
            &duration(time),
            (LEFT - 10.0, at),
            13,
            FAINT,
            HPos::Right,
            false,
        )?;
        time *= 10.0;
    }
    let sizes = lines.iter().max_by_key(|line| line.points.len());
    for (vms, _) in sizes.map(|line| line.points.as_slice()).unwrap_or_default() {
        let at = x.at(f64::from(*vms));
        let ends = vec![pixel(at, BOTTOM), pixel(at, BOTTOM + 6.0)];
        canvas.draw(&PathElement::new(ends, FAINT))?;
        let label = grouped(u64::from(*vms));
        text(
            canvas,
            &label,
            (at, BOTTOM + 20.0),
            13,
            FAINT,
            HPos::Center,
            false,
        )?;
    }
    let middle = f64::midpoint(x.from, x.to);
    text(
        canvas,
        "VMs",
        (middle, BOTTOM + 44.0),
        13,
        FAINT,
        HPos::Center,
        false,
    )
}

fn draw_line(canvas: &Canvas<'_>, line: &Line, x: Axis, y: Axis) -> Result<()> {
    let at = |vms: u32, time: f64| (x.at(f64::from(vms)), y.at(time));
    let median: Vec<_> = line
        .points
        .iter()
        .map(|(vms, time)| at(*vms, time.p50))
        .collect();
    if line.reference {
        for dash in dashes(&median) {
            canvas.draw(&PathElement::new(dash, line.color.stroke_width(2)))?;
        }
        return Ok(());
    }
    let path: Vec<_> = median.iter().map(|(x, y)| pixel(*x, *y)).collect();
    canvas.draw(&PathElement::new(path, line.color.stroke_width(3)))?;
    for (vms, time) in &line.points {
        let (across, middle) = at(*vms, time.p50);
        let (_, top) = at(*vms, time.p99);
        let whisker = line.color.mix(0.55).stroke_width(2);
        let stem = across + line.aside;
        let tick = vec![pixel(stem - 6.0, top), pixel(stem + 6.0, top)];
        let stem = vec![pixel(stem, middle), pixel(stem, top)];
        canvas.draw(&PathElement::new(stem, whisker))?;
        canvas.draw(&PathElement::new(tick, whisker))?;
        canvas.draw(&Circle::new(pixel(across, middle), 7, WHITE.filled()))?;
        canvas.draw(&Circle::new(pixel(across, middle), 5, line.color.filled()))?;
    }
    Ok(())
}

/// Names each line where it ends, with its last median, and moves names apart that would overlap.
fn draw_names(canvas: &Canvas<'_>, lines: &[Line], y: Axis) -> Result<()> {
    let mut names: Vec<_> = lines
        .iter()
        .filter_map(|line| {
            let (_, time) = line.points.last()?;
            Some((y.at(time.p50), line, time.p50))
        })
        .collect();
    names.sort_by(|(a, ..), (b, ..)| b.total_cmp(a));
    let mut lowest_free = f64::INFINITY;
    for (at, line, median) in names {
        let at = at.min(lowest_free);
        lowest_free = at - LABEL_HEIGHT;
        let (left, bold) = (RIGHT + 8.0, !line.reference);
        text(
            canvas,
            line.name,
            (left, at),
            14,
            line.color,
            HPos::Left,
            bold,
        )?;
        let right = f64::from(SIZE.0) - 16.0;
        let time = duration(median);
        text(
            canvas,
            &time,
            (right, at),
            14,
            line.color,
            HPos::Right,
            false,
        )?;
    }
    Ok(())
}

// === impl Axis ===

impl Axis {
    fn at(self, value: f64) -> f64 {
        let share = (value.max(self.low / 2.0) / self.low).log10() / (self.high / self.low).log10();
        self.from + share * (self.to - self.from)
    }
}

/// A time in the unit that people would say it in.
fn duration(millis: f64) -> String {
    if millis >= 999.5 {
        format!("{} s", significant(millis / 1000.0))
    } else {
        format!("{} ms", significant(millis))
    }
}

/// Two significant digits below a hundred, whole numbers above.
fn significant(value: f64) -> String {
    match value {
        ..0.95 => format!("{value:.2}"),
        0.95..9.95 => format!("{value:.1}").trim_end_matches(".0").to_owned(),
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "rounded"
        )]
        _ => grouped(value.round() as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::super::results::tests::results;
    use super::*;

    #[test]
    fn the_plot_names_every_method_and_its_time() {
        let svg = plot(&results([1.0, 1.25], [30.0, 3210.0])).unwrap();
        for shown in [
            "address-set",
            "static-route",
            "lsp",
            "3.2 s",
            "1.2 ms",
            "10,000",
        ] {
            assert!(svg.contains(shown), "{shown} is missing");
        }
    }

    #[test]
    fn a_single_size_and_no_size_at_all_can_be_drawn() {
        let mut results = results([1.0, 1.25], [30.0, 3210.0]);
        results.sizes.truncate(1);
        results.rows.truncate(3);
        assert!(plot(&results).unwrap().contains("static-route"));
        results.sizes.clear();
        results.rows.clear();
        plot(&results).unwrap();
    }

    #[test]
    fn times_read_as_people_say_them() {
        for (millis, text) in [
            (0.42, "0.42 ms"),
            (1.0, "1 ms"),
            (2.68, "2.7 ms"),
            (12.9, "13 ms"),
            (3596.0, "3.6 s"),
            (360_000.0, "360 s"),
        ] {
            assert_eq!(duration(millis), text);
        }
    }
}
