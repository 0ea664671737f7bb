//! Results as a table for people.

use comfy_table::{CellAlignment, Table, presets};

use super::results::{Check, Distribution, Figures, Results};

/// The results as text: a table, and the claims.
pub fn render(results: &Results) -> String {
    let environment = &results.environment;
    let heading = format!(
        "OVN {}, OVS {}, Linux {}, {} CPUs ({}), {} nodes",
        environment.ovn,
        environment.ovs,
        environment.kernel,
        environment.cpus,
        environment.cpu,
        environment.nodes
    );
    let mut parts = vec![heading, figures(results), LEGEND.to_owned()];
    parts.extend(results.checks.iter().map(verdict));
    parts.join("\n")
}

const LEGEND: &str = "\
median and 99th percentile in ms from sending the commit to its acknowledgement, to the Southbound
being up to date, and to the flows being installed on a real node. (nothing): a change of nothing.";

fn figures(results: &Results) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header([
        "VMs",
        "method",
        "flips",
        "commit p50",
        "p99",
        "Southbound p50",
        "p99",
        "flows p50",
        "p99",
    ]);
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    if let Some(method) = table.column_mut(1) {
        method.set_cell_alignment(CellAlignment::Left);
    }
    for size in &results.sizes {
        table.add_row(cells(
            grouped(u64::from(size.vms)),
            "(nothing)",
            &size.nothing,
        ));
        for row in results.rows.iter().filter(|row| row.vms == size.vms) {
            table.add_row(cells(String::new(), row.method.as_str(), &row.figures));
        }
    }
    table.to_string()
}

fn cells(vms: String, method: &str, figures: &Figures) -> Vec<String> {
    let mut cells = vec![vms, method.to_owned(), figures.flips.to_string()];
    let Figures {
        commit_ms,
        sb_ms,
        flows_ms,
        ..
    } = figures;
    for Distribution { p50, p99, .. } in [commit_ms, sb_ms, flows_ms] {
        cells.extend([millis(*p50), millis(*p99)]);
    }
    cells
}

fn verdict(check: &Check) -> String {
    let Check {
        what, ratio, limit, ..
    } = check;
    let verdict = if check.passed { "held" } else { "FAILED" };
    format!("{verdict}: {what}: {ratio:.1} ({limit})")
}

/// Three significant digits are what there is to know.
fn millis(value: f64) -> String {
    match value {
        ..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// With a comma between thousands.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::super::results::tests::results;
    use super::*;

    #[test]
    fn thousands_are_set_apart() {
        for (number, text) in [
            (0, "0"),
            (100, "100"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }

    #[test]
    fn every_figure_and_every_claim_is_shown() {
        let text = render(&results([1.25, 4.5], [30.0, 3210.0]));
        for shown in [
            "10,000",
            "address-set",
            "1.25",
            "4.50",
            "3210",
            "FAILED: address-set to the Southbound",
            "3.6 (at most 3)",
            "held: static-route",
        ] {
            assert!(text.contains(shown), "{shown} is missing:\n{text}");
        }
    }
}
