//! What the pictures have in common.

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

pub(super) const INK: RGBColor = RGBColor(0x21, 0x25, 0x29);
pub(super) const FAINT: RGBColor = RGBColor(0x6c, 0x75, 0x7d);
pub(super) const GRID: RGBColor = RGBColor(0xe9, 0xec, 0xef);
pub(super) const GREEN: RGBColor = RGBColor(0x08, 0x7f, 0x5b);
pub(super) const BLUE: RGBColor = RGBColor(0x19, 0x71, 0xc2);
pub(super) const ORANGE: RGBColor = RGBColor(0xd9, 0x48, 0x0f);
pub(super) const GREY: RGBColor = RGBColor(0x86, 0x8e, 0x96);

pub(super) type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Cuts a path into dashes.
pub(super) fn dashes(path: &[(f64, f64)]) -> Vec<Vec<(i32, i32)>> {
    const PERIOD: f64 = 9.0;
    let mut dashes = Vec::new();
    for ((x0, y0), (x1, y1)) in path.iter().zip(path.iter().skip(1)) {
        let length = (x1 - x0).hypot(y1 - y0);
        let along = |distance: f64| {
            let share = (distance / length).min(1.0);
            pixel(x0 + share * (x1 - x0), y0 + share * (y1 - y0))
        };
        let mut at = 0.0;
        while at < length {
            dashes.push(vec![along(at), along(at + PERIOD / 2.0)]);
            at += PERIOD;
        }
    }
    dashes
}

pub(super) fn text(
    canvas: &Canvas<'_>,
    what: &str,
    (x, y): (f64, f64),
    size: u32,
    color: RGBColor,
    anchor: HPos,
    bold: bool,
) -> Result<()> {
    let weight = if bold {
        FontStyle::Bold
    } else {
        FontStyle::Normal
    };
    let font = ("sans-serif", size).into_font().style(weight);
    let style = TextStyle::from(font)
        .color(&color)
        .pos(Pos::new(anchor, VPos::Center));
    canvas.draw_text(what, &style, pixel(x, y))?;
    Ok(())
}

#[expect(clippy::cast_possible_truncation, reason = "pixels of a small picture")]
pub(super) fn pixel(x: f64, y: f64) -> (i32, i32) {
    (x.round() as i32, y.round() as i32)
}
