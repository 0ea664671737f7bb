//! Migrations packet by packet, as a picture.

use anyhow::{Context as _, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::super::draw::{
    BLUE, Canvas, FAINT, GREEN, GREY, GRID, INK, ORANGE, dashes, pixel, text,
};
use super::check::named;
use super::picture::{BEFORE_MS, Picture, Way};

const WIDTH: u32 = 960;
const LEFT: f64 = 190.0;
const RIGHT: f64 = 936.0;
const HEADING: f64 = 96.0;
/// A panel: its title with the names of the moments, and the rows of both directions.
const TITLE: f64 = 34.0;
const ROW: f64 = 13.0;
const BETWEEN_WAYS: f64 = 7.0;
const BETWEEN_PANELS: f64 = 20.0;
const AXIS: f64 = 48.0;
/// What two names of moments must be apart to be read.
const NAME_WIDTH: f64 = 64.0;
/// Packets that are no further apart than this belong to one bar: a little more than a period at 1 kHz.
const BAR_MS: f64 = 1.6;
const PAUSE: RGBColor = RGBColor(0xf1, 0xf3, 0xf5);
const PURPLE: RGBColor = RGBColor(0x86, 0x2e, 0x9c);

/// Milliseconds from the pause on the horizontal axis.
#[derive(Clone, Copy, Debug)]
struct Time {
    from_ms: f64,
    to_ms: f64,
}

/// A kind of packets: a row of a panel.
type Row<'a> = (&'static str, &'a [f64], RGBColor);

/// One migration of each strategy, one below the other on the same axis, as SVG.
///
/// # Errors
/// When there is none.
pub fn plot(pictures: &[&Picture]) -> Result<String> {
    let mut svg = String::new();
    draw(pictures, &mut svg).context("draw the plot")?;
    Ok(svg)
}

fn draw(pictures: &[&Picture], svg: &mut String) -> Result<()> {
    let first = pictures.first().context("there is no picture")?;
    let until = pictures.iter().map(|picture| picture.until_ms);
    let time = Time {
        from_ms: -BEFORE_MS,
        to_ms: until.fold(1.0, f64::max),
    };
    let panels = pictures
        .iter()
        .fold(0.0, |height, _| height + panel_height());
    let bottom = HEADING + panels;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "pixels of a picture with a handful of panels"
    )]
    let height = (bottom + AXIS).ceil() as u32;
    let canvas = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    canvas.fill(&WHITE)?;
    draw_heading(&canvas, first)?;
    draw_axis(&canvas, time, bottom)?;
    let mut top = HEADING;
    for picture in pictures {
        draw_panel(&canvas, picture, time, top)?;
        top += panel_height();
    }
    canvas.present()?;
    Ok(())
}

fn panel_height() -> f64 {
    TITLE + 8.0 * ROW + BETWEEN_WAYS + BETWEEN_PANELS
}

fn draw_heading(canvas: &Canvas<'_>, picture: &Picture) -> Result<()> {
    let topology = named(picture.topology);
    let heading = format!("One live migration, packet by packet ({topology})");
    text(canvas, &heading, (24.0, 32.0), 22, INK, HPos::Left, true)?;
    let what = "1,000 packets a second each way; each where it was sent, delivered, lost (when it was sent), or delivered \
                again. Grey: the pause.";
    text(canvas, what, (24.0, 58.0), 14, FAINT, HPos::Left, false)
}

fn draw_axis(canvas: &Canvas<'_>, time: Time, bottom: f64) -> Result<()> {
    let step = time.step_ms();
    let mut at_ms = (time.from_ms / step).ceil() * step;
    while at_ms <= time.to_ms {
        let at = time.at(at_ms);
        let line = vec![pixel(at, HEADING), pixel(at, bottom)];
        canvas.draw(&PathElement::new(line, GRID))?;
        let label = format!("{at_ms:.0}");
        text(
            canvas,
            &label,
            (at, bottom + 14.0),
            13,
            FAINT,
            HPos::Center,
            false,
        )?;
        at_ms += step;
    }
    let middle = f64::midpoint(LEFT, RIGHT);
    let label = "ms from the pause";
    text(
        canvas,
        label,
        (middle, bottom + 34.0),
        13,
        FAINT,
        HPos::Center,
        false,
    )
}

fn draw_panel(canvas: &Canvas<'_>, picture: &Picture, time: Time, top: f64) -> Result<()> {
    let rows_top = top + TITLE;
    let rows_bottom = rows_top + 8.0 * ROW + BETWEEN_WAYS;
    if let Some(resumed) = picture.resumed_ms {
        let corners = [
            pixel(time.at(0.0), rows_top),
            pixel(time.at(resumed), rows_bottom),
        ];
        canvas.draw(&Rectangle::new(corners, PAUSE.filled()))?;
    }
    draw_moments(canvas, picture, time, (rows_top, rows_bottom))?;
    let title = picture.strategy.to_string();
    text(
        canvas,
        &title,
        (24.0, top + 20.0),
        16,
        INK,
        HPos::Left,
        true,
    )?;
    let mut y = rows_top;
    for (way, name) in [(&picture.to_vm, "to VM"), (&picture.from_vm, "from VM")] {
        text(
            canvas,
            name,
            (24.0, y + 2.0 * ROW),
            13,
            INK,
            HPos::Left,
            false,
        )?;
        for (kind, times, color) in rows(way) {
            let middle = y + ROW / 2.0;
            let label = match kind {
                "sent" | "delivered" => kind.to_owned(),
                kind => format!("{} {kind}", times.len()),
            };
            let shade = if times.is_empty() { FAINT } else { color };
            let place = (LEFT - 10.0, middle);
            text(canvas, &label, place, 12, shade, HPos::Right, false)?;
            for (from, to) in bars(times) {
                let corners = [
                    pixel(time.at(from) - 0.6, y + 2.0),
                    pixel(time.at(to) + 0.6, y + ROW - 2.0),
                ];
                canvas.draw(&Rectangle::new(corners, color.filled()))?;
            }
            y += ROW;
        }
        y += BETWEEN_WAYS;
    }
    Ok(())
}

fn rows(way: &Way) -> [Row<'_>; 4] {
    [
        ("sent", &way.sent, GREY),
        ("delivered", &way.delivered, GREEN),
        ("lost", &way.lost, ORANGE),
        ("twice", &way.twice, PURPLE),
    ]
}

/// Lines at what happened, and its names above them, each no further to the left than the one before allows.
fn draw_moments(
    canvas: &Canvas<'_>,
    picture: &Picture,
    time: Time,
    (top, bottom): (f64, f64),
) -> Result<()> {
    let mut moments = vec![("pause", 0.0, INK)];
    for (name, at_ms, color) in [
        ("open", picture.opened_ms, GREEN),
        ("activation", picture.activated_ms, GREEN),
        ("resume", picture.resumed_ms, INK),
        ("flip", picture.flipped_ms, BLUE),
    ] {
        let at_ms = at_ms.filter(|at_ms| (time.from_ms..=time.to_ms).contains(at_ms));
        moments.extend(at_ms.map(|at_ms| (name, at_ms, color)));
    }
    moments.sort_by(|(_, one, _), (_, other, _)| one.total_cmp(other));
    let mut free = f64::NEG_INFINITY;
    for (name, at_ms, color) in moments {
        let at = time.at(at_ms);
        let path = [(at, top - 6.0), (at, bottom)];
        let lines = if color == INK {
            vec![path.map(|(x, y)| pixel(x, y)).to_vec()]
        } else {
            dashes(&path)
        };
        for line in lines {
            canvas.draw(&PathElement::new(line, color.stroke_width(1)))?;
        }
        let left = at.max(free).min(RIGHT - NAME_WIDTH / 2.0);
        free = left + NAME_WIDTH;
        text(
            canvas,
            name,
            (left, top - 13.0),
            12,
            color,
            HPos::Left,
            false,
        )?;
    }
    Ok(())
}

/// Packets close to each other as one bar each: from when to when. The times ascend.
fn bars(times: &[f64]) -> Vec<(f64, f64)> {
    let mut bars: Vec<(f64, f64)> = Vec::new();
    for &at in times {
        match bars.last_mut() {
            Some((_, to)) if at - *to <= BAR_MS => *to = at,
            _ => bars.push((at, at)),
        }
    }
    bars
}

// === impl Time ===

impl Time {
    fn at(self, ms: f64) -> f64 {
        let share = (ms - self.from_ms) / (self.to_ms - self.from_ms);
        LEFT + share.clamp(0.0, 1.0) * (RIGHT - LEFT)
    }

    /// Between two numbers on the axis: round ones, some ten of them.
    fn step_ms(self) -> f64 {
        let length = self.to_ms - self.from_ms;
        let steps = [10.0, 20.0, 50.0, 100.0, 200.0, 500.0];
        let fits = |step: &f64| length / step <= 14.0;
        steps.into_iter().find(fits).unwrap_or(1_000.0)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::samples::picture;
    use super::*;
    use crate::scenario::{Strategy, Topology};

    #[test]
    fn packets_in_a_row_are_one_bar_and_a_hole_is_seen() {
        assert_eq!(
            bars(&[0.0, 1.0, 2.0, 4.0, 5.5, 9.0]),
            [(0.0, 2.0), (4.0, 5.5), (9.0, 9.0)]
        );
        assert_eq!(bars(&[]), []);
    }

    #[test]
    fn the_picture_is_as_it_was() {
        let pictures = [
            picture(Strategy::Segue, 2, 0),
            picture(Strategy::OvnKubernetes, 90, 0),
            picture(Strategy::Clone, 0, 30),
        ];
        let svg = plot(&pictures.each_ref()).unwrap();
        let path = "src/bench/blackout/snapshots/switch.svg";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        if std::env::var_os("SEGUE_UPDATE_SNAPSHOTS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &svg).unwrap();
        }
        let snapshot = std::fs::read_to_string(&path).unwrap();
        assert!(
            svg == snapshot,
            "the picture has changed: look at it, and with SEGUE_UPDATE_SNAPSHOTS=1 take it over into {}",
            path.display()
        );
    }

    #[test]
    fn what_happened_and_what_was_lost_is_named() {
        let svg = plot(&[&picture(Strategy::OvnKubernetes, 90, 3)]).unwrap();
        for shown in [
            "ovn-kubernetes",
            "open",
            "activation",
            "resume",
            "flip",
            "90 lost",
            "3 twice",
            "(shared)",
        ] {
            assert!(svg.contains(shown), "{shown} is missing");
        }
        assert!(plot(&[]).is_err());
        let nothing = Picture::empty(Strategy::Single, Topology::Routed);
        assert!(plot(&[&nothing]).unwrap().contains("0 lost"));
    }
}
